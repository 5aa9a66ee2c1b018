"""The scores of calls that may go on from a cache, and what the cache then carries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .history import Content, History, attach, cached_tokens, history_of
from .inputs import SEMANTIC_PRIOR, Inputs
from .prompts import strip_padding
from .scorer import PromptScorer
from .state import ForwardState, Generation, Override, Scored, Scores


class Conversations:
    """Finds out what a call's tokens go on with, and has them scored together with it.

    Args:
        scorer: scores prompts.
    """

    def __init__(self, scorer: PromptScorer) -> None:
        self.scorer = scorer
        self.adapters = scorer.adapters

    def forward(
        self, inputs: Inputs, embeds: Any, names: list[str], override: Override | None, training: bool
    ) -> tuple[ForwardState, History]:
        """The state of a forward, and what its cache will carry."""
        inputs = inputs.without_padding(self.adapters.pad_token())
        history = self._history(inputs, names, override)
        new = None if self.adapters.two_sided else inputs.content(self.adapters.is_causal())
        if history is not None and embeds is None and self._goes_on(history, inputs, names):
            state = ForwardState(history.last, history.rows).for_call(inputs.rows, inputs.lengths)
            if override is not None:
                state = replace(state, scores=override.apply(state.scores, inputs.rows))
            scored, content = Scored(state.scores, state.scores, history.begun), None
            if history.content is not None and new is not None and not torch.compiler.is_compiling():
                answers = new.attended if new.answered is None else new.answered
                content = history.content.with_more(replace(new, answered=answers))
        else:
            whole = self._whole(history, new, inputs, override)
            scored = self.scorer.score(inputs, embeds, names, override, whole, prefix=True)
            if history is not None and whole is not None:
                self._warn_of_former(history, scored, whole, override)
            nobody = not inputs.told and override is None and history is None
            if self.adapters.is_causal() and nobody and scored.begun is True:
                self.scorer.warn_untold(scored, training)
            content = None if torch.compiler.is_compiling() else whole or new
            scores = scored.scores if whole is None or new is None else scored.of_last_tokens(new.length)
            state = ForwardState(scores, inputs.rows, inputs.lengths)
        seen = () if content is None or history is None else history.seen
        if content is not None and new is not None:
            seen = (*seen, (state.scores, new.length))
        return state, History(scored.last, content, seen, scored.begun)

    def _goes_on(self, history: History, inputs: Inputs, names: list[str]) -> bool:
        """Whether a call's tokens go on with what runs in its cache, and so have its prior."""
        if not set(names) <= set(history.last):
            return False
        tokens = inputs.tokens
        if history.content is None or tokens is None or self.adapters.two_sided or torch.compiler.is_compiling():
            return True
        if not self.adapters.is_causal() or tokens.shape[1] != 1 or history.is_cut or not bool(history.begun):
            return False
        marks = {markers.before[-1] for name in names if (markers := self.adapters.markers_of(name)) is not None}
        # What ends the marker before a user's message may begin a new turn.
        return not any(bool((tokens == mark).any()) for mark in marks)

    def _whole(
        self, history: History | None, new: Content | None, inputs: Inputs, override: Override | None
    ) -> Content | None:
        """The tokens of a cache, and then the call's; None without a history of tokens."""
        if history is None or history.content is None or new is None:
            return None
        former, rows = history.content, new.attended.shape[0]
        if rows % former.attended.shape[0]:
            raise ValueError(
                f"The cache holds {former.attended.shape[0]} prompts, but the call has {rows} rows; expected as many, "
                "or a multiple of that. Pass semantic_prior for rows that were put together otherwise."
            )
        former = former.change(lambda tensor: tensor.repeat_interleave(rows // former.attended.shape[0], 0))
        # A single token goes on with an answer. More of them are a new prompt, of which all before is part.
        if not inputs.told and new.length == 1 and bool(history.begun):
            new = replace(new, answered=new.attended)
        elif not inputs.told:
            former = replace(former, answered=None)
        length = former.length + new.length
        mask = inputs.mask
        full = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length
        return former.with_more(new, mask[:, -length:].to(new.attended.device) > 0 if full else None)

    def _warn_of_former(self, history: History, scored: Scored, whole: Content, override: Override | None) -> None:
        """Warn where the keys and values in a cache were computed with a prior that its tokens would not have now."""
        for name, score in scored.scores.items():
            seen = history.seen_by(name)
            if override is not None or score is None or seen is None or len(seen) != len(score):
                continue
            now = score[:, : seen.shape[1]] if score.dim() == 3 else score[:, None]
            differs = (seen - now).abs().amax(-1) > 1e-4
            if bool((differs & whole.attended[:, : seen.shape[1]].to(differs.device)).any()):
                advice = "their answers are not told from their prompts; set chat_markers, or pass completion_mask"
                if not self.adapters.acts_on_answers(name):
                    advice = (
                        "prior_scope='answer' has no such problem, with chat_markers where there are several turns"
                    )
                self.scorer.warn_once(
                    "former prior",
                    "A forward goes on from a cache whose keys and values were computed with another prior, that of "
                    f"an earlier turn or prompt, so it differs from the same tokens without the cache: {advice}.",
                )

    def _history(self, inputs: Inputs, names: list[str], override: Override | None) -> History | None:
        """What a cache, or an encoder's output, among the inputs carries; None with nothing to go on from."""
        filled = [(cache, cached_tokens(cache)) for cache in inputs.caches]
        filled = [(cache, tokens) for cache, tokens in filled if tokens != 0]
        for source, tokens in (*filled, (inputs.encoded, None)):
            history = history_of(source)
            content = None if history is None else history.content
            # Somebody else may have filled the cache, too.
            fits = content is not None and tokens in (None, content.length)
            # A compiled forward keeps no tokens, but what it has begun goes on.
            fits |= content is None and (
                self.adapters.two_sided or inputs.tokens is None or inputs.tokens.shape[1] == 1
            )
            if history is not None and set(names) <= set(history.last) and fits:
                return history
        lengths = [tokens for _, tokens in filled if tokens is not None]
        if lengths and (override is None or not override.covers_all(names)):
            self.scorer.warn_once(
                "cache",
                "A forward goes on from a cache whose prompt T-REX did not see; the prior is computed from the tokens "
                "of this call alone. Use generate, run the prompt through the same model first, or pass "
                f"{SEMANTIC_PRIOR}.",
            )
        return None

    def start(self, inputs: Inputs, embeds: Any, names: list[str], override: Override | None) -> Generation:
        """The scores of a generate call: all that it is given is prompt."""
        # Without any of these, generation starts from nothing, and an empty prompt has no prior.
        if embeds is None and inputs.tokens is None and inputs.encoded is None:
            nothing = dict.fromkeys(names)
            scores: Scores = nothing if override is None else override.apply(nothing, 1)
            return Generation(Scored(scores, scores), None, 1)
        new = None if self.adapters.two_sided else inputs.content(self.adapters.is_causal())
        filled = [tokens for cache in inputs.caches if (tokens := cached_tokens(cache)) != 0]
        history = self._history(inputs, names, override) if filled or inputs.encoded is not None else None
        content = self._content_of_generate(history, new, inputs)
        if history is not None and embeds is None and (content is None or self._only_continues(history, content)):
            rows = inputs.rows if inputs.tokens is not None else history.rows
            scores = history.last if override is None else override.apply(history.last, rows)
            return Generation(Scored(scores, scores), content, rows, *inputs.caches[:1])
        if content is None:
            content = new
        whole = content if history is not None else None
        scored = self.scorer.score(inputs, embeds, names, override, whole)
        if self.adapters.two_sided:
            # The prompt tells the call's own forwards from others; its tokens are the encoder's.
            return Generation(scored, inputs.content(causal=False), inputs.rows, *inputs.caches[:1])
        if history is not None and content is not None:
            self._warn_of_former(history, scored, content, override)
        return Generation(scored, content, inputs.rows, *inputs.caches[:1])

    def _content_of_generate(self, history: History | None, new: Content | None, inputs: Inputs) -> Content | None:
        """The tokens of a generate call, and before them those of its cache where the call does not repeat them."""
        if history is None or history.content is None or new is None:
            return None
        wider = isinstance(inputs.mask, Tensor) and inputs.mask.shape[1] > new.length
        if new.length <= history.content.length or wider:
            return self._whole(history, new, inputs, None)
        # The call's ids repeat those of the cache.
        return new

    def _only_continues(self, history: History, content: Content) -> bool:
        assert history.content is not None
        marked = any(self.adapters.markers_of(name) is not None for name in history.last)
        kept = not history.is_cut and bool(history.begun)
        return content.length <= history.content.length + 1 and kept and not marked

    def end(self, generation: Generation, output: Any) -> None:
        """Have the cache of a generate call that has ended carry its tokens, if they are known."""
        cache, content = generation.cache, generation.content
        if cache is None or content is None:
            return
        attach(cache, None)
        # A decoder's cache does not hold the prompt's tokens.
        if self.adapters.two_sided:
            return
        sequences = getattr(output, "sequences", output)
        cached = cached_tokens(cache)
        rows = content.attended.shape[0]
        batch = getattr(cache, "batch_size", None)
        single = isinstance(sequences, Tensor) and len(sequences) % rows == 0 and batch in (None, -1, len(sequences))
        if not single or cached is None or getattr(output, "beam_indices", None) is not None:
            return
        times = len(sequences) // rows
        content = content.change(lambda tensor: tensor.repeat_interleave(times, 0))
        # Without ids of the prompt, the sequences are the new tokens alone.
        former = 0 if content.ids is None else content.length
        new = sequences[:, former:][:, : max(0, cached - content.length)]
        pad = self.adapters.pad_token()
        present = torch.ones_like(new, dtype=torch.bool) if pad is None else strip_padding(new, pad)
        scored = generation.scored

        def of_rows(scores: Scores) -> Scores:
            return {name: s if s is None else s.repeat_interleave(times, 0) for name, s in scores.items()}

        seen = ((of_rows(scored.scores), content.length), (of_rows(scored.last), new.shape[1]))
        content = content.with_more(Content((new,), present, torch.ones_like(present)))
        if content.length == cached:
            attach(cache, History(of_rows(scored.last), content, seen))
