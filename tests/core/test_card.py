"""The model card: a filled table instead of a template, and nothing of what others have written is lost."""

import re

import pytest
from conftest import adapted, answered, batches
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer, TrainingArguments

from peft_trex import TRexPriorCallback, calibrate_trex_merge, describe_trex
from peft_trex.card import MISSING, without_empty_sections

TEMPLATE = ModelCard.from_template(ModelCardData()).text


def card_of(model, folder):
    model.save_pretrained(folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def table_of(card):
    return dict(re.findall(r"^\| ([A-Z][a-z ]+) \| (.+) \|$", card, re.M))


def test_the_table_is_filled(tmp_path):
    model = adapted(prior_whitening="auto", router_rank=2)
    describe_trex(model, tasks=["sums", "dates"], learning_rate=0.003)
    card = card_of(model, tmp_path)
    parameters = sum(p.numel() for name, p in model.named_parameters() if "trex_" in name)
    table = table_of(card)
    assert table["Experts"] == "2 x 3 in each of 14 layers"
    assert table["Token router"] == "of rank 2"
    assert table["Clusters"] == "4, fitted, by the prompt"
    assert table["Parameters"] == f"{parameters:,}"
    assert table["Calibrated"].startswith("no")
    assert (table["Tasks"], table["Learning rate"]) == ("sums, dates", "0.003")
    assert "Merged" not in table
    assert MISSING not in card and "## Uses" not in card and "## Model Card Contact" not in card
    assert "### Framework versions" in card
    assert "`KeyError: 'TREX'`" in card and "`pip install peft-trex`" in card


def test_what_a_calibration_found_is_in_the_card_until_it_is_dropped(tmp_path):
    model = adapted()
    report = calibrate_trex_merge(model, batches(), per_cluster=True, fit="core", progress=False)
    table = table_of(card_of(model, tmp_path))
    assert table["Calibrated"] == "for all prompts and for each of 4 clusters, by the fit to core in 14 layers"
    assert f"misses {report.error:.2%} of what the adapter adds" in table["Merged"]
    assert f"for each cluster misses {report.cluster_error:.2%}" in table["Merged"]
    calibrate_trex_merge(model, batches(), fit="input", progress=False)
    assert table_of(card_of(model, tmp_path))["Calibrated"] == "for all prompts, by the fit to input in 14 layers"
    report = calibrate_trex_merge(model, batches(), fit="leading", progress=False)
    assert set(report.fits.values()) == {"leading"}
    assert table_of(card_of(model, tmp_path))["Calibrated"] == "for all prompts, by the fit to leading in 14 layers"
    # A file that is loaded has static weights of its own: nobody knows what they miss, nor which wide fit they had.
    model.load_adapter(tmp_path, "default")
    table = table_of(card_of(model, tmp_path))
    assert "Merged" not in table
    assert table["Calibrated"] == "for all prompts, by the fit to input or leading in 14 layers"
    model.base_model.forget_static("default")
    assert table_of(card_of(model, tmp_path))["Calibrated"].startswith("no")


def test_an_adapter_of_the_same_name_has_notes_of_its_own(tmp_path):
    model = adapted()
    config = model.peft_config["default"]
    describe_trex(model, tasks=["sums"])
    model.add_adapter("second", config)
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    assert "Tasks" not in table_of(card_of(model, tmp_path))


def test_the_callback_notes_the_learning_rate(tmp_path):
    model = adapted(fit=False)
    rows = [{key: value[index] for key, value in answered(8).items()} for index in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), learning_rate=0.0125, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    callback = TRexPriorCallback(progress=False)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    assert table_of(card_of(model, tmp_path))["Learning rate"] == "0.0125"


def test_a_card_is_written_anew_in_its_place(tmp_path):
    model = adapted()
    first = card_of(model, tmp_path)
    (tmp_path / "README.md").write_text(first + "\n## My notes\n\nkept\n")
    describe_trex(model, tasks=["sums"])
    second = card_of(model, tmp_path)
    assert second.count("## Loading this adapter") == 1
    assert second.index("| Tasks | sums |") < second.index("## Loading this adapter") < second.index("## My notes")
    assert second.endswith("## My notes\n\nkept")
    assert card_of(model, tmp_path) == second


def test_what_somebody_wrote_into_the_template_stays(tmp_path):
    text = TEMPLATE.replace("- **Developed by:** [More Information Needed]", "- **Developed by:** Ada")
    text = text.replace("### Results\n\n[More Information Needed]", "### Results\n\n91 %")
    short = without_empty_sections(text)
    headings = [line for line in short.splitlines() if line.startswith("#")]
    assert headings == [
        "# Model Card for Model ID",
        "## Model Details",
        "### Model Description",
        "## Evaluation",
        "### Results",
    ]
    assert "- **Developed by:** Ada" in short and "91 %" in short
    assert MISSING not in short and "<!--" not in short


def test_code_in_a_card_is_no_heading():
    text = f"# Mine\n\n```python\n# a comment\n```\n\n## Empty\n\n{MISSING}\n"
    assert without_empty_sections(text).splitlines()[:5] == ["# Mine", "", "```python", "# a comment", "```"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tasks": "sums"}, TypeError),
        ({"learning_rate": -1.0}, ValueError),
        ({"adapter_name": "absent"}, ValueError),
    ],
)
def test_notes_are_checked(options, error):
    with pytest.raises(error, match=next(iter(options)) if "adapter_name" not in options else "no adapter"):
        describe_trex(adapted(fit=False), **options)
