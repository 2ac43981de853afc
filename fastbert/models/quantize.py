"""`quantize`: the products of the encoder's layers in int8, for inference.

Weights are int8 with one scale a row, activations u8 (zero point 128) with one scale a token, chosen at run time. The
few columns of a product's input that hold outliers stay in fp32 (Dettmers et al. 2022, "LLM.int8()"); which they are is
found once, by a forward. The others are rotated in blocks, which spreads what is still large (Ashkboos et al. 2024,
"QuaRot").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.models.accelerate import Model, check_int8, check_module, known_models
from fastbert.models.families import Family
from fastbert.models.quantized import QuantizedLinear, linears, outlier_count, put
from fastbert.models.quantizer import mark
from fastbert.models.structure import TOKENWISE, kind_of

ROWS, LENGTH = 8, 128  # of the token ids that find outliers where no inputs are given


def quantize(model: Model, inputs: Iterable[Mapping[str, Any]] | None = None) -> Model:
    """Makes the products of every layer of the base models inside `model` int8, in place, for inference.

    Query, key, value, attention's output and both products of the feed-forward become `QuantizedLinear`; embeddings,
    attention, LayerNorms, poolers and heads stay as they are. Accelerated models stay accelerated, others can be.
    `state_dict`, `save_pretrained`, copies and pickles carry int8. What `save_pretrained` wrote is loaded as any
    checkpoint is, by `from_pretrained` of transformers or of fastbert or by SentenceTransformer, once fastbert is
    imported.

    Args:
        model: a HuggingFace model of a known family, or any module that holds one.
        inputs: keyword arguments of forwards of the base model, by which the columns with outliers are found; None:
            seeded random token ids, which find them nearly as well.

    Returns:
        The same object.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: no supported model is inside it, it is quantized already (by fastbert or others), was loaded
            quantized without fastbert, holds LoRA adapters, or has its weights on the meta device.
    """
    check_module(model, "quantize")
    found = known_models(model)
    for name, base, family in found:
        check_int8(base)
        if reasons := refusals(base, family):
            raise ValueError(f"fastbert.quantize cannot take {name or type(model).__name__}: {'; '.join(reasons)}")
    given = None if inputs is None else list(inputs)
    for _, base, family in found:
        outliers = outlier_columns(base, family, given)
        for path, linear in linears(base, family):
            put(base, path, QuantizedLinear.of(linear, outliers[path]))
    mark(model)
    return model


def refusals(base: Any, family: Family) -> list[str]:
    """In words, why the products of a base model cannot be quantized."""
    if family.refusal:
        return [family.refusal]
    reasons = []
    for path, linear in linears(base, family):
        kind = kind_of(linear)
        if isinstance(linear, QuantizedLinear):
            return ["it is quantized already"]
        if kind in TOKENWISE or hasattr(linear, "base_layer"):
            return [f"{path} holds a LoRA adapter: merge it first (peft's merge_and_unload)"]
        if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
            reasons.append(f"{path} is {kind} on a {type(linear.weight).__name__}, not a plain torch.nn.Linear")
        elif linear.weight.is_meta:
            return ["its weights are on the meta device: load them first"]
        elif not linear.weight.is_floating_point():
            reasons.append(f"{path} holds {linear.weight.dtype}: it is quantized by something else")
    return reasons[:3]


@torch.no_grad()
def outlier_columns(base: Any, family: Family, inputs: list[Mapping[str, Any]] | None) -> dict[str, Tensor]:
    """Path of each linear → the columns [C] of its input that hold the greatest magnitudes, in rising order."""
    greatest: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            now = args[0].detach().float().abs().flatten(0, -2).amax(0)  # [K]
            greatest[path] = torch.maximum(greatest[path], now) if path in greatest else now

        return see

    handles = [linear.register_forward_pre_hook(watch(path)) for path, linear in linears(base, family)]
    modes = [(module, module.training) for module in base.modules()]
    try:
        base.eval()
        for call in random_inputs(base) if inputs is None else inputs:
            base(**call)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return {
        path: magnitudes.topk(outlier_count(magnitudes.shape[0])).indices.sort().values
        for path, magnitudes in greatest.items()
    }


def random_inputs(base: Any) -> Iterator[dict[str, Tensor]]:
    """Calls of a base model with seeded random token ids [ROWS, LENGTH]."""
    vocabulary = base.config.vocab_size
    length = min(LENGTH, base.config.max_position_embeddings - 2)  # RoBERTa's positions begin at 2
    generator = torch.Generator().manual_seed(0)
    low = min(1000, vocabulary // 2)  # above the special tokens of BERT's vocabularies
    ids = torch.randint(low, vocabulary, (ROWS, length), generator=generator)
    yield {"input_ids": ids.to(base.embeddings.word_embeddings.weight.device)}
