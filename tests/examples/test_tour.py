"""The notebook, from its first cell to its last, on a tiny model."""

from pathlib import Path

import pytest
from conftest import make_llama
from texts import make_chat_tokenizer

TOUR = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"


def read():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(TOUR, as_version=4)


def test_the_notebook_is_small_and_holds_no_outputs():
    cells = read().cells
    assert len(cells) <= 15
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert [cell.metadata.get("tags") for cell in cells if cell.cell_type == "code"].count(["parameters"]) == 1


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    tokenizer = make_chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    base = make_llama(vocab_size=len(tokenizer), eos_token_id=2, max_position_embeddings=256)
    base.save_pretrained(tmp_path / "base")
    notebook = read()
    [parameters] = [cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"]]
    model, out = str(tmp_path / "base"), str(tmp_path / "out")
    parameters.source = f"model_name, out = {model!r}, {out!r}\nsteps, train_rows, test_rows = 3, 8, 2"
    place = {"metadata": {"path": str(TOUR.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, startup_timeout=300, resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    assert "misses" in printed and "cluster_" in printed
    assert (tmp_path / "out" / "lora" / "router.json").exists()
