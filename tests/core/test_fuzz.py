"""Damaged files at random: each is refused by name or harmless, in bounded time and memory.

A case is a number, from which everything about it is drawn, so that a failure can be run again. What no check can tell
is left out, since PEFT's files carry no hashes: another finite number in a tensor, and in JSON another value where any
could stand.
"""

import json
import random
import shutil
import signal
import struct
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import adapted, batches, make_llama, prompts
from peft import PeftModel
from processes import in_child

from peft_trex import SemanticRouter, calibrate_trex_merge, save_trex_as_lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MOST_MEGABYTES = 150
MOST_SECONDS = 20
# What says no, by the packages that a traceback ends in: this one, and the readers of the two formats.
READERS = {"peft_trex", "safetensors", "json", "codecs.py"}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """An adapter with static weights, and its export."""
    folder = tmp_path_factory.mktemp("origin")
    model = adapted()
    calibrate_trex_merge(model, batches(), per_cluster=True, progress=False)
    model.save_pretrained(folder / "adapter")
    save_trex_as_lora(model, folder / "export")
    return folder


def header_of(content):
    """Where the header of safetensors ends."""
    return 8 + struct.unpack("<Q", content[:8])[0]


def flip(draw, content, start, end):
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        changed[draw.randrange(start, end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw, content):
    return content[: draw.randrange(len(content))]


def append(draw, content):
    return content + draw.randbytes(draw.randrange(1, 64))


def remove(draw, content, start, end):
    here = draw.randrange(start, end)
    return content[:here] + content[here + draw.randrange(1, 16) :]


def repeat(draw, content, start, end):
    here = draw.randrange(start, end)
    piece = content[here : here + draw.randrange(1, 64)]
    return content[:here] + piece * draw.choice([2, 2, 100]) + content[here:]


def spoil(draw, content, start, end):
    """A number of float32 becomes NaN or infinite."""
    here = start + 4 * draw.randrange((end - start) // 4)
    return (
        content[:here]
        + struct.pack("<f", draw.choice([float("nan"), float("inf"), -float("inf")]))
        + content[here + 4 :]
    )


def damage(draw, file):
    """Damaged content of a file."""
    content = file.read_bytes()
    tensors = file.suffix == ".safetensors"
    end = header_of(content) if tensors else len(content)
    kinds = [flip, flip, flip, cut, append, remove, repeat, *([spoil] * 2 * tensors)]
    kind = draw.choice(kinds)
    if kind in (cut, append):
        return kind.__name__, kind(draw, content)
    return kind.__name__, kind(draw, content, *((end, len(content)) if kind is spoil else (0, end)))


@torch.no_grad()
def outputs(folder):
    model = PeftModel.from_pretrained(make_llama(), folder)
    static = [tensor for key, tensor in sorted(model.state_dict().items()) if "static" in key]
    config = {name: value for name, value in model.peft_config["default"].to_dict().items()}
    return [model(prompts(2)).logits, *static], json.loads(json.dumps(config, default=sorted))


def routes(folder):
    router = SemanticRouter.from_pretrained(folder)
    chosen = [router.route(ids.tolist()) for ids in prompts(12)]
    return [torch.tensor([-1 if route.cluster is None else route.cluster for route in chosen])], [
        [route.adapter for route in chosen],
        sorted((name, str(where.relative_to(folder))) for name, where in router.adapters.items()),
        router.default,
        router.clusters,
    ]


READ = {
    f"adapter/{WEIGHTS}": outputs,
    f"adapter/{CONFIG}": outputs,
    "export/router.json": routes,
    "export/router.safetensors": routes,
}


def by_name(error):
    """Whether an exception is a refusal: of a kind and with words that are meant for it."""
    frames = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, (ValueError, TypeError)) or type(error).__module__.startswith("safetensors"):
        return bool(str(error)) and (set(frames[-1]) & READERS or any("peft_trex" in parts for parts in frames))
    # PEFT looks up the name of the method before any code of ours runs.
    return isinstance(error, KeyError) and "peft" in frames[-1] and "peft_trex" not in frames[-1]


def try_case(number, name, origin, work, expected):
    """What becomes of one damaged file: "refused", "harmless", "another value", or what is wrong."""
    draw = random.Random(f"{name} {number}")
    folder = work / "folder"
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree((origin / name).parent, folder)
    kind, content = damage(draw, origin / name)
    (folder / Path(name).name).write_bytes(content)
    signal.alarm(MOST_SECONDS)
    try:
        values, settings = READ[name](folder)
    except Exception as error:
        return kind, "refused" if by_name(error) else f"{type(error).__name__}: {error}"
    equal = all(torch.equal(a, b) for a, b in zip(values, expected[0], strict=True))
    if settings != expected[1]:
        return kind, "another value" if name.endswith(".json") else "other settings by other tensors"
    return kind, "harmless" if equal else "other outputs"


def run_cases(name, numbers, origin, work, seconds=None):
    """Run cases in a process of its own, and return what became of them, by the kind of damage."""

    def work_through():
        import warnings

        warnings.simplefilter("ignore")
        expected = READ[name]((origin / name).parent)
        start, results = time.monotonic(), []
        for number in numbers:
            (work / "case").write_text(f"{name} {number}")
            results.append((number, *try_case(number, name, origin, work, expected)))
            if seconds is not None and time.monotonic() - start > seconds:
                break
        return results

    results, grown, status = in_child(work_through, 600)
    assert status == 0, f"{(work / 'case').read_text()} ended the process with {status}"
    assert grown < MOST_MEGABYTES
    wrong = [result for result in results if result[2] not in ("refused", "harmless", "another value")]
    assert not wrong, wrong
    return Counter((kind, end) for _, kind, end in results)


@pytest.mark.parametrize("name", READ)
def test_damage_is_refused_or_harmless(tmp_path, origin, name):
    counts = run_cases(name, range(30), origin, tmp_path)
    assert sum(count for (_, end), count in counts.items() if end == "refused") > 10
    if name.endswith(".safetensors"):
        assert {end for _, end in counts} == {"refused"}


@pytest.mark.slow
def test_damage_is_refused_or_harmless_for_a_minute(tmp_path, origin):
    for name in READ:
        counts = run_cases(name, range(30, 1000), origin, tmp_path, seconds=12)
        print(name, *sorted(counts.items()), sep="\n")
        assert sum(counts.values()) >= 5


def test_every_number_that_is_not_finite_is_refused(tmp_path, origin):
    """Wherever it stands in a file of tensors."""
    for name in (name for name in READ if name.endswith(".safetensors")):
        content = (origin / name).read_bytes()
        start = header_of(content)
        header = json.loads(content[8:start])
        folder = tmp_path / Path(name).parent.name
        shutil.copytree((origin / name).parent, folder)
        places = [value["data_offsets"] for key, value in sorted(header.items()) if key != "__metadata__"]
        for number, (begin, end) in enumerate(places[:: max(1, len(places) // 12)]):
            draw = random.Random(number)
            (folder / Path(name).name).write_bytes(spoil(draw, content, start + begin, start + end))
            with pytest.raises(ValueError, match=r"NaN or infinity|hash|SHA256"):
                READ[name](folder)
