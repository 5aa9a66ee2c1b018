"""Several processes, models that are sharded or stand on several devices: as one process on one device would."""

import functools
import multiprocessing
import os
import re
import time
from multiprocessing import forkserver
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import adapted, answered, batches, make_llama, prompts
from peft import PeftModel
from transformers import LlamaForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from peft_trex import TRexLayer, initialize_trex_prior

needs_deepspeed = pytest.mark.skipif(
    not worker.DEEPSPEED.exists(),
    reason=f"deepspeed is not in {worker.DEEPSPEED.name}/ of the virtual environment, where `make test` puts it",
)
ZERO2, ZERO3 = (pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))
LAUNCHES = {"ddp": ("ddp",), "fsdp2": ("fsdp2",), "zero2": ("zero", 2), "zero3": ("zero", 3)}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:for base_model.*which is a no-op:UserWarning"),  # PEFT, of weights on the disk
]


@functools.cache
def _processes():
    """They start from a server that has imported everything, which takes longest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_worker"])
    with pytest.MonkeyPatch.context() as patch:  # or Python up to 3.11 would not find it, and say nothing
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, Path(__file__).parents[:2])), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def launch(folder, name, *arguments, dies=False):
    """Run a function of distributed_worker in all processes; `dies` tells that the main one is to be killed."""
    folder.mkdir(exist_ok=True, parents=True)
    port = worker.free_port()
    processes = [
        _processes().Process(target=worker.enter, args=(name, rank, port, str(folder), arguments))
        for rank in range(worker.PROCESSES)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + worker.TIMEOUT
    while time.monotonic() < end and any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):  # the others would wait for it
            for process in processes:
                process.join(5)
            break
        time.sleep(0.05)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    if codes[0] == -9 if dies else codes == [0] * len(codes):
        return
    outputs = [(folder / f"output-{rank}.txt").read_text()[-5000:] for rank in range(len(codes))]
    pytest.fail(f"{name}{arguments} ended with {codes} (None: still running).\n" + "\n--- next ---\n".join(outputs))


@functools.cache
def single(variant, dtype):
    return worker.single(variant, dtype)


@functools.cache
def single_trainer(folder):
    trainer = worker.trainer_of(folder)
    trainer.train()
    return worker.losses_of(trainer)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Results of a way to train in several processes, and the folder where it saved; each runs once."""

    @functools.cache
    def run(how):
        folder = tmp_path_factory.mktemp(how)
        launch(folder, *LAUNCHES[how])
        return torch.load(folder / f"{how}.pt", weights_only=True), folder

    return run


def _tolerance(how):
    return {"atol": 1e-9, "rtol": 1e-9} if worker.DTYPES[how] == torch.float64 else {"atol": 2e-4, "rtol": 2e-4}


def _assert_all_close(found, expected, **tolerance):
    assert set(found) == set(expected) and len(found) > 50
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("variant", worker.VARIANTS)
@pytest.mark.parametrize("how", ["ddp", "fsdp2", ZERO2, ZERO3])
def test_each_step_equals_that_of_one_process(spread, how, variant):
    results = spread(how)[0][variant]
    expected = single(variant, worker.DTYPES[how])
    assert results["losses"] == pytest.approx(expected["losses"], abs=1e-4 if how.startswith("zero") else 2e-6)
    _assert_all_close(results["parameters"], expected["parameters"], **_tolerance(how))
    if "gradients" in results:
        _assert_all_close(results["gradients"], expected["gradients"], **_tolerance(how))
    layers, forwards = 14, worker.STEPS * (2 if worker.CHECKPOINTED[variant] else 1)
    assert results["fast"] == (0 if variant == "reference" else layers * forwards)


@pytest.mark.slow
@pytest.mark.parametrize("variant", worker.VARIANTS)
@pytest.mark.parametrize("how", ["ddp", "fsdp2", ZERO2, ZERO3])
def test_what_the_main_process_saves_is_the_whole_adapter(spread, how, variant):
    dtype = worker.DTYPES[how]
    model = PeftModel.from_pretrained(make_llama().to(dtype), spread(how)[1] / variant, autocast_adapter_dtype=False)
    close = {"atol": 5e-3, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(model.eval()(input_ids=prompts(3)).logits, single(variant, dtype)["logits"], **close)


@pytest.mark.slow
@pytest.mark.parametrize("variant", worker.VARIANTS)
def test_fsdp2_goes_on_from_a_checkpoint(spread, variant):
    """The checkpoint holds what is trained, and the prior: the model that it is loaded into has none."""
    expected = single(variant, torch.float64)["losses"][worker.SAVED_AFTER :]
    assert spread("fsdp2")[0][variant]["resumed"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", worker.FROZEN_LEFT_OUT)
@pytest.mark.parametrize("how", [ZERO2, ZERO3])
def test_zero_goes_on_from_a_checkpoint(spread, how, variant):
    """DeepSpeed's engine saves and loads the prior too, whether or not the frozen parameters are left out."""
    results = spread(how)[0][variant]
    assert results["resumed"] == pytest.approx(results["losses"][worker.SAVED_AFTER :], abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", ZERO2, ZERO3])
def test_killed_while_it_saves_a_sharded_model(tmp_path, how):
    launch(tmp_path / "a", "killed_sharded", how, dies=True)
    assert {"global_step1", "global_step2"} <= {path.name for path in (tmp_path / "a").iterdir()}
    launch(tmp_path / "b", "go_on_sharded", how, str(tmp_path / "a"))
    found = torch.load(tmp_path / "b" / "go_on.pt", weights_only=True)
    expected = single("learned map", worker.DTYPES[how])["losses"][1:]
    assert found["resumed"] == pytest.approx(expected, abs=2e-6 if how == "fsdp2" else 1e-4)
    # torch.load says one or the other, depending on the file's size
    refused = r"CheckpointException.*global_step2/\.metadata" if how == "fsdp2" else r"reading zip archive|OSError"
    assert re.search(refused, found["error"], re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", ZERO3])
def test_prior_of_a_sharded_model(tmp_path, how):
    launch(tmp_path, "fit_sharded", how)
    first, second = torch.load(tmp_path / "fit_sharded.pt", weights_only=True)
    for error, expected in zip(first["errors"], worker.FAILURES.values(), strict=True):
        assert error is not None and error.startswith(expected)
    assert second["errors"] == ["OSError: gone", "KeyboardInterrupt: ", "KeyboardInterrupt: "]
    assert not first["touched"] and not second["touched"]
    model = worker.build("learned map", worker.DTYPES[how], fit=False)
    initialize_trex_prior(model, [*batches(32)[:1], *batches(32)[:3]], progress=False)
    for name, tensor in model.base_model.prior_of("default").named_buffers():
        assert torch.equal(first["prior"][name], second["prior"][name])
        torch.testing.assert_close(first["prior"][name], tensor, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # of prompts that were not seen: each process scores its own
        assert first["loss"] == pytest.approx(model(**worker.batch_of(0)).loss.item(), abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", ZERO3])
def test_the_frozen_embedding_of_a_sharded_model_is_saved(tmp_path, how):
    launch(tmp_path, "trained_embedding", how)
    results = torch.load(tmp_path / "trained_embedding.pt", weights_only=True)
    other = worker.with_new_tokens(2, worker.DTYPES[how]).unload()
    loaded = PeftModel.from_pretrained(other, tmp_path / "saved", autocast_adapter_dtype=False)
    assert len(loaded.base_model.trex_prior["default"].token_ids) == worker.NEW_TOKENS
    for embeds in (worker.read_by_prior(loaded), *([results["again"]] if how == "fsdp2" else [])):
        torch.testing.assert_close(embeds, results["expected"], rtol=0, atol=0)


@pytest.mark.slow
def test_trainer_equals_one_process_and_resumes(tmp_path, tmp_path_factory):
    launch(tmp_path, "trainer")
    found = torch.load(tmp_path / "trainer.pt", weights_only=True)
    expected = single_trainer(tmp_path_factory.getbasetemp() / "single")
    assert found["losses"] == pytest.approx(expected, abs=1e-4)
    assert found["resumed"] == pytest.approx(found["losses"], abs=1e-4)
    model = PeftModel.from_pretrained(make_llama(), tmp_path / "saved")
    assert model.base_model.prior_of("default").fitted


def _complete(folder):
    """The last checkpoint whose saving came to its end: the Trainer writes trainer_state.json last."""
    checkpoints = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return max(checkpoints, key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.slow
def test_killed_while_it_saves(tmp_path, tmp_path_factory):
    launch(tmp_path, "killed", dies=True)
    damaged, complete = Path(get_last_checkpoint(tmp_path)), _complete(tmp_path)
    assert (damaged.name, complete.name) == ("checkpoint-4", "checkpoint-2")
    launch(tmp_path / "a", "resume", str(complete))
    expected = single_trainer(tmp_path_factory.getbasetemp() / "single")
    assert torch.load(tmp_path / "a" / "resume.pt", weights_only=True)["resumed"] == pytest.approx(expected, abs=1e-4)
    launch(tmp_path / "b", "resume", str(damaged))
    assert (
        f"{damaged}/adapter_model.safetensors is damaged"
        in torch.load(tmp_path / "b" / "resume.pt", weights_only=True)["error"]
    )


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_ready_configurations_are_accelerate_s(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kinds = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
    assert config.distributed_type == kinds.get(name, DistributedType.DEEPSPEED)
    assert config.num_processes == 2 and not config.use_cpu
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        fields = set(FullyShardedDataParallelPlugin.__dataclass_fields__)
        assert {key.removeprefix("fsdp_") for key in config.fsdp_config} - {"version"} <= fields
    elif name != "ddp":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


# one process, several devices


DEVICES = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "rotary_emb": "cpu"}


def _device_map(prefix="base_model.model.", **changes):
    names = {f"{prefix}model.{name}": device for name, device in {**DEVICES, **changes}.items()}
    return {**names, f"{prefix}lm_head": "disk" if prefix else "cpu"}


def _offload_to_cpu(model, folder):
    return cpu_offload(model, execution_device="cpu")


def _offload_to_disk(model, folder):
    return disk_offload(model, folder, execution_device="cpu")


def _dispatch(model, folder):
    return dispatch_model(model, _device_map(), main_device="cpu", offload_dir=folder)


def _load(model, folder, **changes):
    model.save_pretrained(folder / "adapter")
    make_llama().save_pretrained(folder / "base")
    base = LlamaForCausalLM.from_pretrained(
        folder / "base", device_map=_device_map("", **changes), offload_folder=folder
    )
    whole_map = {**_device_map(**changes), "base_model.model.lm_head": "cpu"}
    return PeftModel.from_pretrained(base, folder / "adapter", device_map=whole_map, offload_dir=folder).eval()


def _load_with_embedding_on_disk(model, folder):
    return _load(model, folder, embed_tokens="disk")


@pytest.mark.parametrize("settings", [{}, {"router_rank": 2}, {"mixture_implementation": "reference"}])
@pytest.mark.parametrize("place", [_offload_to_cpu, _offload_to_disk, _dispatch, _load, _load_with_embedding_on_disk])
def test_weights_that_are_brought_when_needed(tmp_path, place, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT takes the slash off the path of a base model's file, and writes a copy there
    ids, generation = prompts(3), {"max_new_tokens": 4, "do_sample": False}
    model = adapted(**settings)
    expected, tokens = model(input_ids=ids).logits, model.generate(ids, **generation)
    model = place(model, tmp_path)
    assert any(parameter.is_meta for name, parameter in model.named_parameters() if "trex_A" in name)
    for _ in range(2):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert torch.equal(model.generate(ids, **generation), tokens)
    assert any(parameter.is_meta for name, parameter in model.named_parameters() if "trex_A" in name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("settings", [{}, {"num_clusters": 6}, {"router_rank": 2}])
def test_layers_on_two_gpus(tmp_path, settings):
    expected = adapted(**settings).train()
    expected(**answered(4)).loss.backward()
    model = adapted(**settings)
    model.save_pretrained(tmp_path / "adapter")
    make_llama().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    places["model.rotary_emb"] = 0
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=places)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).train()
    for layer in model.modules():
        if isinstance(layer, TRexLayer):
            devices = {parameter.device for parameter in layer.parameters_of("default")}
            assert devices == {layer.get_base_layer().weight.device}
    loss = model(**{key: value.to(0) for key, value in answered(4).items()}).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {gradient.device.index for gradient in gradients.values()} == {0, 1}
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name].cpu(), parameter.grad, atol=1e-2, rtol=1e-2)
