"""The benchmarks, on tiny sizes: the runner writes what it should, and nothing where the adapter is wrong."""

import json
import time
from pathlib import Path

import pytest
import torch
from speed import cases, measure, report, run
from speed.variants import BASE, LORA, RECOMMENDED, REFERENCE, SIZES, SMALL, TREX, VARIANTS, has_reference

import peft_trex.fast.dispatch
from peft_trex.layer import Linear
from peft_trex.prior.channel import PriorChannel

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


PRECISIONS = ("fp32", "autocast-bf16-base")
ALWAYS = {"case", "variant", "settings", "size", "precision", "shape", "baseline", "rounds", "repeats", "seconds"}
ALWAYS |= {"ratio", "ratio_low", "ratio_high", "device", "threads", "load", "date", "device_name", "cpu_capability"}
ALWAYS |= {"cpus", "python", "torch", "peft", "transformers", "peft_trex"}
SOMETIMES = {"share", "share_low", "share_high", "memory_peak", "memory_total", "memory_ratio", "memory_total_ratio"}
SOMETIMES |= {"trainable", "launches", "commit", "dirty"}


def _run(out, *arguments):
    return run.main(["--device", "cpu", "--size", "smoke", "--rounds", "1", "--out", str(out), *arguments])


def _read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One run of every case."""
    out = tmp_path_factory.mktemp("benchmarks") / "new" / "cpu.jsonl"
    assert _run(out, "--precision", *PRECISIONS) == 0
    return _read(out)


def _of(rows, case, precision="fp32", **shape):
    """Rows of a case by variant."""
    shape = shape.items()
    own = [row for row in rows if (row["case"], row["precision"]) == (case, precision)]
    return {row["variant"]: row for row in own if shape <= row["shape"].items()}


def test_every_case_gives_a_row_for_every_variant(rows):
    everyone = {name for name in VARIANTS if name != REFERENCE or has_reference()}
    assert {row["case"] for row in rows} == set(cases.CASES)
    for precision in PRECISIONS:
        assert set(_of(rows, "step", precision)) == everyone
        assert set(_of(rows, "layer", precision, sweep=None)) == everyone
        assert set(_of(rows, "prior", precision)) == {TREX}
    assert set(_of(rows, "compiled")) == everyone & {TREX, REFERENCE, LORA, RECOMMENDED}
    assert set(_of(rows, "decode")) == everyone
    assert set(_of(rows, "generate")) == {TREX, RECOMMENDED, LORA, SMALL}
    assert set(_of(rows, "merge", what="merge_and_unload")) == {TREX, LORA}
    assert set(_of(rows, "merge", what="merge_adapter, unmerge_adapter")) == {TREX, LORA}
    assert set(_of(rows, "fit")) == {TREX, cases.KMEANS}
    for sweep, points in (("tokens", {1, 8}), ("experts", {8, 32}), ("width", {16, 32})):
        swept = [row for row in rows if row["case"] == "layer" and row["shape"]["sweep"] == sweep]
        assert {row["shape"][sweep] for row in swept} == points
        assert {row["variant"] for row in swept} == everyone & {TREX, REFERENCE, LORA}


def test_rows_hold_every_field(rows):
    for row in rows:
        assert set(row) == ALWAYS | SOMETIMES
        assert all(row[name] is not None for name in ALWAYS)
        assert row["seconds"] > 0 and 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert (row["share"] is not None) == (row["case"] == "prior")
        assert (row["launches"] is not None) == (row["case"] == "decode")
        assert (row["memory_ratio"] is not None) == (row["case"] in ("layer", "step", "compiled", "decode", "merge"))
        if row["variant"] == row["baseline"]:
            assert row["ratio"] == 1 and row["memory_ratio"] in (1, None)
    assert all(0 < row["share"] < 1 for row in _of(rows, "prior").values())


def test_variants_are_what_they_are_called(rows):
    size, step = SIZES["smoke"], _of(rows, "step")
    kv = size.hidden * size.kv_heads // size.heads
    linears = [(size.hidden, size.hidden)] * 2 + [(size.hidden, kv)] * 2 + [(size.hidden, size.intermediate)] * 2
    linears = [*linears, (size.intermediate, size.hidden)] * size.layers
    lora = sum(wide + out for wide, out in linears)
    trex = sum(36 * wide + 8 * out + 2 for wide, out in linears)
    recommended = sum(8 * (wide + out) + 64 * 32 + 64 + 2 for wide, out in linears)
    found = {variant: row["trainable"] for variant, row in step.items()}
    assert found[RECOMMENDED] == recommended and found["LoRA r=8"] == 8 * lora
    assert found[TREX] == trex and found[LORA] == 32 * lora and found["LoRA r=16"] == 16 * lora and found[BASE] == 0
    assert abs(found["LoRA, equal parameters"] - trex) <= lora / 2
    assert found["DoRA r=32"] == 32 * lora + sum(out for _, out in linears)
    assert abs(found["Lily"] / found[LORA] - 1) < 0.1
    if has_reference():
        assert found[REFERENCE] == trex
        assert "mixture_implementation=reference" in step[REFERENCE]["settings"]
    assert _of(rows, "decode")[LORA]["launches"] > _of(rows, "decode")[BASE]["launches"] > 50


# what is wrong, and how to make it so


def _wrong_output(output):
    return output * 1.001


def _wrong_gradient(output):
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * 1.001)
    return output


def _wrong_in_eval(output):
    return output if output.requires_grad else output * 1.001


def _wrong_in_eval_for_several_tokens(output):
    return output if output.requires_grad or output.shape[1] == 1 else output * 1.001


def _wrong_for_one_token(output):
    return output * 1.001 if output.shape[1] == 1 else output


@pytest.mark.parametrize("case", ["layer", "step", "fit"])
@pytest.mark.parametrize(
    "damage",
    [_wrong_output, _wrong_gradient, _wrong_in_eval, _wrong_in_eval_for_several_tokens, _wrong_for_one_token],
    ids=lambda damage: damage.__name__,
)
def test_a_wrong_adapter_gets_no_row(monkeypatch, tmp_path, capsys, case, damage):
    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: damage(forward(self, x)))
    out = tmp_path / "cpu.jsonl"
    assert _run(out, "--case", case, "--precision", "fp32") == 1
    said = capsys.readouterr()
    assert not out.exists()
    assert "does not equal the formula" in said.err and "is off by" in said.err
    assert " x " not in said.out  # no speed


def test_a_wrong_compiled_adapter_gets_no_row(monkeypatch, tmp_path, capsys):
    add = peft_trex.fast.dispatch.add_stacked
    monkeypatch.setattr(peft_trex.fast.dispatch, "add_stacked", lambda *arguments: add(*arguments) * 1.001)
    assert _run(tmp_path / "cpu.jsonl", "--case", "compiled", "--precision", "fp32") == 1
    assert not (tmp_path / "cpu.jsonl").exists()
    assert "compiled by aot_eager" in capsys.readouterr().err


def test_a_lost_prior_gets_no_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(PriorChannel, "scores", lambda *_: None)
    assert _run(tmp_path / "cpu.jsonl", "--case", "step", "--precision", "fp32") == 1
    assert not (tmp_path / "cpu.jsonl").exists()
    assert "is off by" in capsys.readouterr().err


def test_the_check_sees_small_errors_in_every_precision(monkeypatch, tmp_path):
    out = tmp_path / "cpu.jsonl"
    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: forward(self, x) * 1.1)
    for precision in ("autocast", "autocast-bf16-base", "bf16"):
        assert _run(out, "--case", "layer", "--precision", precision) == 1
    assert not out.exists()


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path, capsys):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return interleave(*arguments)

    interleave = run.interleave
    monkeypatch.setattr(run, "interleave", interrupted)
    out = tmp_path / "cpu.jsonl"
    out.write_text('{"from": "before"}\n')
    assert _run(out, "--case", "layer", "--precision", "fp32") == run.INTERRUPTED
    kept = _read(out)
    assert kept[0] == {"from": "before"}
    assert {row["variant"] for row in kept[1:]} >= {TREX, LORA, BASE}
    assert all(row["shape"]["sweep"] is None for row in kept[1:])
    assert "interrupted" in capsys.readouterr().err


def test_what_is_not_measured_is_said(tmp_path, capsys):
    assert _run(tmp_path / "cpu.jsonl", "--case", "decode", "--precision", "autocast") == 1
    assert "Nothing to measure" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _run(tmp_path / "cpu.jsonl", "--case", "speed")
    with pytest.raises(SystemExit):
        _run(tmp_path / "cpu.jsonl", "--rounds", "0")


# measuring


def test_jobs_take_turns_and_the_warm_up_does_not_count():
    seen = []
    jobs = {name: measure.Job(lambda name=name: seen.append(name)) for name in "abc"}
    samples = measure.interleave(jobs, "cpu", rounds=20)
    assert list(samples) == ["a", "b", "c"] and all(len(own.times) == 20 for own in samples.values())
    turns = ["".join(seen[start : start + 3]) for start in range(0, len(seen), 3)]
    assert len(turns) == 21 and all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 3  # and not always in one order


@pytest.fixture
def sleep(monkeypatch):
    """A clock that only sleeping moves: what is measured does not hang on how busy the machine is."""
    now = [0.0]

    def pass_by(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return pass_by


def test_what_prepares_a_run_is_not_timed(sleep):
    job = measure.Job(lambda: sleep(0.002), lambda: sleep(0.1), part=lambda: 0.001)
    assert measure.seconds(job, "cpu", repeats=2) == pytest.approx((0.002, 0.001))


def test_short_runs_are_repeated(sleep):
    jobs = {name: measure.Job(lambda took=took: sleep(took)) for name, took in (("a", 0.002), ("b", 1.0))}
    samples = measure.interleave(jobs, "cpu", rounds=1, at_least=0.02)
    assert (samples["a"].repeats, samples["b"].repeats) == (10, 1)
    assert samples["a"].times == pytest.approx([0.002]) and samples["b"].times == pytest.approx([1.0])


def test_ratios_are_to_the_baseline_of_the_same_round():
    own, other = measure.Samples([2.0, 6.0, 4.0], [], 1), measure.Samples([1.0, 2.0, 4.0], [], 1)
    assert run._times(own, other) == {"seconds": 4.0, "ratio": 2.0, "ratio_low": 1.0, "ratio_high": 3.0}
    big, small = (measure.Job(print, model=torch.nn.Linear(size, 1, bias=False)) for size in (100, 50))
    found = run._memory(big, 200, small, 100)
    assert found == {"memory_peak": 200, "memory_total": 600, "memory_ratio": 2.0, "memory_total_ratio": 2.0}


def test_spread():
    assert measure.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)
    assert measure.spread([2.0, 1.0]) == (1.5, 1.0, 2.0)


def test_peak_memory_is_what_lives_at_once():
    before = []

    def run_it():
        x = torch.ones(1000, 1000)
        y = x + x  # 4 + 4 MB
        del x
        before.clear()  # 4 MB that were there
        z = y.double()  # 4 + 8 - 4 MB
        z = z.sin()  # 8 more
        return y, z

    job = measure.Job(run_it, lambda: before.append(torch.zeros(1000, 1000)))
    assert measure.peak_memory(job, "cpu") == pytest.approx(16_000_000, rel=1e-3)


def test_operators_are_counted():
    x = torch.ones(3)
    assert measure.launches(measure.Job(lambda: (x + x).sum()), "cpu") == 2


def test_a_step_trains_and_its_optimizer_is_resident():
    (group,) = cases.step(cases.Setting("smoke", "fp32", "cpu"))
    job = group.jobs()[LORA]
    before = measure.resident_memory(job)
    start = [parameter.detach().clone() for parameter in job.model.parameters()]
    job.run()
    changed = [not torch.equal(old, new) for old, new in zip(start, job.model.parameters(), strict=True)]
    assert any(changed)
    assert all(parameter.requires_grad >= new for parameter, new in zip(job.model.parameters(), changed, strict=True))
    assert all(parameter.grad is None for parameter in job.model.parameters())
    adam = measure.resident_memory(job) - before
    assert adam == pytest.approx(2 * 4 * measure.trainable(job), rel=0.01)


def test_the_cache_is_as_long_at_every_measurement():
    setting = cases.Setting("smoke", "fp32", "cpu")
    (group,) = cases.decode(setting)
    job = group.jobs()[TREX]
    lengths = []
    job.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs[cases.CACHE].get_seq_length()), with_kwargs=True
    )
    measure.interleave({TREX: job}, "cpu", rounds=2, at_least=0.02)
    measure.peak_memory(job, "cpu")
    measure.launches(job, "cpu")
    assert len(lengths) > 4 and set(lengths) == {SIZES["smoke"].cached}


def test_the_priors_share_is_what_its_hooks_take(monkeypatch, sleep):
    from peft_trex.prior.scorer import PromptScorer

    score = PromptScorer.score

    def slow(*arguments, **options):
        sleep(0.05)
        return score(*arguments, **options)

    monkeypatch.setattr(PromptScorer, "score", slow)
    (group,) = cases.prior(cases.Setting("smoke", "fp32", "cpu"))
    job = group.jobs()[TREX]
    job.model.base_model.register_forward_hook(lambda *_: sleep(0.2))  # what is not the prior's
    measure.seconds(job, "cpu")
    assert measure.seconds(job, "cpu", repeats=2) == pytest.approx((0.25, 0.05))


# the report


@pytest.fixture
def written(rows, tmp_path):
    """Writes rows as if they were of the size "cpu", and the report on them: its text, and its exit status."""

    def write(*changes, keep=lambda row: True):
        kept = [{**row, "size": "cpu"} for row in rows if keep(row)]
        for row in kept:
            if row["variant"] in (TREX, RECOMMENDED):  # all goals are met
                row.update(ratio=0.9, share=row["share"] and 0.005)
                row.update({name: row[name] and 0.9 for name in ("memory_ratio", "memory_total_ratio")})
        for change in changes:
            change(kept)
        (tmp_path / "results").mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (tmp_path / "results" / "cpu.jsonl").write_text(text)
        (tmp_path / "results" / report.PAGE).write_text("old tables")
        code = report.main(["--results", str(tmp_path / "results")])
        return (tmp_path / "results" / report.PAGE).read_text(), code

    return write


def _set(case, variant=TREX, **values):
    """Change T-REX's row of a case in float32."""
    return lambda rows: _of(rows, case)[variant].update(values)


def test_report_has_tables_and_a_plot(written, tmp_path):
    text, code = written()
    assert code == 0
    assert text.startswith("# Speed\n") and "old tables" not in text and "every goal that was measured is met" in text
    for title in (
        "Training step, ",
        "Training step by torch.compile, ",
        "One new token",
        "New tokens by generate",
        "The prior's share",
        "One layer",
        "Merging",
        "Fitting a prior",
    ):
        assert f"**{title}" in text
    for sweep in ("tokens", "experts", "width"):
        assert f"by {sweep}**" in text
    assert f"| **{TREX}** | " in text and "0.90 (" in text
    assert " ms" not in text  # of a CPU only ratios
    picture = tmp_path / "results" / "sweeps.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 100_000
    assert "(sweeps.png)" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("step", ratio=1.004), "time of a training step, cpu, fp32: 1.004 x LoRA r=32; the goal is 1.00"),
        (_set("step", memory_total_ratio=1.2), "peak memory of a training step, cpu, fp32: 1.200 x LoRA r=32"),
        (
            _set("compiled", ratio=1.004),
            "time of a compiled training step, cpu, fp32: 1.004 x LoRA r=32; the goal is 1.00",
        ),
        (_set("decode", ratio=1.06), "time of one new token, cpu, fp32: 1.060 x LoRA r=32; the goal is 1.05"),
        (_set("step", RECOMMENDED, ratio=0.96), "recommended: time of a training step, cpu, fp32: 0.960 x LoRA r=32"),
        (_set("generate", RECOMMENDED, ratio=1.02), "recommended: time of new tokens, cpu, fp32: 1.020 x LoRA r=32"),
        (_set("prior", share=0.02), "the prior's share of a training step, cpu, fp32: 2.00%; the goal is 1%"),
    ],
)
def test_report_names_what_misses_its_goal(written, capsys, change, said):
    text, _ = written(change)
    assert text.count(said) == 1 and "is met" not in text
    assert said in capsys.readouterr().out and text.count("the goal is") == 1


def test_report_takes_the_latest_row(written):
    def again(rows):
        rows.append({**_of(rows, "step")[TREX], "ratio": 0.0125, "date": "2100-01-01T00:00:00+00:00"})

    # ratios that no variant can have measured
    text, _ = written(_set("step", ratio=987.5), again)
    assert "987.50 (" not in text and "is met" in text and "0.01 (" in text


def test_report_keeps_machines_apart_and_shows_times_of_gpus(written):
    def on_a_gpu(rows):
        step = _of(rows, "step")
        rows += [{**row, "device": "cuda", "device_name": "A GPU", "seconds": 0.123} for row in step.values()]

    text, _ = written(on_a_gpu)
    cpu, gpu = text.split("## A GPU")
    assert "123 ms" in gpu and " ms" not in cpu


def test_report_keeps_cpus_apart_by_what_they_are_capable_of(written):
    def on_another(rows):
        rows += [{**row, "cpu_capability": "none", "ratio": 987.5} for row in _of(rows, "step").values()]

    text, _ = written(on_another)
    first, second = text.split(" with none, ")[-2:]
    assert text.count("**Training step, ") == 2 and "987.50 (" in second and "987.50 (" not in first


def test_report_leaves_smoke_runs_out(rows, tmp_path, capsys):
    (tmp_path / "cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "no rows" in capsys.readouterr().err and not (tmp_path / report.PAGE).exists()


def test_a_damaged_row_leaves_the_report_as_it_was(written, tmp_path):
    text, _ = written()
    with (tmp_path / "results" / "cpu.jsonl").open("a") as file:
        file.write('{"case": "st')
    with pytest.raises(ValueError, match=r"cpu\.jsonl, line \d+"):
        report.main(["--results", str(tmp_path / "results")])
    assert (tmp_path / "results" / report.PAGE).read_text() == text


def test_the_report_of_a_part_is_a_part(written):
    text, code = written(keep=lambda row: row["case"] == "prior")
    assert code == 0 and "**The prior's share" in text and "sweeps.png" not in text and "**Training step" not in text


def test_what_misses_its_goal_is_in_the_report_of_the_rows_that_are_there():
    missed = report.regressions(report.load(BENCHMARKS / "results"))
    text = (BENCHMARKS / "results" / report.PAGE).read_text()
    assert [f"- {line}" for line in missed] == [line for line in text.splitlines() if "the goal is" in line]
