"""Base layers whose weight is not a plain floating-point tensor.

An adapter adds its output to that of any base layer. Only a merge reads and writes the weight, and the table `SCHEMES`
says how, or why it cannot be done. It goes by the names of classes, so no quantisation library is imported to ask.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

# An 8-bit float has its scale elsewhere, so it is not plain.
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# This attribute of bitsandbytes' Linear4bit lets it pack its weight for a CPU.
PACKING = "support_avx512bf16_for_cpu"
ADVICE = "Use the adapter unmerged, or merge it into the base model loaded without quantisation."
CALIBRATED = "its weight was fitted to calibration data, and cannot be quantised anew without them"
ONE_WAY = "its library offers no way to quantise the sum anew"


class Scheme(NamedTuple):
    """A kind of quantised layer, and how its weight is read as a float tensor (D_out, D_in) and written."""

    name: str
    read: Any = None  # a function of the layer
    write: Any = None  # a function of the layer and the weight
    fields: tuple[str, ...] = ("weight",)  # the layer's attributes that `write` sets
    obstacle: str = ""  # why there are no functions


def _read_4bit(layer: Any) -> Tensor:
    if layer.weight.quant_state is None:
        raise ValueError("A Linear4bit is not quantised yet, which it is once moved to a device: model.to(device).")
    return dequantize_bnb_weight(layer.weight)


def _write_4bit(layer: Any, weight: Tensor) -> None:
    old = layer.weight
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    settings = {name: getattr(old, name) for name in names}
    # The move to a device quantises the weight, and sets the layer's quant_state.
    layer.weight = type(old)(weight.cpu(), requires_grad=False, module=layer, **settings).to(old.device)


def _read_8bit(layer: Any) -> Tensor:
    weight = layer.weight
    return weight.data if weight.is_floating_point() else dequantize_bnb_weight(weight, state=layer.state)


def _write_8bit(layer: Any, weight: Tensor) -> None:
    old = layer.weight
    # The first forward moves the scales to the layer's state.
    if old.SCB is None and not old.has_fp16_weights:
        old.CB, old.SCB = old.data, layer.state.SCB
    new = type(old)(weight.cpu(), requires_grad=old.requires_grad, has_fp16_weights=old.has_fp16_weights)
    layer.weight = new.to(old.device)
    layer.state.reset_grads()


def _write_hqq(layer: Any, weight: Tensor) -> None:
    if layer.quant_config is None:
        raise ValueError(f"An HQQLinear does not say how it was quantised (its quant_config is None). {ADVICE}")
    settings = {**copy.deepcopy(layer.quant_config), "offload_meta": layer.offload_meta}
    new = type(layer)(None, settings, compute_dtype=layer.compute_dtype, device=layer.device)
    new.quantize(weight, **copy.deepcopy(layer.quant_config))
    layer.W_q, layer.meta = new.W_q, new.meta


def _read_torchao(layer: Any) -> Tensor:
    try:
        return layer.weight.dequantize()
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(f"torchao's {type(layer.weight).__name__} cannot be dequantised. {ADVICE}") from error


def _write_torchao(layer: Any, weight: Tensor) -> None:
    old = layer.weight
    kind = type(old)
    if not hasattr(kind, "from_hp") or getattr(old, "act_pre_scale", None) is not None:
        raise ValueError(f"torchao's {kind.__name__} cannot be quantised anew as it was. {ADVICE}")
    # The tensor keeps most arguments under their own names. Its scales are those of the former weight.
    names = set(inspect.signature(kind.from_hp).parameters) - {"hp_tensor", "scale", "zero_point"}
    settings = {name: getattr(old, name) for name in names if hasattr(old, name)}
    if "granularity" in names:
        granularity, size = import_module("torchao.quantization.granularity"), tuple(old.block_size)
        wholes = {(1, old.shape[1]): granularity.PerRow, tuple(old.shape): granularity.PerTensor}
        settings["granularity"] = wholes[size]() if size in wholes else granularity.PerGroup(size[1])
    if "mapping_type" in names and old.zero_point is not None and old.zero_point.any():
        settings["mapping_type"] = import_module("torchao.quantization").MappingType.ASYMMETRIC
    if "float8_dtype" in names:
        settings["float8_dtype"] = old.qdata.dtype
    new = kind.from_hp(weight, **settings)
    before, after = tuple(old.block_size), tuple(new.block_size)
    if before != after:
        raise ValueError(
            f"torchao's {kind.__name__} has blocks of {before}, but was quantised anew with {after}. {ADVICE}"
        )
    layer.weight = nn.Parameter(new, requires_grad=False)


def _write_quanto(layer: Any, weight: Tensor) -> None:
    trained = layer.weight.requires_grad
    layer.weight = nn.Parameter(weight, requires_grad=False)
    # In quanto, to freeze a layer is to quantise its weight.
    layer.freeze()
    layer.weight.requires_grad_(trained)


# The keys are "package.class", where the class is that of a layer, of its weight, or a base class of these.
SCHEMES = {
    "bitsandbytes.Params4bit": Scheme("bitsandbytes 4-bit", _read_4bit, _write_4bit, ("weight", "quant_state")),
    "bitsandbytes.Int8Params": Scheme("bitsandbytes 8-bit", _read_8bit, _write_8bit),
    "hqq.HQQLinear": Scheme("HQQ", lambda layer: layer.dequantize(), _write_hqq, ("W_q", "meta")),
    "torchao.TorchAOBaseTensor": Scheme("torchao", _read_torchao, _write_torchao),
    "optimum.QTensor": Scheme("quanto", lambda layer: layer.weight.dequantize(), _write_quanto),
    "gptqmodel.AWQuantLinear": Scheme("AWQ", obstacle=CALIBRATED),
    "gptqmodel.BaseQuantLinear": Scheme("GPTQ", obstacle=CALIBRATED),
    "awq.WQLinear_GEMM": Scheme("AWQ", obstacle=CALIBRATED),
    "aqlm.QuantizedLinear": Scheme("AQLM", obstacle=CALIBRATED),
    "eetq.EetqLinear": Scheme("EETQ", obstacle=ONE_WAY),
    "transformers.EetqLinear": Scheme("EETQ", obstacle=ONE_WAY),
    "neural_compressor.PatchedLinear": Scheme("Intel Neural Compressor", obstacle=ONE_WAY),
}


def scheme_of(layer: nn.Module) -> Scheme | None:
    """How a layer is quantised; None for a layer that is not quantised, or in an unknown way."""
    # An embedding may have a quantised weight as well.
    weight = layer._parameters.get("weight") if isinstance(layer, nn.Linear) else None
    classes = (*type(layer).__mro__, *type(weight).__mro__)
    names = (f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in classes)
    return next((SCHEMES[name] for name in names if name in SCHEMES), None)


def _is_plain(layer: nn.Module) -> bool:
    # A weight that is computed from others is no parameter, and would be lost when it is set.
    weight = layer._parameters.get("weight")
    return weight is not None and type(weight.data) is Tensor and weight.dtype in PLAIN_DTYPES


def check_mergeable(layer: nn.Module, path: str = "") -> Scheme | None:
    """How the layer's weight has to be read and written, None for a plain one.

    Raises:
        ValueError: if an adapter cannot be merged into it.
    """
    scheme = scheme_of(layer)
    what = f"{path}, a {type(layer).__name__}," if path else f"A {type(layer).__name__}"
    if scheme is not None and scheme.obstacle:
        raise ValueError(f"{what} cannot take up an adapter ({scheme.name}): {scheme.obstacle}. {ADVICE}")
    if scheme is None and not _is_plain(layer):
        weight = layer._parameters.get("weight")
        kind = "no parameter called weight" if weight is None else f"{type(weight.data).__name__} of {weight.dtype}"
        names = sorted({scheme.name for scheme in SCHEMES.values() if not scheme.obstacle})
        raise ValueError(
            f"{what} cannot take up an adapter: its weight is expected to be a plain tensor of float16, bfloat16, "
            f"float32 or float64, or quantised by {', '.join(names)}; found {kind}. {ADVICE}"
        )
    return scheme


def read_weight(layer: Any) -> Tensor:
    """The weight as a floating-point tensor in the layer's own layout, (D_out, D_in) if it is quantised."""
    scheme = check_mergeable(layer)
    return layer.weight.data if scheme is None else scheme.read(layer)


def write_weight(layer: Any, weight: Tensor) -> dict[str, Any] | None:
    """Replace the weight, quantising it as the former one was; returns what `restore_weight` needs to undo that."""
    scheme = check_mergeable(layer)
    if scheme is None:
        layer.weight.data = weight
        return None
    former = {name: getattr(layer, name) for name in scheme.fields}
    scheme.write(layer, weight)
    return former


def restore_weight(layer: Any, former: dict[str, Any]) -> None:
    """Undo `write_weight`, to the bit."""
    for name, value in former.items():
        moved = name == "weight" and value.device != layer.weight.device
        setattr(layer, name, value.to(layer.weight.device) if moved else value)
    if hasattr(layer, "state"):
        layer.state.reset_grads()


def former_weights(layers: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights that a merge into the base layers of these changes, each with a tensor that keeps its values.

    A GPU that holds the model may have no room for them once more; then they are kept in the CPU's memory. Quantised
    weights are replaced as a whole.
    """
    pairs = [(layer.base_layer, layer.get_base_layer()) for layer in layers]
    pairs = [(outer, base) for outer, base in pairs if _is_plain(base) and not base.weight.is_meta]
    size = sum(base.weight.nbytes for _, base in pairs)
    for outer, base in pairs:
        # T-REX puts another tensor in the place of this one, but another method between the two writes into it.
        stays = outer is base and _has_room(base.weight.device, 2 * size)
        yield base.weight, base.weight.data if stays else base.weight.detach().to("cpu", copy=True)


def _has_room(device: torch.device, size: int) -> bool:
    """Whether so many bytes are free."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > size)


class _PassGradient(torch.autograd.Function):
    """Computes the gradient that a layer's own kernel does not, with the dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        try:
            weight = read_weight(ctx.layer)
        except ValueError as error:
            raise RuntimeError(
                f"A {type(ctx.layer).__name__} passes no gradient to its input, so that the layers before it would be "
                "trained on wrong ones. Load the base model with a kernel or a quantisation that can be trained."
            ) from error
        return (grad.to(weight.dtype) @ weight).to(ctx.dtype), None, None


def _pass_gradient(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Forward hook of a quantised layer, which gives its output a gradient where its kernel computes none."""
    x = args[0] if args else next(iter(kwargs.values()))
    if not torch.is_grad_enabled() or not x.requires_grad or output.requires_grad:
        return output
    return _PassGradient.apply(x, output, layer)


def keep_trainable(model: nn.Module) -> None:
    """Let correct gradients pass through the quantised layers of a model, adapted or not.

    Some kernels compute none (torchao's, where they quantise the activations too), which would leave the layers before
    with wrong gradients. And on a CPU with AVX512-BF16, bitsandbytes packs a 4-bit weight for good in a forward in
    eval mode, after which a backward through it is wrong: this is turned off, and undone where it has happened.
    """
    for layer in model.modules():
        quantised = scheme_of(layer) is not None or (isinstance(layer, nn.Linear) and not _is_plain(layer))
        if quantised and _pass_gradient not in layer._forward_hooks.values():
            layer.register_forward_hook(_pass_gradient, with_kwargs=True)
        # A wrapper passes the attribute on, but does not have it.
        if PACKING in vars(layer):
            setattr(layer, PACKING, False)
            _unpack(layer)


def release(model: nn.Module) -> None:
    """Undo `keep_trainable` in a model that the adapters leave."""
    for layer in model.modules():
        for number in [number for number, hook in layer._forward_hooks.items() if hook is _pass_gradient]:
            del layer._forward_hooks[number]
            layer._forward_hooks_with_kwargs.pop(number, None)
        if PACKING in vars(layer):
            setattr(layer, PACKING, import_module("bitsandbytes.functional").has_avx512bf16())


def _unpack(layer: Any) -> None:
    """Undo bitsandbytes' packing, but for the scales, which it has rounded to bfloat16."""
    state: Any = getattr(layer.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    scales = state.absmax.T.reshape(-1).float()
    # Otherwise the scales would be rounded once more.
    state.original_nested = False
    unpack = import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse
    layer.weight.data, state = unpack(layer.weight.data, state)
    # `unpack` leaves the scales transposed.
    state.absmax = scales
    layer.weight.quant_state = layer.quant_state = state
