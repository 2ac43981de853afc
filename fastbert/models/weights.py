"""A layer's parameters as the ops take them: q, k and v as one product, in the compute dtype, packed on a CPU.

Copies are kept of matrices only, on a CPU that packs them only, and checked at every forward: against each parameter's
address and version, which optimizer steps, `load_state_dict` and in-place edits change, and against a sample of its
values, because edits through `.data` (LoRA merges), numpy views and shared memory change neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import hf, native, ops, torch_private
from fastbert.layers import LayerWeights, Product, QuantizedProduct
from fastbert.models.quantized import QuantizedLinear
from fastbert.models.structure import LayerModules
from fastbert.ops import PackedWeight, PanelWeight
from fastbert.torch_private import own_parameters, parameter

SAMPLES = 512


@dataclass(frozen=True, slots=True)
class Stack:
    """All layers as `ops.encoder_forward` takes them, after x, cu_seqlens and max_seqlen.

    Args:
        tensors: as in ops/encoder.py, `ops.LAYER_TENSORS` a layer.
    """

    tensors: list[Tensor]
    heads: int
    scale: float
    eps: float
    approximate: str

    def of_layers(self, first: int, last: int) -> tuple[list[Tensor], int, float, float, str]:
        """The op's arguments for the layers first to last - 1."""
        tensors = self.tensors[first * ops.LAYER_TENSORS : last * ops.LAYER_TENSORS]
        return tensors, self.heads, self.scale, self.eps, self.approximate


@dataclass(frozen=True, slots=True)
class Prepared:
    """Something made from tensors of a model, and what these were when it was made.

    Args:
        value: a matrix, a product in int8 (None: there is none), or the tensors of a stack (None: they are not alike).
        about: what else it was made for, such as a dtype.
        versions: of the tensors.
        watch: of the tensors and their samples.
    """

    value: Any
    about: tuple[object, ...]
    versions: tuple[int, ...]
    watch: native.Watch

    def fits(self, tensors: tuple[Tensor, ...], about: tuple[object, ...]) -> bool:
        """Whether these tensors are still those it was made from, as far as is looked at them."""
        return self.about == about and torch_private.identical(tensors, self.watch.tensors) and self.holds()

    def holds(self) -> bool:
        """Whether the tensors that it was made from are as they were, as far as is looked at them."""
        return torch_private.versions(self.watch.tensors) == self.versions and self.watch.holds()


def sample(tensor: Tensor) -> Tensor:
    """A view of about SAMPLES values spread over a matrix [N, K]; all of a vector."""
    if tensor.dim() != 2:
        return tensor.detach()
    rows, columns = tensor.shape
    if tensor.is_contiguous():
        step = max(1, rows * columns // SAMPLES) | 1  # odd, so that it is not one column that is always seen
        return tensor.detach().view(-1)[::step]
    return tensor.detach()[:: max(1, rows // 23), :: max(1, columns // 23)]


class MatrixCache:
    """What is prepared of one model: its matrices and int8 products by name, and the stack of its layers."""

    def __init__(self) -> None:
        self.entries: dict[str, Prepared] = {}
        self.stack: Prepared | None = None

    def get(
        self, name: str, parameters: tuple[Tensor, ...], dtype: torch.dtype, graph: bool = False
    ) -> Tensor | PackedWeight:
        """parameters [N_i, K] → their rows in one matrix [ΣN_i, K] of `dtype`, as its backend packs it.

        graph: gradients flow through the product; then it is the plain matrix, with the parameters in its graph.
        """
        if graph or not keeps_copies(parameters, dtype):
            self.entries.pop(name, None)
            self.stack = None
            return joined(parameters, dtype)
        about = dtype, ops.packer(parameters[0].device, dtype)
        entry = self.prepared(name, parameters, about, lambda: ops.pack_weight(joined(parameters, dtype)))
        made: Tensor | PackedWeight = entry.value
        return made

    def get_quantized(self, name: str, linears: tuple[Any, ...], dtype: torch.dtype) -> QuantizedProduct | None:
        """The rows of quantized linears in one product, packed; None: they differ. dtype: of x."""
        tensors = tuple(t for linear in linears for t in (*linear.buffers(), linear.bias) if t is not None)
        if any(t.is_inference() for t in tensors):
            return rows_together(linears)
        packer = ops.packer(tensors[0].device, dtype, ops.quantized_linear)
        entry = self.prepared(name, tensors, (packer,), lambda: packed(rows_together(linears), packer))
        made: QuantizedProduct | None = entry.value
        return made

    def prepared(
        self, name: str, tensors: tuple[Tensor, ...], about: tuple[object, ...], make: Callable[[], object]
    ) -> Prepared:
        """The entry of a name, made if there is none or the tensors, or what else it is `about`, have changed."""
        entry = self.entries.get(name)
        if entry is None or not entry.fits(tensors, about):
            entry = self.entries[name] = prepare(tensors, about, make)
        return entry

    def get_stack(self, layers: tuple[LayerModules, ...], dtype: torch.dtype) -> Prepared:
        """The tensors of `Stack`; of the value None: a product's weight is not packed in panels."""
        tensors = tuple(p for layer in layers for p in layer_tensors(layer))
        entry = self.stack
        if entry is None or not entry.fits(tensors, (dtype,)):
            entry = self.stack = prepare(tensors, (dtype,), lambda: self.stacked(layers, dtype))
        return entry

    def stacked(self, layers: tuple[LayerModules, ...], dtype: torch.dtype) -> list[Tensor] | None:
        """The tensors of `Stack`, made of the entries of its matrices."""
        found = list[Tensor]()
        for index, layer in enumerate(layers):
            for place, linears in groups_of(layer).items():
                product = read_product(linears, f"layer.{index}.{place}", self, dtype, graph=False)
                if not isinstance(product.weight, PanelWeight) or product.bias is None:
                    return None
                found += (*packed_tensors(product), product.bias.detach().to(dtype))
                if place in ("out", "second"):
                    gamma, beta, _ = norm(layer.norm1 if place == "out" else layer.norm2)
                    found += (gain.detach().float().contiguous() for gain in (gamma, beta))
        return found

    def nbytes(self) -> int:
        """Memory held by the copies of matrices, in bytes."""
        return sum(nbytes_of(entry.value) for entry in tuple(self.entries.values()))


def prepare(tensors: tuple[Tensor, ...], about: tuple[object, ...], make: Callable[[], object]) -> Prepared:
    """What `make` gives, and what the tensors were before: another thread's edit meanwhile is seen later."""
    versions, live = torch_private.versions(tensors), tuple(map(sample, tensors))
    watch = native.Watch(tensors, live, tuple(view.clone() for view in live))
    return Prepared(make(), about, versions, watch)


def nbytes_of(made: Any) -> int:
    """Memory of a prepared matrix, or of an int8 product, in bytes."""
    if isinstance(made, QuantizedProduct):
        return made.weight.nbytes + made.scales.nbytes + made.outliers.nbytes
    return 0 if made is None else int(made.nbytes)


def layer_tensors(layer: LayerModules) -> list[Tensor]:
    """The parameters of a layer's linears and LayerNorms; of quantized linears their buffers too."""
    modules: tuple[nn.Module, ...] = (*layer.linears(), *layer.norms())
    found = list[Any]()
    for module in modules:
        if type(module) is QuantizedLinear:
            found += [*torch_private.own_buffers(module), module.bias]
        else:
            found += [parameter(module, "weight"), parameter(module, "bias")]
    return found


def groups_of(layer: LayerModules) -> dict[str, tuple[nn.Module, ...]]:
    """The linears of each product of a layer, in the order that it computes them."""
    qkv = layer.query, layer.key, layer.value
    return {"qkv": qkv, "out": (layer.out,), "first": (layer.w1,), "second": (layer.w2,)}


def packed(product: QuantizedProduct | None, backend: str) -> QuantizedProduct | None:
    """The product with its plain weights packed for a backend; backend "": as it is."""
    if product is None or not backend:
        return product
    plain = (t for t in (product.weight, product.outliers) if isinstance(t, Tensor))
    weight, outliers = (ops.pack_weight(t, backend) for t in plain)
    return dataclasses.replace(product, weight=weight, outliers=outliers)


def packed_tensors(product: Product | QuantizedProduct) -> tuple[Tensor, ...]:
    """The tensors of a product of `encoder_forward` whose weight is packed in panels, without its bias."""
    weight = product.weight
    assert isinstance(weight, PanelWeight)
    none = weight.panels.new_empty(0)
    if isinstance(product, Product):
        return weight.panels, none, none, none, none
    assert weight.sums is not None
    outliers = product.outliers.panels if isinstance(product.outliers, PanelWeight) else none.bfloat16()  # no columns
    return weight.panels, product.scales.contiguous(), weight.sums, product.columns, outliers


def rows_together(linears: tuple[Any, ...]) -> QuantizedProduct | None:
    """One product with the rows of all these; None: not all have the same columns of outliers, or only some a bias."""
    first, biases = linears[0], [linear.bias for linear in linears if linear.bias is not None]
    if any(not torch.equal(linear.columns, first.columns) for linear in linears) or len(biases) % len(linears):
        return None
    weight, scales, outliers = (
        torch.cat([getattr(linear, name) for linear in linears]) for name in ("int8_weight", "scales", "outliers")
    )
    bias = torch.cat([bias.detach() for bias in biases]) if biases else None
    return QuantizedProduct(weight, scales, bias, first.columns, outliers, first.rotated)


def keeps_copies(parameters: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether packed copies are kept. Inference tensors have no version that would tell of a change."""
    first = parameters[0]
    packs = first.numel() > 0 and ops.packer(first.device, dtype) != ""
    return packs and not any(p.is_inference() for p in parameters)


def joined(parameters: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """parameters [N_i, ...] → [ΣN_i, ...] of `dtype`."""
    whole = torch.cat(parameters) if len(parameters) > 1 else parameters[0]
    return whole if whole.dtype == dtype else whole.to(dtype)


def norm(module: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    """gamma [H], beta [H], eps of an nn.LayerNorm."""
    return parameter(module, "weight"), parameter(module, "bias"), module.eps


def read_product(
    linears: tuple[nn.Module, ...], name: str, cache: MatrixCache, dtype: torch.dtype, graph: bool
) -> Product | QuantizedProduct:
    """One product with the rows of all these linears, as they are now, in the compute dtype or in int8."""
    quantized = all(type(linear) is QuantizedLinear for linear in linears)
    if quantized and (together := cache.get_quantized(name, linears, dtype)) is not None:
        return together
    if any(type(linear) is not nn.Linear for linear in linears):
        return Product(None, modules=linears)
    biases = tuple(parameter(linear, "bias") for linear in linears)
    weight = cache.get(name, tuple(parameter(linear, "weight") for linear in linears), dtype, graph)
    return Product(weight, None if biases[0] is None else joined(biases, dtype))


def wants_graph(x: Tensor, modules: Iterable[nn.Module]) -> bool:
    """Whether gradients flow through what x and the parameters of these modules give."""
    if not torch.is_grad_enabled():
        return False
    found = (p for m in modules for p in (own_parameters(m) if type(m) is nn.Linear else m.parameters()))
    return x.requires_grad or any(p is not None and p.requires_grad for p in found)


def rate(dropout: nn.Dropout | None, training: bool | None = None) -> float:
    """The probability with which a dropout module drops now; `training`: instead of the module's own flag."""
    if dropout is None or not (dropout.training if training is None else training):
        return 0.0
    return float(dropout.p)


def read_dropout(modules: LayerModules) -> tuple[float, ...]:
    """The dropout of one layer as it is now, by place; () where there is none.

    Whether that of the attention probabilities is on HuggingFace asks the attention module, not its dropout.
    """
    attention = rate(modules.attention_dropout, modules.attention.training)
    rates = attention, rate(modules.out_dropout), rate(modules.ffn_dropout)
    return rates if any(rates) else ()


def read_layer(
    modules: LayerModules, index: int, cache: MatrixCache, dtype: torch.dtype, dropout: tuple[float, ...], graph: bool
) -> LayerWeights:
    """The parameters of one layer as they are now, in the compute dtype; graph: as in `MatrixCache.get`."""

    def product(place: str, *linears: nn.Module) -> Product | QuantizedProduct:
        return read_product(linears, f"layer.{index}.{place}", cache, dtype, graph)

    return LayerWeights(
        heads=heads_of(modules),
        scale=scale_of(modules),
        approximate=hf.gelu_of(modules.activation) or "none",
        qkv=product("qkv", modules.query, modules.key, modules.value),
        out=product("out", modules.out),
        norm1=norm(modules.norm1),
        first=product("first", modules.w1),
        second=product("second", modules.w2),
        norm2=norm(modules.norm2),
        dropout=dropout,
        index=index,
        save=graph,
    )


def is_stackable(layers: tuple[LayerModules, ...], dtype: torch.dtype) -> bool:
    """Whether `encoder_forward` takes layers whose first is like this, in this dtype."""
    kind: type[nn.Module] = type(layers[0].query)
    device = parameter(layers[0].norm1, "weight").device
    return kind in (nn.Linear, QuantizedLinear) and ops.encodes(device, dtype, kind is QuantizedLinear)


def read_stack(
    layers: tuple[LayerModules, ...], cache: MatrixCache, dtype: torch.dtype
) -> tuple[Stack | None, Prepared | None]:
    """All layers as they are now, and what that is made from; None: they must be run one by one.

    They are one call where they are stackable, the weights packed in panels, and all layers alike but for their
    parameters.
    """
    kind = type(layers[0].query)
    for layer in layers:
        linears: tuple[nn.Module, ...] = layer.linears()
        if any(type(linear) is not kind or parameter(linear, "bias") is None for linear in linears):
            return None, None
    settings = settings_of(layers[0])
    if settings is None or any(settings_of(layer) != settings for layer in layers):
        return None, None
    prepared = cache.get_stack(layers, dtype)
    return (None if prepared.value is None else Stack(prepared.value, *settings)), prepared


def settings_of(layer: LayerModules) -> tuple[int, float, float, str] | None:
    """heads, scale, eps and approximate of a layer; None: its LayerNorms differ in eps."""
    if layer.norm1.eps != layer.norm2.eps:
        return None
    return heads_of(layer), scale_of(layer), layer.norm1.eps, hf.gelu_of(layer.activation) or "none"


def heads_of(layer: LayerModules) -> int:
    return int(layer.query.out_features // layer.attention.attention_head_size)


def scale_of(layer: LayerModules) -> float:
    """What the scores are multiplied with."""
    return float(getattr(layer.attention, "scaling", int(layer.attention.attention_head_size) ** -0.5))
