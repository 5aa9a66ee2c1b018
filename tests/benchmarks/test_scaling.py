"""The arithmetic of docs/explain/scaling.md: against what PyTorch, bitsandbytes and the package do at small sizes."""

import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import BEFORE_5, adapted, answered
from speed.variants import LORA, TREX
from studies import scaling
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import peft_trex.fit.ranks
from peft_trex.fit.fitting import Progress, _read
from peft_trex.fit.ranks import Ranks
from peft_trex.fit.reservoir import Reservoir


class _Sent(TorchDispatchMode):
    """Bytes that each kind of collective moves: those of its largest tensor."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")
        if name[0] == "c10d":
            flat = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else [arg])]
            size = max(each.nbytes for each in flat if isinstance(each, torch.Tensor))
            self.bytes[name[1]] = self.bytes.get(name[1], 0) + size
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ranks():
    """Starts a process group whose other ranks are not there: what is sent goes nowhere."""

    def start(size):
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        return size

    yield start
    dist.destroy_process_group()


def _shapes(model):
    parameters = list(model.parameters())
    return scaling.Shapes(
        [parameter.shape for parameter in parameters if not parameter.requires_grad],
        [parameter.shape for parameter in parameters if parameter.requires_grad],
        [],
        0,
        sum(buffer.nbytes for buffer in model.buffers()),
    )


@pytest.mark.parametrize("size", [3, 8])
def test_fsdp2_holds_and_sends_what_is_computed(ranks, size):
    model = adapted(num_clusters=6).train()
    shapes = _shapes(model)
    short = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)  # as accelerate's mixed_precision="bf16" has it
    mesh = init_device_mesh("cpu", (ranks(size),))
    for part in (*model.base_model.model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=short, reshard_after_forward=True)
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    for trained, own in ((False, shapes.frozen), (True, shapes.trained)):
        local = [parameter.to_local() for parameter in parameters if parameter.requires_grad == trained]
        assert sum(tensor.numel() for tensor in local) == scaling.elements(own, size)
    assert size * scaling.elements(shapes.trained, size) > 1.02 * shapes.parameters
    with _Sent() as sent:
        model(**answered(4)).loss.backward()
    assert sum(sent.bytes.values()) * (size - 1) / size == scaling.wire(shapes, "FSDP2", size)
    assert set(sent.bytes) == {"_allgather_base_", "_reduce_scatter_base_"}


def test_ddp_sends_what_is_computed(ranks):
    model = adapted(num_clusters=6).train()
    shapes, size, reduced = _shapes(model), ranks(8), []

    def hook(state, bucket):
        reduced.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, hook)
    with _Sent() as sent:
        loss = parallel(**answered(4)).loss
    loss.backward()
    assert 2 * sum(reduced) * (size - 1) / size == scaling.wire(shapes, "DDP", size)
    assert sent.bytes == {"broadcast_": shapes.buffers}


def test_padding_by_rows():
    assert scaling.elements([torch.Size([4, 10]), torch.Size([32, 10]), torch.Size([1])], 64) == 10 + 10 + 1
    assert scaling.elements([torch.Size([65, 10])], 64) == 20
    assert scaling.elements([torch.Size([4, 10]), torch.Size([7])]) == 47


def test_memory_by_hand():
    shapes = scaling.Shapes([torch.Size([64, 100])], [torch.Size([4, 100])], [torch.Size([16, 100])], 3200, 0)
    assert scaling.memory(shapes, "DDP", 8) == scaling.memory(shapes, "FSDP2", 1) == 2 * 6400 + 16 * 400
    assert scaling.memory(shapes, "ZeRO-2", 8) == 2 * 6400 + 2 * 400 + 14 * 400 / 8
    assert scaling.memory(shapes, "ZeRO-3", 8) == (2 * 6400 + 16 * 400) / 8
    assert scaling.memory(shapes, "FSDP2", 8) == 2 * 800 + 16 * 100
    assert scaling.memory(shapes, "DDP, nf4 base", 8) == scaling.nf4_bytes(shapes) + 16 * 400
    # three blocks of 1600 in 6800, of which two at a time, and the rest
    assert scaling.gathered(shapes, 3) == 2 * (6800 - 1600)
    assert scaling.wire(shapes, "ZeRO-3", 4) == 0.75 * (4 * 6800 + 2 * 400)
    assert scaling.wire(shapes, "ZeRO-2", 4) == 0.75 * 4 * 400


def test_nf4_takes_the_bytes_that_bitsandbytes_does():
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(torch.ones(512, 256), quant_type="nf4", compress_statistics=True)
    size = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    shapes = scaling.Shapes([torch.Size([512, 256]), torch.Size([10])], [], [], 512 * 256, 0)
    assert scaling.nf4_bytes(shapes) == size + 20


@pytest.mark.parametrize("batches", [1, 2, 3, 7, 8, 255, 256, 257, 511, 512, 513, 1000, 1024])
def test_meetings(batches):
    assert scaling.meetings(batches) == len(list(_meet(batches)))


def _meet(batches):
    for number, ended, error in _read(range(batches), lambda number, batch: None, False):
        yield number
        if ended:
            assert (number, error) == (batches, None)
            return


def test_what_is_said_at_a_meeting_is_small():
    assert len(pickle.dumps((Progress(10**9, False, 10**12), None))) + 8 < 200


def test_bytes_of_the_sample(monkeypatch):
    width, size = 8, 4
    monkeypatch.setattr(scaling, "SAMPLE_BYTES", 4 * width * 400)
    monkeypatch.setattr(scaling, "SAMPLE_PER_CLUSTER", 1)
    assert scaling.capacity(width) == 400
    sent = []
    monkeypatch.setattr(peft_trex.fit.ranks.dist, "send", lambda tensor, *_: sent.append(tensor.nbytes))
    for rank in range(1, size):
        group, reservoir = Ranks(), Reservoir(400, width, (0, rank))
        group.size, group.rank = size, rank
        reservoir.add(np.ones((500, width), np.float32))
        assert group.gather(reservoir, [500] * size, 400) is None
    assert sum(sent) == scaling.sample_bytes(width, size)


def test_bytes_of_the_prior():
    prior = adapted(num_clusters=scaling.CLUSTERS).base_model.prior_of("default")
    assert scaling.prior_bytes(prior.dim) == sum(buffer.nbytes for buffer in prior.buffers())


@pytest.mark.skipif(BEFORE_5, reason="attention keeps other tensors there than the computation takes for granted")
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_kept_for_the_backward_pass(autocast):
    sizes = scaling.SMOKE.block
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    alone = scaling.kept(sizes, None, autocast)
    # the inputs of q, k and v, of gate and up, and of down; what attention gives to o is kept anyway
    inputs = 2 * hidden + wide
    assert scaling.kept(sizes, scaling.METHODS[TREX](), autocast) - alone == 7 * 2 * (4 + 32) + 2 * inputs
    # LoRA casts the input of each by itself
    each = 2 if autocast else 4
    assert scaling.kept(sizes, scaling.METHODS[LORA](), autocast) - alone == each * (7 * 32 + 6 * hidden + wide)


def test_rows_that_are_given_again():
    rows = np.arange(4000, dtype=np.float32).reshape(2000, 2)
    given = scaling.Repeated(rows, 4500)
    parts = [given[start : start + 1000] for start in range(0, given.shape[0], 1000)]
    assert [len(part) for part in parts] == [1000, 1000, 1000, 1000, 500]
    assert np.array_equal(np.concatenate(parts), np.concatenate([rows, rows, rows[:500]]))


def test_groups_are_as_uneven_as_asked():
    points = scaling.groups(4000, 64, 2, noise=0.01, uneven=2.0)
    first = np.linalg.norm(points - points[0], axis=1) < 1
    assert {round(first.mean(), 1), round(1 - first.mean(), 1)} == {0.8, 0.2}


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (7100, "118 min"), (7200, "2 h")])
def test_durations(seconds, words):
    assert scaling._duration(seconds) == words


def _between(path, markers):
    return path.read_text().split(markers[0])[1].split(markers[1])[0]


def _headings(text):
    """Titles of the sections and first columns of the tables, without numbers, which differ."""
    lines = [line for line in text.splitlines() if line.startswith(("**", "| "))]
    return [line.split("**" if line.startswith("**") else "|")[1] for line in lines]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_document_holds_what_the_script_writes(tmp_path):
    doc = tmp_path / "scaling.md"
    shutil.copy(scaling.DOC, doc)
    before = _between(doc, scaling.MEASURED)
    doc.write_text(doc.read_text().replace("81,183,280", "0"))
    assert scaling.main(["--doc", str(doc), "--smoke"]) == 0
    assert _between(doc, scaling.COMPUTED) == _between(scaling.DOC, scaling.COMPUTED)
    assert "| 125,173,760 |" in doc.read_text() and "| 81,183,280 | 65% |" in doc.read_text()
    after = _between(doc, scaling.MEASURED)
    assert after != before
    assert [line for line in _headings(after) if line.startswith("T-REX")] == [
        line for line in _headings(before) if line.startswith("T-REX")
    ]
    assert "nan" not in after.lower() and "None" not in after


def test_a_document_without_markers_is_left_alone(tmp_path):
    doc = tmp_path / "scaling.md"
    doc.write_text("# Scaling\n")
    with pytest.raises(ValueError, match="lacks the markers"):
        scaling.main(["--doc", str(doc), "--smoke"])
    assert doc.read_text() == "# Scaling\n"
