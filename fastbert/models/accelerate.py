"""`accelerate`, `restore` and `explain`: changing the class of a live model's base model, and saying what that does."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from fastbert import hf
from fastbert.models.families import AUTO_CLASSES, FAMILIES, Family
from fastbert.models.forward import ATTRIBUTE, PAD_OUTPUTS, State, logger, make_forward
from fastbert.models.heads import HEADS, TOKEN_HEADS, make_head_forward
from fastbert.models.quantized import QuantizedLinear, says_int8
from fastbert.models.structure import forward_reasons, model_reasons, position_reasons
from fastbert.models.weights import MatrixCache
from fastbert.once import once
from fastbert.ops import samples

Model = TypeVar("Model", bound=nn.Module)


@once
def fast_class(family: Family) -> type[Any]:
    """The accelerated class of a family's base model: the stock class with another forward, under its stock name."""
    stock = hf.stock_class(family.model)
    namespace = {
        "__module__": "fastbert",
        "__qualname__": stock.__name__,
        "__doc__": stock.__doc__,
        "__init__": make_init(stock),
        "forward": make_forward(stock),
        "fastbert_family": family,
    }
    kind = type(stock.__name__, (stock,), namespace)
    if not hf.missing():
        hf.register_capture_of(kind)
    return kind


@once
def head_class(name: str) -> type[Any]:
    """A stock class with a head whose base model is accelerated when it is made."""
    stock = hf.stock_class(name)
    generation = hf.stock_class("GenerationMixin")
    bases = (stock, generation) if generation in stock.__bases__ else (stock,)
    namespace = {"__module__": "fastbert", "__qualname__": name, "__doc__": stock.__doc__, "__init__": make_init(stock)}
    if name in TOKEN_HEADS:
        namespace["forward"] = make_head_forward(stock)
    return type(name, bases, namespace)


@once
def auto_class(name: str) -> type[Any]:
    """A stock Auto class whose models are accelerated; a model of another family comes back as it is."""
    stock = hf.stock_class(name)

    def accelerated(method: str) -> classmethod[Any, Any, Any]:
        @functools.wraps(getattr(stock, method).__func__)
        def make(cls: type, *args: Any, **kwargs: Any) -> Any:
            made = getattr(super(auto, cls), method)(*args, **kwargs)
            model = made[0] if isinstance(made, tuple) else made  # (model, info) if output_loading_info
            accelerate_in_place(model, base_models(model))
            return made

        return classmethod(make)

    namespace = {"__module__": "fastbert", "__qualname__": name, "__doc__": stock.__doc__}
    auto = type(name, (stock,), namespace)
    auto.from_pretrained = accelerated("from_pretrained")  # type: ignore[attr-defined]
    auto.from_config = accelerated("from_config")  # type: ignore[attr-defined]
    return auto


def make_init(stock: type[Any]) -> Any:
    """The constructor of a class by import: the stock one, then `accelerate`."""

    @functools.wraps(stock.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        accelerate_in_place(self, base_models(self))

    return __init__


def public_class(name: str) -> type[Any] | None:
    """The class that `from fastbert import name` gives, or None."""
    for family in FAMILIES:
        if name == family.model:
            return fast_class(family)
        if name in family.heads:
            return head_class(name)
    return auto_class(name) if name in AUTO_CLASSES else None


PUBLIC_CLASSES = tuple(name for f in FAMILIES for name in (f.model, *f.heads)) + AUTO_CLASSES


def base_models(model: nn.Module) -> list[tuple[str, Any, Family]]:
    """The base models inside `model` that a family fits, stock or accelerated, with their names."""
    stock = {f.model: f for f in FAMILIES}
    found = []
    for name, module in model.named_modules():
        kind = type(module)  # read once: another thread may change it
        family = getattr(kind, "fastbert_family", None)
        if family is None and hf.is_stock(kind, stock):
            family = stock[kind.__name__]
        if family is not None:
            found.append((name, module, family))
    return found


def check_module(model: object, function: str) -> None:
    """Raises TypeError if what was given to a public function is not a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        hint = "; give it the pipeline's .model" if hasattr(model, "model") else ""
        raise TypeError(f"fastbert.{function} takes a torch.nn.Module, not {type(model).__name__}{hint}")


def known_models(model: nn.Module) -> list[tuple[str, Any, Family]]:
    """`base_models`; ValueError if there are none."""
    if found := base_models(model):
        return found
    names = ", ".join(f.model for f in FAMILIES)
    raise ValueError(f"{type(model).__name__} holds no model that fastbert accelerates; it knows {names}")


def accelerate(model: Model, pad_output: str | None = None) -> Model:
    """Makes every BERT (and RoBERTa, DistilBERT, ELECTRA …) inside `model` drop its padding and run fastbert's ops.

    It works in place: parameters keep their identity, `state_dict` its keys, classes their names; `restore` undoes it.
    Whatever the fast path does not compute runs HuggingFace's own forward; `explain` says what and why.

    Args:
        model: a HuggingFace model, or any module that holds one (SentenceTransformer, a pipeline's model …). Give the
            outermost one: what stands above it is not seen.
        pad_output: what the output holds at masked positions. "zeros"; "exact": HuggingFace's values, at HuggingFace's
            speed when a batch has padding; None: "exact" under a head that reduces over all positions
            (QuestionAnswering, ELECTRA's summaries other than "first"), else "zeros". Whatever it is, a head over
            tokens whose labels are not all -100 at masked positions gets HuggingFace's loss (seen on a CPU only).

    Returns:
        The same object.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: no supported model is inside it, its config says int8 and it was loaded without fastbert, or
            `pad_output` is unknown.
    """
    check_module(model, "accelerate")
    if pad_output not in (None, *PAD_OUTPUTS):
        raise ValueError(f"pad_output is {pad_output!r}; it can be {' or '.join(map(repr, PAD_OUTPUTS))}")
    found = known_models(model)
    for _, base, _ in found:
        check_int8(base)
    return accelerate_in_place(model, found, pad_output)


def check_int8(base: Any) -> None:
    """Raises ValueError if a base model's config says int8 and its products are not."""
    if says_int8(base.config) and not any(type(module) is QuantizedLinear for module in base.modules()):
        raise ValueError(
            f"the config of this {type(base).__name__} says that fastbert has quantized it, and its products are not "
            "int8. Was it loaded before fastbert was imported? Then its weights are random: import fastbert first. Was "
            "it made from the config alone? Then delete the config's quantization_config"
        )


def accelerate_in_place(model: Model, found: list[tuple[str, Any, Family]], pad_output: str | None = None) -> Model:
    """Gives the base models that were found in `model` their fast class and state. Returns `model`."""
    exact, missing = reduces_over_positions(model), hf.missing()  # where names are missing, classes stay HuggingFace's
    for _, base, family in found:
        if type(base) is hf.stock_class(family.model) and not missing:
            base.__class__ = fast_class(family)
        state: State | None = base.__dict__.get(ATTRIBUTE)
        if state is None:
            state = base._fastbert = State("zeros")
            for reason in position_reasons(base.config):
                logger.warning(
                    f"{reason}: transformers computes absolute positions all the same, so HuggingFace's own path runs"
                )
        state.pad_output = pad_output or ("exact" if exact else "zeros")
        state.cache = MatrixCache()
    for module in model.modules():
        kind = type(module)
        if hf.is_stock(kind, TOKEN_HEADS) and not missing:
            module.__class__ = head_class(kind.__name__)
    return model


def reduces_over_positions(model: nn.Module) -> bool:
    """Whether something in the model reads all positions of a base model's output, pad rows too."""
    kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if any(name.endswith("QuestionAnswering") for name in kinds):
        return True
    return any(getattr(module, "summary_type", "first") != "first" for module in model.modules())


def restore(model: Model) -> Model:
    """Undoes `accelerate`: stock classes and the stock path again. Returns the same object.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    check_module(model, "restore")
    for _, base, family in base_models(model):
        if base.__dict__.pop(ATTRIBUTE, None) is None:
            continue
        if type(base) is fast_class(family):
            base.__class__ = hf.stock_class(family.model)
    for module in model.modules():
        name = type(module).__name__
        if name in HEADS and type(module) is head_class(name):
            module.__class__ = hf.stock_class(name)
    return model


def reasons_now(base: nn.Module, state: State, family: Family) -> list[str]:
    """Why a base model, as it is now, runs the stock path."""
    return forward_reasons(base) + model_reasons(base, state.structure_of(base), family)


@dataclass(frozen=True)
class BaseExplanation:
    """What one base model does: its reasons for the stock path (empty: fast), and its calls so far by reason."""

    name: str
    model: str
    reasons: list[str]
    calls: dict[str, int]
    pad_output: str
    packed_bytes: int
    quantized: bool = False

    def __str__(self) -> str:
        path = "HuggingFace's own path" if self.reasons else "fast path"
        lines = [f"{self.name or 'the model'} ({self.model}): {path}"]
        lines += [f"  because {reason}" for reason in self.reasons]
        lines += [f'  pad_output = "{self.pad_output}", packed copies of weights: {self.packed_bytes / 1e6:.1f} MB']
        if self.quantized:
            lines.append("  quantized: the layers' products run in int8, for inference only")
        for reason, count in self.calls.items():
            took = f"stock, because {reason}" if reason else "fast"
            lines.append(f"  {count} forward{'s' if count > 1 else ''} so far: {took}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """What `accelerate` did to a model: which path each base model takes and why, and which backend runs each op.

    Args:
        models: one for each base model inside.
        backends: op → backend in order of choice → why it refuses a typical call; empty: it takes it. Nothing on a
            device where the fast path does not run.
        kernels: op → what is known of the kernel of fastbert's own that runs it ("self-check passed").
    """

    models: list[BaseExplanation]
    backends: dict[str, dict[str, list[str]]]
    kernels: dict[str, str]

    @property
    def unmeasured(self) -> dict[str, list[str]]:
        """Op → the backends behind the one that runs it which would take the call too.

        No record of timings in the package says yet which of them is the fastest on this card. `reference`, the
        specification, is never meant to be.
        """
        takers = {op: [name for name, reasons in b.items() if not reasons] for op, b in self.backends.items()}
        behind = {op: [name for name in names[1:] if name != "reference"] for op, names in takers.items()}
        return {op: names for op, names in behind.items() if names}

    def __str__(self) -> str:
        lines = [str(model) for model in self.models]
        lines += ["which backend runs an op on the fast path:"] if self.backends else []
        for op, backends in self.backends.items():
            taker = next((name for name, reasons in backends.items() if not reasons), "none")
            refused = [f"{name}: {'; '.join(reasons)}" for name, reasons in backends.items() if reasons]
            kernel = f", {self.kernels[op]}" if op in self.kernels else ""
            order = f", before {' and '.join(self.unmeasured[op])}: unmeasured" if op in self.unmeasured else ""
            lines.append(f"  {op}: {taker}{kernel}{order}" + (f" (not {' | '.join(refused)})" if refused else ""))
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """What runs where in `model`, and in words why not elsewhere; `print` it.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: no supported model is inside it, or none was accelerated.
    """
    check_module(model, "explain")
    states = [(name, base, family, base.__dict__.get(ATTRIBUTE)) for name, base, family in known_models(model)]
    found = [entry for entry in states if entry[3] is not None]
    if not found:
        raise ValueError(f"nothing in {type(model).__name__} was accelerated: call fastbert.accelerate on it first")
    explanations = []
    for name, base, family, state in found:
        explanations.append(
            BaseExplanation(
                name=name,
                model=type(base).__name__,
                reasons=reasons_now(base, state, family),
                calls=dict(state.calls),
                pad_output=state.pad_output,
                packed_bytes=state.cache.nbytes(),
                quantized=any(type(module) is QuantizedLinear for module in base.modules()),
            )
        )
    word = found[0][1].embeddings.word_embeddings.weight
    backends = samples.op_backends(str(word.device), word.dtype)
    return Explanation(explanations, backends, samples.standings(backends, str(word.device), word.dtype))
