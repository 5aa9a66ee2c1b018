"""The scores of calls that may go on from a cache, and what the cache then carries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .history import Content, History, Scores, attach, cached_tokens, change_scores, history_of, see_more
from .inputs import SEMANTIC_PRIOR, Inputs
from .prompts import strip_padding
from .scorer import PromptScorer
from .state import ForwardState, Generation, Override, Scored


class Conversations:
    """Finds out what a call's tokens go on with, and has them scored together with it."""

    def __init__(self, scorer: PromptScorer) -> None:
        self.scorer = scorer
        self.adapters = scorer.adapters

    def forward(
        self, inputs: Inputs, embeds: Any, names: list[str], override: Override | None, training: bool
    ) -> tuple[ForwardState, History]:
        """The state of a forward, and what its cache will carry."""
        inputs = inputs.without_padding(self.adapters.pad_token())
        history = self._history(inputs, names, override)
        history = None if history is None else history.for_rows(inputs.rows)
        new = None if torch.compiler.is_compiling() else self._content(inputs)
        if history is not None and embeds is None and self._goes_on(history, inputs, names):
            scores = history.last if override is None else override.apply(history.last, inputs.rows)
            scored, content = Scored(scores, scores, history.begun), None
            if history.content is not None and new is not None:
                answers = new.attended if new.answered is None else new.answered
                content = history.content.with_more(replace(new, answered=answers))
        else:
            whole = self._whole(history, new, inputs)
            scored = self.scorer.score(inputs, embeds, names, override, whole, prefix=True)
            if history is not None and whole is not None:
                self._warn_of_former(history, scored, whole, override)
            nobody = history is None and override is None and not inputs.told and scored.begun is True
            if nobody and self.adapters.is_causal():
                self.scorer.warn_untold(scored, training)
            content = whole or new
            if whole is not None and new is not None:
                scored = replace(scored, scores=scored.of_tokens(whole.length - new.length, new.length))
        seen = None
        if content is not None and new is not None:
            seen = see_more(None if history is None else history.seen, scored.scores, new.length)
        state = ForwardState(scored.scores, inputs.rows, inputs.lengths)
        return state, History(scored.last, content, seen, scored.begun)

    def _content(self, inputs: Inputs) -> Content | None:
        """The tokens of a call that a cache may carry; a decoder's cache does not hold the prompt's."""
        return None if self.adapters.two_sided else inputs.content(self.adapters.is_causal())

    def _goes_on(self, history: History, inputs: Inputs, names: list[str]) -> bool:
        """Whether a call's tokens go on with what runs in its cache, and so have its prior."""
        tokens = inputs.tokens
        if history.content is None or tokens is None or torch.compiler.is_compiling():
            return True
        if not self.adapters.is_causal() or tokens.shape[1] != 1 or history.is_cut or not bool(history.begun):
            return False
        markers = [each for name in names if (each := self.adapters.markers_of(name)) is not None]
        # What ends the marker before a user's message may begin a new turn.
        marks = {marker[-1] for each in markers for marker in (each.before, each.before_merged) if marker}
        return not any(bool((tokens == mark).any()) for mark in marks)

    def _whole(self, history: History | None, new: Content | None, inputs: Inputs) -> Content | None:
        """The tokens of a cache, and then the call's; None without a history of tokens."""
        if history is None or history.content is None or new is None:
            return None
        former = history.content
        # A single token goes on with an answer. More of them are a new prompt, of which all before is part.
        if not inputs.told and new.length == 1 and bool(history.begun):
            new = replace(new, answered=new.attended)
        elif not inputs.told:
            former = replace(former, answered=None)
        length, mask = former.length + new.length, inputs.mask
        full = mask is not None and mask.shape[1] >= length
        return former.with_more(new, mask[:, -length:].to(new.attended.device) > 0 if full else None)

    def _warn_of_former(self, history: History, scored: Scored, whole: Content, override: Override | None) -> None:
        """Warn where the keys and values in a cache were computed with a prior that its tokens would not have now."""
        for name, score in scored.scores.items():
            seen = None if history.seen is None else history.seen.get(name)
            if override is not None or score is None or seen is None:
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
        """What a cache, or an encoder's output, among the inputs carries; None without any."""
        counted = [(cache, cached_tokens(cache)) for cache in inputs.caches]
        filled = [(cache, tokens) for cache, tokens in counted if tokens != 0]
        for source, tokens in (*filled, (inputs.encoded, None)):
            history = history_of(source)
            if history is None or not set(names) <= set(history.last):
                continue
            if history.content is not None:
                # Somebody else may have filled the cache, too.
                fits = tokens in (None, history.content.length)
            else:
                # A compiled forward keeps no tokens, but what it has begun goes on.
                fits = self.adapters.two_sided or inputs.tokens is None or inputs.tokens.shape[1] == 1
            if fits:
                return history
        if filled and (override is None or not all(map(override.covers, names))):
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
            nothing: Scores = dict.fromkeys(names)
            scores = nothing if override is None else override.apply(nothing, 1)
            return Generation(Scored(scores, scores), None, 1)
        history, cache = self._history(inputs, names, override), next(iter(inputs.caches), None)
        if history is not None and inputs.tokens is not None:
            history = history.for_rows(inputs.rows)
        new, content = self._content(inputs), None
        if history is not None and history.content is not None and new is not None:
            # The call's tokens repeat those of the cache and go on, or stand behind them.
            wider = inputs.mask is not None and inputs.mask.shape[1] > new.length
            behind = wider or new.length <= history.content.length
            content = self._whole(history, new, inputs) if behind else new
        if history is not None and embeds is None and (content is None or self._only_continues(history, content)):
            scores = history.last if override is None else override.apply(history.last, history.rows)
            return Generation(Scored(scores, scores), content, history.rows, cache)
        scored = self.scorer.score(inputs, embeds, names, override, content)
        if history is not None and content is not None:
            self._warn_of_former(history, scored, content, override)
        if self.adapters.two_sided:
            # The prompt tells the call's own forwards from others; its tokens are the encoder's.
            new = inputs.content(causal=False)
        return Generation(scored, content or new, inputs.rows, cache)

    def _only_continues(self, history: History, content: Content) -> bool:
        """Whether a generate call goes on with the answer that runs in its cache."""
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
        if self.adapters.two_sided:
            return
        sequences = getattr(output, "sequences", output)
        cached = cached_tokens(cache)
        rows = content.attended.shape[0]
        batch = getattr(cache, "batch_size", None)
        single = isinstance(sequences, Tensor) and len(sequences) % rows == 0 and batch in (None, -1, len(sequences))
        if not single or cached is None or getattr(output, "beam_indices", None) is not None:
            return
        # Without ids of the prompt, the sequences are the new tokens alone.
        former = 0 if content.ids is None else content.length
        new, pad = sequences[:, former:], self.adapters.pad_token()
        present = torch.ones_like(new, dtype=torch.bool) if pad is None else strip_padding(new, pad)
        # The last token, which is not in the cache, tells whether a pad token before it is padding.
        new, present = (part[:, : max(0, cached - content.length)] for part in (new, present))

        def of_rows(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(len(sequences) // rows, 0)

        scores, last = (change_scores(part, of_rows) for part in (generation.scored.scores, generation.scored.last))
        seen = see_more(see_more(None, scores, content.length), last, new.shape[1])
        content = content.change(of_rows).with_more(Content((new,), present, torch.ones_like(present)))
        if content.length == cached:
            attach(cache, History(last, content, seen))


def attended_before(inputs: Inputs) -> Tensor | None:
    """(B, T) bool, which tokens of a generate call are no padding, by what its cache knows of them.

    transformers takes each pad token for padding where there is no mask, also one that an answer holds, which had a
    part in all that the answer went on with. None where the cache does not know the call's tokens.
    """
    history = next((history_of(cache) for cache in inputs.caches), None)
    known = None if history is None or history.content is None else history.content.ids
    ids = inputs.ids
    if history is None or history.content is None or known is None or not isinstance(ids, Tensor):
        return None
    length = known.shape[1]
    if ids.dim() != 2 or ids.shape[1] < length or not torch.equal(ids[:, :length].to(known.device), known):
        return None
    new = torch.ones_like(ids[:, length:], dtype=torch.bool) if inputs.mask is None else inputs.mask[:, length:] > 0
    return torch.cat([history.content.attended.to(ids.device), new], 1)
