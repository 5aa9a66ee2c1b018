"""All or nothing: a call that is interrupted at any line of ours leaves the model as before it, or as after it.

Each function runs undisturbed once, to count the lines of this package that it passes. Then it is interrupted at them,
one at a time: at the first and the last time that each line runs and, in between, at some that chance takes. The model
is compared bit by bit with its state before, and where it differs from that, with its state after a whole call.

One exception is raised, in the thread of the call, before a line of ours runs. No Python code can exclude, and this
does not show, what is left by

- a second interrupt while the first one is undone,
- an interrupt at the end of a `steer_trex` block before its first statement: the block goes on,
- an interrupt between PyTorch's hooks and the forward that they were called for: the prior of that forward stays with
  the layers until the next forward of any part of the model, which takes no notice of it.

Random numbers that were drawn for the start of a new adapter stay drawn. If the states were put back, other threads
would draw the same numbers again.
"""

import random
import sys
import threading
import warnings
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import adapted, batches, make_llama, prompts, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from torch._dynamo import eval_frame

import peft_trex
import peft_trex.model
from peft_trex import (
    TRexConfig,
    TRexLayer,
    calibrate_trex_merge,
    initialize_trex_prior,
    prune_trex,
    pruning_curve,
    routing_report,
    steer_trex,
    trex_from_lora,
    undo,
    unsuited,
)
from peft_trex.model import TRexModel
from peft_trex.prior import positions, reach
from peft_trex.undo import HOOKS, Snapshot

SOURCE = str(Path(peft_trex.__file__).parent)
SMALL = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = {"r_a": 2, "r_b": 2, "num_clusters": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
KINDS = (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)
# What the text above excludes: functions after whose interruption a block, or a forward's prior, may stay.
BLOCK_STAYS = {("steer.py", "__exit__"), ("channel.py", "leave")}
PRIOR_STAYS = {("hooks.py", "open"), ("guard.py", "__call__")}


class Interruption:
    """Raises at one of the lines of this package that run, counted from 0, or counts them all."""

    def __init__(self, at=None, kind=KeyboardInterrupt):
        self.at = at
        self.kind = kind
        self.lines = []
        self.looks = 0

    def __enter__(self):
        self.former = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.former)

    def _call(self, frame, event, _):
        # A snapshot looks at some thousand objects, one like the other, and changes none.
        self.looks += frame.f_code is Snapshot._hold.__code__
        within = frame.f_code.co_name in ("_hold", "<genexpr>") and frame.f_code.co_filename == undo.__file__
        ours = frame.f_code.co_filename.startswith(SOURCE) and not (within and self.looks > 20)
        return self._line if ours else None

    def _line(self, frame, event, _):
        if event == "line":
            code = frame.f_code
            self.lines.append((Path(code.co_filename).name, code.co_name, frame.f_lineno))
            if len(self.lines) - 1 == self.at:
                raise self.kind("interrupted")
        return self._line


def places(lines, count, seed=0):
    """Where to interrupt: at the first and the last time that a line runs and some in between, at most `count`."""
    first, last = {}, {}
    for number, line in enumerate(lines):
        first.setdefault(line, number)
        last[line] = number
    numbers = sorted({*first.values(), *last.values()})
    # Changes come last, so a third of the places is there.
    numbers, latest = numbers[: -count // 3], numbers[-count // 3 :]
    rest = sorted(set(range(len(lines))) - {*numbers, *latest})
    chance = random.Random(seed)
    numbers += chance.sample(rest, min(len(numbers) // 10, len(rest)))
    return sorted([*latest, *chance.sample(numbers, min(count - len(latest), len(numbers)))])


def values_of(model):
    """All that a call could leave changed, in a form that compares."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    state = {
        "tensors": {name: (tensor.dtype, tensor.detach().tolist()) for name, tensor in tensors.items()},
        "saved": sorted(model.state_dict()),
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "tree": [(name, type(module).__name__, module.training) for name, module in model.named_modules()],
        "gradients": torch.is_grad_enabled(),
        "stance": eval_frame._stance.stance,
    }
    for name, module in model.named_modules():
        hooks = {kind: [_name(hook) for hook in vars(module)[kind].values()] for kind in HOOKS[::3]}
        own = sorted({"forward", "generate", "generate_batch", "peft_config"} & vars(module).keys())
        state["hooks of", name] = (hooks, [len(vars(module)[kind]) for kind in HOOKS], own)
        if isinstance(module, TRexLayer):
            state["layer", name] = (
                [sorted(getattr(module, kind)) for kind in (*module.adapter_layer_names, *module.other_param_names)],
                module.trex_settings,
                module.trex_fused,
                module.trex_uses_prior,
                module.trex_reached,
                {name: chosen.tolist() for name, chosen in module.trex_chosen.items()},
                (module.active_adapters, module.disable_adapters, module.merged_adapters, module._former_weight),
                module.frozen_peft_weight_names,
            )
        if isinstance(module, TRexModel):
            watch = module.prompts
            running = vars(watch.channel.running)
            state["tuner"] = (
                {name: config.to_dict() for name, config in module.peft_config.items()},
                (module.active_adapters, sorted(module.targeted_module_names)),
                {name: prior._fitted for name, prior in module.trex_prior.items()},
                (watch.channel.calibrated, [*map(len, (watch._handles, watch._guards, watch._wrapped))]),
                (watch.scorer._whole, watch.channel.blocks.innermost() is None, len(watch.outside)),
                {kind: running[kind] in (None, ()) for kind in ("state", "frame", "generation", "hidden")},
            )
        if isinstance(module, PeftModel):
            state["active"] = (module.active_adapter, module._adapters_disabled)
    # Without a copy, what is held by reference would change with the model.
    return deepcopy(state)


def _name(hook):
    return getattr(getattr(hook, "func", hook), "__qualname__", type(hook).__name__)


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def difference(state, other, place=""):
    """What differs first, in words; None for equal states."""
    if state == other:
        return None
    if isinstance(state, dict) and isinstance(other, dict) and state.keys() == other.keys():
        parts = [(key, state[key], other[key]) for key in state]
    elif isinstance(state, (list, tuple)) and isinstance(other, (list, tuple)) and len(state) == len(other):
        parts = [(number, *pair) for number, pair in enumerate(zip(state, other, strict=True))]
    else:
        return f"{place}: {str(state)[:200]} != {str(other)[:200]}"
    return next(difference(one, two, f"{place}/{key}") for key, one, two in parts if one != two)


# models and calls


@cache
def _model():
    model = adapted(base=make_llama(**SMALL), fit=False, **CONFIG)
    initialize_trex_prior(model, batches(16, 8), progress=False)
    model.add_adapter("other", TRexConfig(**CONFIG))
    randomize(model, "other", seed=3)
    initialize_trex_prior(model, batches(16, 8, seed=3), adapter_name="other", progress=False)
    calibrate_trex_merge(model, batches(16, 8), progress=False)
    model.base_model.model.model.layers[0].train()
    return model


@cache
def _unfitted():
    return adapted(base=make_llama(**SMALL), fit=False, **CONFIG)


@cache
def _merged():
    model = deepcopy(_model())
    model.merge_adapter()
    return model


@cache
def _base():
    return make_llama(**SMALL)


def _steered(model, value):
    with steer_trex(model, value):
        return model(input_ids=prompts(2)).logits


@cache
def _report():
    return routing_report(deepcopy(_model()), batches(8, 8), progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two LoRA adapters and a T-REX adapter of the small model."""
    folder = tmp_path_factory.mktemp("adapters")
    for number in range(2):
        torch.manual_seed(number)
        config = LoraConfig(r=1, target_modules=CONFIG["target_modules"], init_lora_weights=False)
        get_peft_model(make_llama(**SMALL), config).save_pretrained(folder / f"lora_{number}")
    model = randomize(deepcopy(_model()), seed=7)
    model.save_pretrained(folder, selected_adapters=["default"])
    return folder


DATA = batches(8, 8, seed=5)
# The name of each call, what makes its model, the call, and whether it draws the start of an adapter.
CALLS = {
    "initialize_trex_prior": (_model, lambda m, _: initialize_trex_prior(m, DATA, progress=False), False),
    "its first time": (_unfitted, lambda m, _: initialize_trex_prior(m, DATA, progress=False), False),
    "calibrate_trex_merge": (
        _model,
        lambda m, _: calibrate_trex_merge(m, DATA, per_cluster=True, progress=False),
        False,
    ),
    "routing_report": (_model, lambda m, _: routing_report(m, DATA, progress=False), False),
    "prune_trex": (_model, lambda m, _: prune_trex(m, _report(), keep=0.5), False),
    "prune_trex of a layer": (_model, lambda m, _: prune_trex(m, _report(), keep=0.3), False),
    "pruning_curve": (_model, lambda m, _: pruning_curve(m, _report(), DATA, [0.5, 0.3], progress=False), False),
    "add_adapter": (_model, lambda m, _: m.add_adapter("third", TRexConfig(**CONFIG)), True),
    "get_peft_model": (_base, lambda m, _: get_peft_model(m, TRexConfig(**CONFIG)), True),
    "load_adapter": (_model, lambda m, folder: m.load_adapter(folder, "third"), True),
    "load_adapter into one": (_model, lambda m, folder: m.load_adapter(folder, "default", is_trainable=True), False),
    "delete_adapter": (_model, lambda m, _: m.delete_adapter("default"), False),
    "merge_adapter": (_model, lambda m, _: m.merge_adapter(), False),
    "unmerge_adapter": (_merged, lambda m, _: m.unmerge_adapter(), False),
    "merge_and_unload": (_model, lambda m, _: m.merge_and_unload(), False),
    "unload": (_model, lambda m, _: m.unload(), False),
    "trex_from_lora": (
        _base,
        lambda m, folder: trex_from_lora(
            m, [folder / "lora_0", folder / "lora_1"], prompts=[DATA, DATA], num_clusters=2, progress=False
        ),
        True,
    ),
    "steer_trex": (_model, lambda m, _: _steered(m, {"input_ids": prompts(1)}), False),
    "forward": (_model, lambda m, _: m(input_ids=prompts(2)), False),
    "forward of the base model's trunk": (_model, lambda m, _: m.base_model.model.model(input_ids=prompts(2)), False),
    "generate": (_model, lambda m, _: m.generate(input_ids=prompts(2), max_new_tokens=2, do_sample=False), False),
}


def _call(model, call, folder, draws):
    if draws:
        torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(model, folder)


def _check(name, folder, count):
    original, call, draws = CALLS[name]

    def make():
        return deepcopy(original())

    undisturbed = make()
    before = values_of(undisturbed)
    states = random_states()
    _call(undisturbed, call, folder, draws)
    assert draws or random_states() == states, "an undisturbed call moves the random states"
    after = values_of(undisturbed)
    del undisturbed
    model = make()
    # The second time, what is found once for all has been found.
    with Interruption() as counted:
        _call(model, call, folder, draws)
    assert difference(values_of(model), after) is None
    assert len(counted.lines) > 10
    model = make()
    for number, place in enumerate(places(counted.lines, count)):
        line = counted.lines[place]
        states = random_states()
        try:
            with Interruption(place, KINDS[number % len(KINDS)]) as interruption:
                _call(model, call, folder, draws)
        except KINDS:
            pass
        assert len(interruption.lines) > place, f"{line} was not reached again"
        assert draws or random_states() == states, f"random states moved after an interrupt at {line}"
        state = values_of(model)
        changed = difference(state, before)
        if changed is not None and line[:2] in PRIOR_STAYS:
            # The trunk of another prompt would take it first.
            got = model.base_model.model.model(input_ids=prompts(2, seed=9)).last_hidden_state
            assert torch.equal(got, make().base_model.model.model(input_ids=prompts(2, seed=9)).last_hidden_state)
            changed = difference(values_of(model), before)
            assert changed is None, f"after an interrupt at {line}, and another forward: {changed}"
        elif changed is not None:
            stays = line[:2] in BLOCK_STAYS and changed.startswith("/tuner/4/1:")
            assert stays or difference(state, after) is None, f"after an interrupt at {line}: {changed}"
            model = make()
    assert difference(values_of(model), before) is None
    _call(model, call, folder, draws)
    assert difference(values_of(model), after) is None, "a call after the interrupts gives something else"


@pytest.fixture(autouse=True)
def _sources_are_read_once(monkeypatch):
    """The classes of a model's modules do not change, and reading their source takes most of the time here."""
    reads = ((reach, "position_layers"), (reach, "turns_rows"), (positions, "position_layers"), (unsuited, "bypassed"))
    for module, name in reads:
        monkeypatch.setattr(module, name, cache(getattr(module, name)))


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_changes_nothing(name, folders):
    _check(name, folders, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line_changes_nothing(name, folders):
    _check(name, folders, 100)


def _drawn():
    return torch.rand(3).tolist() + np.random.rand(3).tolist() + [random.random() for _ in range(3)]


class _WaitedFor:
    """Batches, of which the second comes when another thread has drawn."""

    def __init__(self):
        self.begun, self.drawn = threading.Event(), threading.Event()

    def __iter__(self):
        yield DATA[0]
        random.random(), np.random.rand(), torch.rand(1)
        self.begun.set()
        assert self.drawn.wait(60)
        yield DATA[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda model, data: initialize_trex_prior(model, data, progress=False),
        lambda model, data: calibrate_trex_merge(model, data, progress=False),
        lambda model, data: routing_report(model, data, progress=False),
        lambda model, data: pruning_curve(model, _report(), data, [0.5], progress=False),
    ],
    ids=["initialize_trex_prior", "calibrate_trex_merge", "routing_report", "pruning_curve"],
)
def test_no_number_comes_twice_to_another_thread(call):
    model, data = deepcopy(_model()), _WaitedFor()
    _report()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    before, states = _drawn(), random_states()
    thread = threading.Thread(target=call, args=(model, data))
    thread.start()
    assert data.begun.wait(60)
    meanwhile = _drawn()
    data.drawn.set()
    thread.join()
    assert random_states() == states
    numbers = [*before, *meanwhile, *_drawn()]
    assert len(set(numbers)) == len(numbers) == 27


def test_what_a_loader_draws_follows_the_seed():
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in prompts(16)], 4, shuffle=True)
    fits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model, order = deepcopy(_unfitted()), []
        initialize_trex_prior(model, (order.append(batch) or batch for batch in loader), progress=False)
        fits.append(torch.cat([batch["input_ids"] for batch in order]))
    assert torch.equal(fits[0], fits[1]) and not torch.equal(fits[0], fits[2])
