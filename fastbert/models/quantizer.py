"""How `from_pretrained` loads what `quantize` made: HuggingFace's public interface for quantizers.

`import fastbert` has this imported as soon as transformers' table of quantizers is. No model of transformers can be
imported then, nor is one needed before a checkpoint is loaded: hence the import inside a function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastbert import hf
from fastbert.models.quantized import METHOD, OUTLIER_SHARE, QuantizedLinear, linears, outlier_count, put
from fastbert.ops.encoder import ROTATED


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """The `quantization_config` of an int8 model.

    Args:
        outlier_share: of so many columns of a product's input one stays in bf16.
        rotated: the others are rotated in blocks of at most so many. 0, of both: config.json does not say.
    """

    def __init__(self, outlier_share: int = 0, rotated: int = 0, **more: Any) -> None:
        self.quant_method: Any = METHOD
        self.outlier_share, self.rotated = outlier_share, rotated


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """Makes room for the int8 tensors of a checkpoint before they are loaded, and looks at them after."""

    @property
    def is_trainable(self) -> bool:
        """Never: int8 products are for inference."""
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Always."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Looks at the config.

        Raises:
            ValueError: the checkpoint is not int8, or its products are none that this version computes.
        """
        if not self.pre_quantized:
            raise ValueError("from_pretrained does not quantize: load the model, then call fastbert.quantize(model)")
        asked = self.quantization_config
        if not (isinstance(asked.outlier_share, int) and asked.outlier_share > 0 and asked.rotated == ROTATED):
            raise ValueError(
                f"this version of fastbert computes int8 products with outlier_share 1 or more and rotated {ROTATED}; "
                f"the model's quantization_config names {asked.outlier_share!r} and {asked.rotated!r}"
            )

    def preprocess_model(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        """Puts a `QuantizedLinear` at the place of every linear of the layers.

        Raises:
            ValueError: no supported model is inside `model`, or the checkpoint lacks tensors of its products.
        """
        from fastbert.models.accelerate import known_models

        share, expected = self.quantization_config.outlier_share, []
        for _, base, family in known_models(model):
            if family.refusal:
                raise ValueError(f"fastbert has no int8 products for {type(base).__name__}: {family.refusal}")
            for path, linear in linears(base, family):
                sizes = linear.in_features, linear.out_features, linear.bias is not None
                with torch.device("meta"):
                    made = QuantizedLinear(*sizes, columns=outlier_count(linear.in_features, share))
                put(base, path, made)
                expected += [f"{path}.{name}" for name in made.state_dict()]
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            stored = {part for key in _keys(checkpoint_files) for part in _ends(key)}
            if lacking := [name for name in expected if name not in stored]:
                raise ValueError(
                    f"the checkpoint is quantized by fastbert and lacks {len(lacking)} tensors of its products, "
                    f"the first {', '.join(lacking[:3])}"
                )
        super().preprocess_model(model, checkpoint_files=checkpoint_files, **kwargs)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Looks at what was loaded.

        Raises:
            ValueError: a product's tensors are none that `quantize` makes.
        """
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                module.after_loading(name)
        return super().postprocess_model(model, **kwargs)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """NotImplementedError: what was rounded is gone."""
        raise NotImplementedError(
            "fastbert has rounded the weights of this model to int8: load the checkpoint that it was made from"
        )


def _keys(files: list[str]) -> Iterator[str]:
    """The names of the tensors in safetensors files."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            yield from opened.keys()


def _ends(key: str) -> Iterator[str]:
    """A dotted name and every end of it: a base model's tensors have a prefix below a head."""
    while key:
        yield key
        key = key.partition(".")[2]


def mark(model: Any) -> None:
    """Makes a model that was quantized in this process what one is that was loaded quantized."""
    for module in model.modules():
        if isinstance(module, hf.stock_class("PreTrainedModel")):
            config = Int8Config(OUTLIER_SHARE, ROTATED)
            module.config.quantization_config = config
            module.hf_quantizer, module.is_quantized, module.quantization_method = Int8Quantizer(config), True, METHOD
