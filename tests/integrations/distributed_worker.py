"""What the processes of test_distributed.py run. Each function that takes a folder is one launch, and writes there."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import peft.peft_model
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from conftest import adapted, answered, batches, make_llama, prompts
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import peft_trex.fast.dispatch
from peft_trex import initialize_trex_prior

# where `make test` puts it: transformers and accelerate behave differently wherever it can be imported
DEEPSPEED = Path(sys.prefix) / "deepspeed"
PROCESSES = 2
TIMEOUT = 200  # seconds, for processes that wait for each other for ever
ROWS = 8  # of a step, in all processes together
STEPS, SAVED_AFTER = 5, 3
VARIANTS = {
    "identity map": {"num_clusters": 6},
    "learned map": {},
    "reduced router": {"router_rank": 2},
    "reference": {"mixture_implementation": "reference"},
    "router losses": {"router_top_k": 4, "router_z_loss_coef": 0.1},
}
CHECKPOINTED = {
    "identity map": False,
    "learned map": True,
    "reduced router": False,
    "reference": True,
    "router losses": False,
}
FROZEN_LEFT_OUT = {"identity map": False, "learned map": True}  # of ZeRO's checkpoints, as the Trainer does
# ZeRO has no float64, in which rounding hides nothing
DTYPES = {"ddp": torch.float64, "fsdp2": torch.float64, "zero2": torch.float32, "zero3": torch.float32}


def import_deepspeed():
    if str(DEEPSPEED) not in sys.path:
        sys.path.append(str(DEEPSPEED))
    import deepspeed

    # its all-reduce through shared memory would be compiled first, and a build that is killed leaves a lock for ever
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def enter(name, rank, port, folder, arguments):
    """A process's start: the environment that torchrun sets, and output to a file."""
    with open(Path(folder) / f"output-{rank}.txt", "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ.update({key: str(value) for key, value in {**ranks, "MASTER_PORT": port}.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1")
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * TIMEOUT)
    globals()[name](Path(folder), *arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def keep(results, folder, name):
    if dist.get_rank() == 0:
        torch.save(results, folder / f"{name}.pt")


# one training, however it is spread


def build(variant, dtype, checkpointing=False, fit=True, reentrant=False):
    torch.manual_seed(0)
    model = adapted(base=make_llama().to(dtype), fit=False, **VARIANTS[variant]).train()
    if fit:  # not by initialize_trex_prior, which would share the prompts out
        prior = model.base_model.prior_of("default")
        generator = torch.Generator().manual_seed(0)
        like = (prior.centroids, prior.mean, prior.mean_scores)
        prior.set(*(torch.randn(tensor.shape, generator=generator) for tensor in like))
    model.config.use_cache = False
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.get_base_model().enable_input_require_grads()
    return model


def check_same_prior(model, other):
    """Bit for bit, and what training does not look at (the mean scores) too."""
    found, expected = (dict(each.base_model.prior_of("default").named_buffers()) for each in (model, other))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_of(model):
    return torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.1)


def batch_of(step):
    """This process's rows of a step."""
    batch = answered(ROWS, seed=100 + step)
    if not dist.is_initialized():
        return batch
    part = ROWS // PROCESSES
    return {key: value[part * dist.get_rank() :][:part] for key, value in batch.items()}


def mean_over_processes(loss):
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= PROCESSES
    return loss.item()


def train(model, optimizer, first=0, last=STEPS):
    """The steps' losses; DeepSpeed's engine holds its optimizer itself, and None stands for it."""
    losses = []
    for step in range(first, last):
        loss = model(**batch_of(step)).loss
        if optimizer is None:
            model.backward(loss)
            model.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(mean_over_processes(loss))
    return losses


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def outcome(model, losses):
    parameters = trained(model)
    return {
        "losses": losses,
        "parameters": {name: whole(parameter) for name, parameter in parameters.items()},
        "gradients": {name: whole(parameter.grad) for name, parameter in parameters.items()},
    }


def single(variant, dtype):
    """In one process, without checkpointing: losses, the last step's gradients, parameters and logits after it."""
    model = build(variant, dtype)
    results = outcome(model, train(model, optimizer_of(model)))
    return {**results, "logits": model.eval()(input_ids=prompts(3)).logits.detach()}


class Counted:
    """The fast path of the mixture, counting its calls."""

    def __init__(self):
        self.calls, self.function = 0, peft_trex.fast.dispatch.add_fused

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)

    def __enter__(self):
        peft_trex.fast.dispatch.add_fused = self
        return self

    def __exit__(self, *_):
        peft_trex.fast.dispatch.add_fused = self.function


# DDP


def ddp(folder):
    dist.init_process_group("gloo")
    results = {}
    for variant, checkpointing in CHECKPOINTED.items():
        # DDP copies the prior of the main process to the others
        model = build(variant, DTYPES["ddp"], checkpointing, fit=dist.get_rank() == 0)
        with Counted() as fast:
            losses = train(DistributedDataParallel(model), optimizer_of(model))
        results[variant] = {**outcome(model, losses), "fast": fast.calls}
        if dist.get_rank() == 0:
            model.save_pretrained(folder / variant)
    keep(results, folder, "ddp")


# FSDP2

ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)
ADAPTER = StateDictOptions(ignore_frozen_params=True, strict=False)


def shard(model, embedding="root"):
    """As torch's tutorials do, with the embedding in the root's group, or as accelerate does."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    base = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    if embedding == "apart":
        fully_shard(base.model.embed_tokens, mesh=mesh)
    elif embedding == "with the head":
        fully_shard([base.model.norm, base.model.embed_tokens, base.lm_head], mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_sharded(model)
    return model


def check_sharded(model):
    """That this process holds no more than its part of each parameter, by FSDP2 or by ZeRO-3."""
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            assert parameter.ds_tensor.numel() <= -(-parameter.ds_numel // PROCESSES)
            assert parameter.numel() == 0
        else:
            assert isinstance(parameter, DTensor)
            assert parameter.to_local().shape[0] <= -(-parameter.shape[0] // PROCESSES)


def fsdp2(folder):
    dist.init_process_group("gloo")
    results = {}
    groups = {"learned map": "apart", "reduced router": "with the head"}
    for variant, checkpointing in CHECKPOINTED.items():
        model = shard(build(variant, DTYPES["fsdp2"], checkpointing), groups.get(variant, "root"))
        optimizer = optimizer_of(model)
        with Counted() as fast:
            losses = train(model, optimizer, last=SAVED_AFTER)
            states = _states(model, optimizer)
            assert not any("embed_tokens" in name for name in states["model"])
            dcp.save(states, checkpoint_id=folder / f"{variant}, middle")
            losses += train(model, optimizer, first=SAVED_AFTER)
        results[variant] = {**outcome(model, losses), "fast": fast.calls}
        state = get_model_state_dict(model, options=ON_MAIN)
        if dist.get_rank() == 0:
            model.save_pretrained(folder / variant, state_dict=state)
        again = shard(build(variant, DTYPES["fsdp2"], checkpointing, fit=False))
        optimizer = optimizer_of(again)
        _load(again, optimizer, folder / f"{variant}, middle")
        check_same_prior(again, model)
        results[variant]["resumed"] = train(again, optimizer, first=SAVED_AFTER)
    keep(results, folder, "fsdp2")


def _states(model, optimizer):
    return {
        "model": get_model_state_dict(model, options=ADAPTER),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def _load(model, optimizer, checkpoint):
    states = _states(model, optimizer)
    dcp.load(states, checkpoint_id=checkpoint)
    set_model_state_dict(model, states["model"], options=ADAPTER)
    set_optimizer_state_dict(model, optimizer, states["optimizer"])


# ZeRO


def zero_settings(stage):
    return {
        "train_micro_batch_size_per_gpu": ROWS // PROCESSES,
        "gradient_clipping": 0.0,  # by default it is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,  # or small parameters, all of these, would not be sharded
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def engine_of(model, stage):
    engine, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer_of(model), config=zero_settings(stage))
    return engine


def zero(folder, stage):
    """With DeepSpeed's own engine, and its own checkpoints."""
    import_deepspeed().init_distributed("gloo")
    results = {}
    for variant, checkpointing in CHECKPOINTED.items():
        model = build(variant, DTYPES[f"zero{stage}"], checkpointing, reentrant=True)
        engine = engine_of(model, stage)
        with Counted() as fast:
            losses = train(engine, None, last=SAVED_AFTER)
            if variant in FROZEN_LEFT_OUT:
                middle, left_out = str(folder / f"{variant}, middle"), FROZEN_LEFT_OUT[variant]
                engine.save_checkpoint(middle, exclude_frozen_parameters=left_out)
            losses += train(engine, None, first=SAVED_AFTER)
        if stage == 3:
            check_sharded(model)
        state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
        if dist.get_rank() == 0:
            parameters = {name: state[name].clone() for name in trained(model)}
            results[variant] = {"losses": losses, "parameters": parameters, "fast": fast.calls}
            model.save_pretrained(folder / variant, state_dict=state)
        engine.destroy()
        if variant in FROZEN_LEFT_OUT:
            again = engine_of(build(variant, DTYPES[f"zero{stage}"], checkpointing, fit=False, reentrant=True), stage)
            again.load_checkpoint(middle, load_module_strict=not left_out)
            check_same_prior(again.module, model)
            resumed = train(again, None, first=SAVED_AFTER)
            again.destroy()
            if dist.get_rank() == 0:
                results[variant]["resumed"] = resumed
    keep(results, folder, f"zero{stage}")


# an embedding that is trained beside the adapter, and a frozen one that the prior reads


NEW_TOKENS = 4


def with_new_tokens(seed, dtype):
    """An adapter on a base model whose last tokens have rows that the seed draws."""
    base = make_llama()
    torch.manual_seed(seed)
    base.resize_token_embeddings(base.vocab_size + NEW_TOKENS, mean_resizing=False)
    return adapted(base=base.to(dtype), fit=False, modules_to_save=["embed_tokens", "lm_head"]).train()


def read_by_prior(model):
    """What the prior of an adapter reads for the last tokens and some others."""
    scorer = model.base_model.prompts.scorer
    with scorer.whole_embedding():
        return scorer.embed({"input_ids": torch.arange(50, make_llama().vocab_size + NEW_TOKENS)[:, None]})[0]


def trained_embedding(folder, how):
    """It is sharded, trained, and saved by the main process; with FSDP2 also by all processes, and loaded again."""
    meet(how)
    model = with_new_tokens(1, DTYPES[how])
    expected = read_by_prior(model)
    if how == "fsdp2":
        runs = shard(model)
        train(runs, optimizer_of(runs), last=1)
        state = get_model_state_dict(model, options=ON_MAIN)
    else:
        runs = engine_of(model, 3)
        train(runs, None, last=1)
        state = runs._zero3_consolidated_16bit_state_dict()
    assert torch.equal(read_by_prior(model), expected)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "saved", state_dict=state, save_embedding_layers=False)
        # The frozen embedding cannot be had by one process alone, which must not wait for the others.
        state = {name: tensor for name, tensor in state.items() if "original_module" not in name}
        with pytest.warns(UserWarning, match="frozen token embedding, which the prior reads, is not in the state"):
            model.save_pretrained(folder / "left out", state_dict=state, save_embedding_layers=False)
    results = {"expected": expected}
    if how == "fsdp2":
        dcp.save(get_peft_model_state_dict(model, save_embedding_layers=False), checkpoint_id=folder / "shards")
        again = shard(with_new_tokens(2, DTYPES[how]))
        assert not torch.equal(read_by_prior(again), expected)
        state = get_peft_model_state_dict(again, save_embedding_layers=False)
        dcp.load(state, checkpoint_id=folder / "shards")
        set_peft_model_state_dict(again, state)
        results["again"] = read_by_prior(again)
        train(again, optimizer_of(again), last=1)
    keep(results, folder, "trained_embedding")


# sharded, and killed


def meet(how):
    if how == "fsdp2":
        dist.init_process_group("gloo")
    else:
        import_deepspeed().init_distributed("gloo")


def start(how, fit=True):
    """A sharded model and its optimizer, which in ZeRO is the engine's: what `train` takes."""
    model = build("learned map", DTYPES[how], fit=fit)
    if how != "fsdp2":
        return engine_of(model, int(how[-1])), None
    model = shard(model, embedding="apart")
    return model, optimizer_of(model)


def kill_halfway(path):
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(write, times):
    """`write(what, path)`, but in the last of so many calls half a file is written, and the process killed."""
    written = []

    def cut_short(what, path, **kwargs):
        write(what, path, **kwargs)
        written.append(path)
        if len(written) == times:
            kill_halfway(path)

    return cut_short


class CutShort(dcp.FileSystemWriter):
    """The main process is killed before it writes what it writes last, the metadata."""

    def finish(self, metadata, results):
        kill_halfway(self.path / "__0_0.distcp")


def killed_sharded(folder, how):
    """The main process is killed while it writes the second checkpoint, after the second step."""
    meet(how)
    runs, optimizer = start(how)
    train(runs, optimizer, last=1)
    if how == "fsdp2":
        dcp.save(_states(runs, optimizer), checkpoint_id=folder / "global_step1")
        train(runs, optimizer, first=1, last=2)
        dcp.save(_states(runs, optimizer), storage_writer=CutShort(folder / "global_step2"))
    else:
        runs.save_checkpoint(str(folder))
        train(runs, optimizer, first=1, last=2)
        if dist.get_rank() == 0:  # in the model's file, or in the optimizer's, the second
            torch.save = killed_after(torch.save, {"zero2": 1, "zero3": 2}[how])
        runs.save_checkpoint(str(folder))


def go_on_sharded(folder, how, checkpoints):
    """From the last complete checkpoint, with a prior that is not fitted; and what the damaged one says then."""
    meet(how)
    runs, optimizer = start(how, fit=False)
    if how == "fsdp2":
        _load(runs, optimizer, Path(checkpoints) / "global_step1")
    else:  # the last that is complete, by itself
        assert runs.load_checkpoint(checkpoints)[0]
    results = {"resumed": train(runs, optimizer, first=1)}
    runs, optimizer = start(how, fit=False)
    try:
        if how == "fsdp2":
            _load(runs, optimizer, Path(checkpoints) / "global_step2")
        else:
            runs.load_checkpoint(checkpoints, tag="global_step2")
    except BaseException as error:  # as torch's CheckpointException is one
        results["error"] = f"{type(error).__name__}: {error}"
    keep(results, folder, "go_on")


# the prior of a model that is sharded already


FAILURES = {  # of the second process, and what the first then says
    "reads": "RuntimeError: Rank 1 failed, so no rank went on. There: OSError: gone",
    "waits": "RuntimeError: Another rank left",  # for what the first has clustered
    "has it": "RuntimeError: Another rank left",
}


def fit_and_fail(model, data, when):
    """What is raised where the second process fails."""

    def cut_off():
        yield from data
        raise OSError("gone")

    def receive(*args):
        if when == "has it":
            broadcast(*args)
        raise KeyboardInterrupt

    broadcast = dist.broadcast_object_list
    if dist.get_rank() == 1 and when != "reads":
        dist.broadcast_object_list = receive
    try:
        initialize_trex_prior(model, cut_off() if dist.get_rank() == 1 and when == "reads" else data, progress=False)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.broadcast_object_list = broadcast


def fit_sharded(folder, how):
    """Each process has another number of batches; first of all one of them fails."""
    meet(how)
    runs, _ = start(how, fit=False)
    model = runs if how == "fsdp2" else runs.module
    prior = model.base_model.prior_of("default")
    data = batches(32)[: 1 + 2 * dist.get_rank()]
    results = {"errors": [fit_and_fail(model, data, when) for when in FAILURES]}
    results["touched"] = prior.fitted or any(tensor.any().item() for tensor in prior.buffers())
    check_sharded(model)
    initialize_trex_prior(model, data, progress=False)
    check_sharded(model)
    results["prior"] = {name: tensor.clone() for name, tensor in prior.named_buffers()}
    results["loss"] = mean_over_processes(runs(**batch_of(0)).loss)
    everywhere = [None] * PROCESSES
    dist.all_gather_object(everywhere, results)
    keep(everywhere, folder, "fit_sharded")


# transformers' Trainer


class InOrder(Trainer):
    """One process sees in a step what several see together."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(folder, fit=True):
    """Trains STEPS steps and saves after the second and the fourth."""
    AcceleratorState._reset_state(True)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    data = answered(ROWS * STEPS, seed=5)
    return InOrder(
        model=build("learned map", torch.float32, fit=fit),
        args=TrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=ROWS // int(os.environ.get("WORLD_SIZE", 1)),
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=2,
            use_cpu=True,  # with which accelerate leaves DeepSpeed out, without a word; so it is not tried here
            report_to=[],
            disable_tqdm=True,
            ddp_find_unused_parameters=False,  # the default, True for a PeftModel, would let them pass
        ),
        train_dataset=[{key: value[row] for key, value in data.items()} for row in range(ROWS * STEPS)],
    )


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer(folder):
    """Train without a break; and from the middle, with a model whose prior is not fitted."""
    unbroken = trainer_of(folder / "unbroken")
    unbroken.train()
    assert isinstance(unbroken.model_wrapped, DistributedDataParallel)
    unbroken.save_model(folder / "saved")
    resumed = trainer_of(folder / "resumed", fit=False)
    resumed.train(resume_from_checkpoint=str(folder / "unbroken" / "checkpoint-2"))
    keep({"losses": losses_of(unbroken), "resumed": losses_of(resumed)}, folder, "trainer")


def killed(folder):
    """The main process is killed while it writes its second checkpoint."""
    peft.peft_model.safe_save_file = killed_after(peft.peft_model.safe_save_file, 2)
    trainer_of(folder).train()


def resume(folder, checkpoint):
    """Go on from a checkpoint, and say how that went."""
    resumed = trainer_of(folder, fit=False)
    try:
        resumed.train(resume_from_checkpoint=checkpoint)
        keep({"resumed": losses_of(resumed)}, folder, "resume")
    except ValueError as error:
        keep({"error": str(error)}, folder, "resume")
