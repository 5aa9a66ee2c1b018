"""A process that is killed while it saves or exports leaves nothing that is in the way of the next one.

The processes are real ones and die by SIGKILL, at moments that are counted in their own file operations: so each run
kills at the same places, on a fast machine and on a slow one.
"""

import fcntl
import os
import signal
import sys

import pytest
import torch
from conftest import adapted, batches, make_llama, prompts
from peft import PeftModel
from processes import in_child
from safetensors.torch import load_file

from peft_trex import SemanticRouter, calibrate_trex_merge, save_trex_as_lora

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir", "os.scandir"}


def file_operations(folder, work, last=None):
    """Do the work in a process that is killed at one of its operations on files in a folder; their number before."""

    def counting():
        counted = [0]

        def count(event, arguments):
            if event in EVENTS and any(str(folder) in str(argument) for argument in arguments):
                counted[0] += 1
                if counted[0] == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()
        return counted[0]

    number, _, status = in_child(counting)
    assert status == (0 if last is None else -signal.SIGKILL)
    return number


@pytest.fixture(scope="module")
def model():
    model = adapted()
    calibrate_trex_merge(model, batches(), per_cluster=True, progress=False)
    return model


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("there", [False, True])
def test_a_killed_export_blocks_nothing(tmp_path, model, there):
    save_trex_as_lora(model, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    if there:
        (tmp_path / "counted").mkdir()
    total = file_operations(tmp_path / "counted", lambda: save_trex_as_lora(model, tmp_path / "counted"))
    assert total > 20
    out = tmp_path / "out"
    for number in range(1 + there, total + 1, 2):
        if there:
            out.mkdir()
        file_operations(out, lambda: save_trex_as_lora(model, out), last=number)
        left = files(out) if out.exists() else set()
        assert "adapter_config.json" not in left or whole <= left, "what is half there passes for an adapter"
        if whole <= left:
            # All had moved but the empty folder of work, so this is an export like any other.
            with pytest.raises(FileExistsError):
                save_trex_as_lora(model, out)
            assert files(out) == whole
        else:
            save_trex_as_lora(model, out)
            assert files(out) == whole
            expected = load_file(tmp_path / "whole" / "cluster_02" / "adapter_model.safetensors")
            tensors = load_file(out / "cluster_02" / "adapter_model.safetensors")
            assert all(torch.equal(tensors[key], expected[key]) for key in expected)
        SemanticRouter.from_pretrained(out)
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()


def test_files_of_somebody_are_not_taken_for_what_a_killed_export_left(tmp_path, model):
    """Only what the list in its folder names is removed, and nothing while the exporting process lives."""
    out, outside = tmp_path / "out", tmp_path / "kept"
    outside.write_text("mine")
    (out / ".part-1").mkdir(parents=True)
    (out / ".part-1" / "moving.json").write_text('["router.json", "../kept", "adapter_config.json"]')
    (out / "router.json").write_text("half")
    (out / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="something at"):
        save_trex_as_lora(model, out)
    assert files(out) == {"notes"} and outside.read_text() == "mine"
    (out / "notes").unlink()
    (out / ".part-2").mkdir()
    descriptor = os.open(out / ".part-2", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _, _, status = in_child(lambda: save_trex_as_lora(model, out))
    assert status == 1 and files(out) == {".part-2"}
    os.close(descriptor)
    save_trex_as_lora(model, out)
    assert "adapter_config.json" in files(out)


def test_a_killed_save_blocks_nothing(tmp_path, model):
    out, ids = tmp_path / "out", prompts(2)
    expected = model(ids).logits
    total = file_operations(out, lambda: model.save_pretrained(out))
    assert total >= 5
    for number in range(1, total + 1):
        file_operations(out, lambda: model.save_pretrained(out), last=number)
        model.save_pretrained(out)
        assert "import peft_trex" in (out / "README.md").read_text()
        loaded = PeftModel.from_pretrained(make_llama(), out)
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0)
