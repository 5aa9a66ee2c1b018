"""The registry of what is measured. Each case yields groups; the variants of a group take turns in every round."""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from speed.check import check_model, check_one_layer, make_layer
from speed.measure import Job, wait
from speed.variants import (
    FEW,
    LORA,
    MODELS,
    PRECISIONS,
    RECOMMENDED,
    SIZES,
    SMALL,
    TREX,
    VARIANTS,
    OneLayer,
    Size,
    adapt,
    adapted_layer,
    adapted_of,
    batch,
    make_base,
    random_prompts,
    settings_of,
    sharing,
    variants,
)
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from peft_trex import TRexConfig, initialize_trex_prior
from peft_trex.prior.hooks import PromptWatch

KMEANS = "k-means alone"  # scikit-learn's, on embeddings that are normalised already


@dataclass(frozen=True)
class Setting:
    """Where a case runs."""

    size: str
    precision: str
    device: str

    @property
    def shapes(self) -> Size:
        return SIZES[self.size]

    @property
    def slow(self) -> bool:
        """Whether there is time for the most needed only: fewer variants, and fewer layers of a model."""
        return PRECISIONS[self.precision].is_slow(self.device) and self.size != "smoke"

    @property
    def layers(self) -> int:
        return 2 if self.slow else self.shapes.layers

    @property
    def backend(self) -> str:
        """Of torch.compile; tests have no time for more than the tracing."""
        return "aot_eager" if self.size == "smoke" else "inductor"

    def context(self) -> Any:
        return PRECISIONS[self.precision].context(self.device)


@dataclass(frozen=True)
class Group:
    """Variants that take turns.

    Attributes:
        shape: what tells this group from the case's others.
        jobs: makes the variants, by name.
        check: raises CheckFailed where the adapter differs from the formula.
        baseline: the variant that the ratios are to.
        rounds: instead of the case's.
    """

    shape: dict[str, Any]
    jobs: Callable[[], dict[str, Job]]
    check: Callable[[], None]
    baseline: str = LORA
    rounds: int | None = None


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        about: what, in a line.
        groups: the groups of a setting.
        precisions: in which it is measured.
        rounds: that count.
        at_least: seconds that one sample should take.
        warm_ups: rounds before, which do not count.
        memory: whether peak memory is measured, in a run more that is not timed.
        launches: whether operators (CPU) or kernels (GPU) are counted.
    """

    about: str
    groups: Callable[[Setting], Iterator[Group]]
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    rounds: int = 9
    at_least: float = 0.0
    warm_ups: int = 1
    memory: bool = True
    launches: bool = field(default=False)


def _clear(tensors: Any) -> None:
    for tensor in tensors:
        tensor.grad = None


# the layer


def _layer_job(config: Any, rows: int, tokens: int, width: int, setting: Setting) -> Job:
    model, _, x, call = make_layer(config, rows, tokens, width, setting.precision, setting.device)
    x.requires_grad_()
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    dy: list[torch.Tensor] = []

    def run() -> None:
        with setting.context():
            y = call(x)
        if not dy:
            dy.append(torch.randn_like(y))
        y.backward(dy[0])

    run()  # so that dy is there before memory is looked at
    return Job(run, lambda: _clear(leaves), model, settings=settings_of(config))


def _layer_group(
    setting: Setting,
    sweep: str | None,
    rows: int,
    tokens: int,
    width: int,
    experts: tuple[int, int],
    names: tuple[str, ...] = FEW,
) -> Group:
    on = adapted_layer(width, *experts)
    checked = [config for name, config in variants(on, names) if name in (TREX, RECOMMENDED)]

    def check() -> None:
        for config in checked:
            check_one_layer(config, rows, tokens, width, setting.precision, setting.device)

    shape = {"sweep": sweep, "tokens": rows * tokens, "width": width, "experts": experts[0] * experts[1]}
    return Group(
        shape,
        lambda: {name: _layer_job(config, rows, tokens, width, setting) for name, config in variants(on, names)},
        check,
    )


def layer(setting: Setting) -> Iterator[Group]:
    size = setting.shapes
    rows, tokens, width = size.rows, size.tokens, size.hidden
    yield _layer_group(setting, None, rows, tokens, width, (4, 8), MODELS if setting.slow else tuple(VARIANTS))
    if setting.slow:
        return
    for count in size.token_sweep:
        yield _layer_group(setting, "tokens", 1, count, width, (4, 8))
    for experts in size.expert_sweep:
        yield _layer_group(setting, "experts", rows, tokens, width, experts)
    for wide in size.width_sweep:
        yield _layer_group(setting, "width", rows, tokens, wide, (4, 8))


# a training step of a model


def _model_group(
    setting: Setting,
    make: Callable[[Setting, str, Any, Any], Job],
    names: tuple[str, ...] | None = None,
    baseline: str = LORA,
    layers: int | None = None,
    check: Callable[[], None] | None = None,
    **shape: Any,
) -> Group:
    """Variants of one base model, whose weights they share; by default all, for which there is time."""
    chosen = names or (MODELS if setting.slow else tuple(VARIANTS))
    layers = layers or setting.layers

    def jobs() -> dict[str, Job]:
        base = make_base(setting.shapes, setting.precision, setting.device, layers)
        made = {}
        for name, config in variants(adapted_of(base), chosen):
            model = adapt(sharing(base), config)
            if isinstance(config, TRexConfig):
                initialize_trex_prior(model, random_prompts(setting.shapes, setting.device), progress=False)
            made[name] = make(setting, name, model, config)
        return made

    def check_eager() -> None:
        for name in {TREX, RECOMMENDED}.intersection(chosen):
            check_model(setting.shapes, setting.precision, setting.device, name)

    return Group({**shape, "layers": layers}, jobs, check or check_eager, baseline=baseline)


def _step_job(setting: Setting, name: str, model: Any, config: Any) -> Job:
    inputs = batch(setting.shapes, setting.device)
    model.train()
    if config is None:  # which has nothing to train: forward, and backward to the embedded tokens
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

        def alone() -> None:
            with setting.context():
                loss = model(inputs_embeds=embeds, labels=inputs["labels"]).loss
            loss.backward()
            embeds.grad = None

        return Job(alone, model=model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # as the Trainer has it

    def step() -> None:
        with setting.context():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Job(step, model=model, optimizer=optimizer, settings=settings_of(config))


def step(setting: Setting) -> Iterator[Group]:
    yield _model_group(setting, _step_job, tokens=setting.shapes.rows * setting.shapes.tokens)


# the same, compiled


def _compiled_job(setting: Setting, name: str, model: Any, config: Any) -> Job:
    return _step_job(setting, name, torch.compile(model, backend=setting.backend), config)


def compiled(setting: Setting) -> Iterator[Group]:
    if setting.slow:
        return
    torch._dynamo.reset()  # which counts how often the same code was compiled, for other models too, and gives up
    size = setting.shapes

    def check() -> None:
        on = adapted_layer(size.hidden, 4, 8)
        where = (size.rows, size.tokens, size.hidden, setting.precision, setting.device, setting.backend)
        for name in (TREX, RECOMMENDED):
            check_one_layer(VARIANTS[name](on), *where)

    yield _model_group(
        setting,
        _compiled_job,
        MODELS,
        layers=2,  # compiling takes minutes
        check=check,
        tokens=size.rows * size.tokens,
    )


# one new token


# the name of a forward's cache: another one since transformers 5.24
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def _cached(setting: Setting, model: Any) -> tuple[torch.Tensor, DynamicCache]:
    """Ids (1, cached + 1) of a prompt, and a cache of all of them but the last."""
    size = setting.shapes
    model.eval()
    torch.manual_seed(3)
    ids = torch.randint(size.vocabulary, (1, size.cached + 1), device=setting.device)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), setting.context():
        model(input_ids=ids[:, : size.cached], **{CACHE: cache}, use_cache=True)
    return ids, cache


def _decode_job(setting: Setting, name: str, model: Any, config: Any) -> Job:
    size = setting.shapes
    ids, cache = _cached(setting, model)
    new = ids[:, size.cached :]

    @torch.no_grad()
    def decode() -> None:
        with setting.context():
            model(input_ids=new, **{CACHE: cache}, use_cache=True)

    def crop() -> None:
        if extra := cache.get_seq_length() - size.cached:
            cache.crop(-extra)

    return Job(decode, crop, model, settings="" if config is None else settings_of(config))


def decode(setting: Setting) -> Iterator[Group]:
    yield _model_group(setting, _decode_job, cached=setting.shapes.cached)


# new tokens by generate

NEW = 16  # tokens, so that what a call costs besides them matters little


def _generate_job(setting: Setting, name: str, model: Any, config: Any) -> Job:
    ids, filled = _cached(setting, model)
    options = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    fresh: list[DynamicCache] = []

    def prepare() -> None:
        fresh[:] = [copy.deepcopy(filled)]

    def generate() -> None:
        with setting.context():
            model.generate(input_ids=ids, **{CACHE: fresh.pop()}, **options)

    return Job(generate, prepare, model, settings="" if config is None else settings_of(config))


def generate(setting: Setting) -> Iterator[Group]:
    yield _model_group(setting, _generate_job, (TREX, RECOMMENDED, LORA, SMALL), cached=setting.shapes.cached, new=NEW)


# the prior's share of a step


class _Clock:
    """Wraps functions, and adds up the time that is spent in them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.spent = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            wait(self.device)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                wait(self.device)
                self.spent += time.perf_counter() - start

        return timed

    def read(self) -> float:
        spent, self.spent = self.spent, 0.0
        return spent


def watch_the_watch(model: nn.Module, clock: _Clock) -> int:
    """Put a clock around every hook that finds the prior and hands it down; returns how many there are."""
    count = 0
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                if isinstance(getattr(hook, "__self__", None), PromptWatch):
                    hooks[key] = clock.around(hook)
                    count += 1
    return count


def _prior_job(setting: Setting, name: str, model: Any, config: Any) -> Job:
    job = _step_job(setting, name, model, config)
    clock = _Clock(setting.device)
    if not watch_the_watch(model, clock):
        raise RuntimeError("No hook of a PromptWatch was found, so the prior's time cannot be told.")
    return Job(job.run, clock.read, model, job.optimizer, job.settings, clock.read)


def prior(setting: Setting) -> Iterator[Group]:
    if setting.slow:  # where whatever is not a product would seem to take no time
        return
    tokens = setting.shapes.rows * setting.shapes.tokens
    yield _model_group(setting, _prior_job, (TREX,), TREX, tokens=tokens)


# fitting the prior

FIT_DIM, FIT_CLUSTERS = 384, 32


def _embeddings(count: int) -> np.ndarray:
    """Points around centres that overlap, as prompts of kindred tasks do; float32."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((64, FIT_DIM), np.float32)
    points = random.standard_normal((count, FIT_DIM), np.float32)
    points += centres[random.integers(64, size=count)]
    return points


def _fit_jobs(count: int) -> dict[str, Job]:
    embeddings = _embeddings(count)
    config = TRexConfig(
        num_clusters=FIT_CLUSTERS, target_modules=["proj"], prior_encoder="external", prior_dim=FIT_DIM
    )
    model = adapt(OneLayer(8), config)
    unit = embeddings - embeddings.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)

    def alone() -> None:
        MiniBatchKMeans(FIT_CLUSTERS, init="k-means++", n_init=3, batch_size=4096, random_state=0).fit(unit)

    return {TREX: Job(lambda: initialize_trex_prior(model, embeddings=embeddings)), KMEANS: Job(alone)}


def fit(setting: Setting) -> Iterator[Group]:
    for count in setting.shapes.embeddings:
        yield Group(
            {"embeddings": count, "dim": FIT_DIM},
            lambda count=count: _fit_jobs(count),
            lambda: check_model(setting.shapes, setting.precision, setting.device),
            KMEANS,
            rounds=3 if count < 1_000_000 else 1,
        )


# merging


def _merged(function: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a merge without calibration is approximate
        function()


def _there_and_back_job(setting: Setting, name: str, model: Any, config: Any) -> Job:
    model = copy.deepcopy(model)  # no longer sharing the weights that are written to

    def run() -> None:
        _merged(model.merge_adapter)
        model.unmerge_adapter()

    return Job(run, model=model, settings=settings_of(config))


def _for_good_job(setting: Setting, name: str, model: Any, config: Any) -> Job:
    fresh: list[Any] = []

    def prepare() -> None:
        fresh[:] = [copy.deepcopy(model)]

    return Job(lambda: _merged(fresh[0].merge_and_unload), prepare, model, settings=settings_of(config))


def merge(setting: Setting) -> Iterator[Group]:
    names = (TREX, LORA)
    yield _model_group(setting, _there_and_back_job, names, what="merge_adapter, unmerge_adapter")
    yield _model_group(setting, _for_good_job, names, what="merge_and_unload")


CASES = {
    "layer": Case("one linear layer: forward and backward", layer, rounds=15, at_least=0.02),
    "step": Case("a training step: forward, backward, AdamW", step, rounds=9),
    "compiled": Case("a training step, by torch.compile", compiled, ("fp32", "autocast", "bf16")),
    "decode": Case("forward of one new token", decode, ("fp32", "bf16"), rounds=21, at_least=0.05, launches=True),
    "generate": Case("new tokens by generate, from a cache", generate, ("fp32", "bf16"), rounds=15, memory=False),
    "prior": Case("the prior's share of a training step", prior, rounds=9, memory=False),
    "fit": Case("fitting a prior", fit, ("fp32",), warm_ups=0, memory=False),
    "merge": Case("merging into the base weights", merge, ("fp32", "bf16"), rounds=9),
}
