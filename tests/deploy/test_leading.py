"""fit="leading": static weights that read A x and the leading directions of x, found by a sketch."""

import pytest
import torch
from conftest import batches, exact_model

from peft_trex import TRexLayer, calibrate_trex_merge
from peft_trex.deploy import shared
from peft_trex.deploy.shared import InputSums, leading


def _layers(model):
    return {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, TRexLayer)}


def _statics(model):
    return {name: layer.trex_static["default"].clone() for name, layer in _layers(model).items()}


def _sketched(x, directions):
    sums = InputSums(1, directions=directions)
    for part in x.split(100):
        sums.read(
            "layer", part, part, torch.ones(len(part), dtype=torch.bool), torch.zeros(len(part), dtype=torch.long)
        )
    sums.close()
    return sums.sketch_of("layer")


def test_a_sketch_finds_the_directions_that_hold_the_inputs():
    generator = torch.Generator().manual_seed(0)
    few, mix = torch.randn(4, 32, generator=generator), torch.randn(600, 4, generator=generator)
    A = torch.randn(2, 32, generator=generator)
    x = mix @ few
    basis = leading(_sketched(x, 6), A)
    assert basis.shape == (8, 32)
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64))
    for rows in (x, A):
        assert (rows - rows.double() @ basis.T @ basis).abs().max() < 1e-4 * rows.abs().max()
    # Of inputs that vary everywhere, it holds most of the four strongest directions.
    noisy = x + 0.3 * torch.randn(600, 32, generator=generator)
    basis = leading(_sketched(noisy, 6), A)
    assert (x.double() @ basis.T).square().sum() > 0.95 * x.square().sum()


@pytest.mark.parametrize("per_cluster", [False, True])
def test_all_directions_make_the_fit_to_all_of_the_input(monkeypatch, per_cluster):
    monkeypatch.setattr(shared, "DIRECTIONS", (48,))
    model, found = exact_model(), {}
    for fit in ("input", "leading"):
        report = calibrate_trex_merge(model, batches(64), fit=fit, per_cluster=per_cluster, progress=False)
        assert set(report.fits.values()) == {fit}
        found[fit] = _statics(model), report.error, report.cluster_error
    torch.testing.assert_close(found["leading"][0], found["input"][0], rtol=1e-5, atol=1e-6)
    errors = [[value for value in found[fit][1:] if value is not None] for fit in ("leading", "input")]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def _measured(model, data):
    """What the static weights miss of each layer's output, by running the model."""
    missed = {name: [0.0, 0.0] for name in _layers(model)}

    def watch(name):
        def hook(layer, args, output):
            down, up = layer.static_factors("default")
            added = output - layer.base_layer(args[0])
            missed[name][0] += (added - args[0] @ (up @ down).double().T).square().sum().item()
            missed[name][1] += added.square().sum().item()

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in _layers(model).items()]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: part / whole for name, (part, whole) in missed.items()}


def test_auto_takes_it_for_inputs_that_are_too_wide_for_the_tokens(monkeypatch):
    monkeypatch.setattr(shared, "DIRECTIONS", (99999, 6))
    model, errors = exact_model(), {}
    for fit in ("core", "input"):
        errors[fit] = calibrate_trex_merge(model, batches(), fit=fit, progress=False).layers
    # 288 tokens are more than ten for each of 6 + 2 directions, and fewer than twenty for each of 32 entries.
    report = calibrate_trex_merge(model, batches(), memory_gb=0.01, progress=False)
    assert set(report.fits.values()) == {"leading"} and "(leading, 288 tokens)" in str(report)
    assert report.layers == pytest.approx(_measured(model, batches()), rel=1e-4)
    for name, error in report.layers.items():
        assert errors["input"][name] < error < errors["core"][name]
    # What can be read once is read once, and 72 tokens are too few.
    for data in (iter(batches()), batches(8)):
        assert set(calibrate_trex_merge(model, data, progress=False).fits.values()) == {"core"}
