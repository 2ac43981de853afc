"""What a forward has seen of a model, so that the next one sees in one pass whether anything has changed since.

A short query pays for every object that Python looks at, most of all as the weights have just driven them out of the
caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastbert import native
from fastbert.models.inputs import family_of
from fastbert.models.structure import Structure, at, model_reasons
from fastbert.models.weights import MatrixCache, Prepared, Stack, rate, read_dropout, read_stack
from fastbert.torch_private import Contents, module_fields_refusal


@dataclass(frozen=True, slots=True)
class Seen:
    """A model in which nothing spoke against the fast path, and whose layers are one call without dropout.

    Args:
        structure, contents: of its modules.
        places: where its parameters and buffers stood.
        dtype, stack: the compute dtype, and the layers in it.
        prepared: what the stack was made from.
    """

    structure: Structure
    contents: Contents
    places: native.Watch
    dtype: torch.dtype
    stack: Stack
    prepared: Prepared

    def holds(self, model: nn.Module) -> bool:
        """Whether the model's class, modules, attributes, methods and tensors are the same; without gradients."""
        return (
            self.structure.has_methods()
            and self.contents.are_in(model)
            and self.places.holds()
            and self.prepared.holds()
        )


def see(model: nn.Module, structure: Structure, cache: MatrixCache, dtype: torch.dtype, left_out: str) -> Seen | None:
    """What there is to see of a model that is `is_stackable`.

    None: something speaks against the fast path or the stack, or there is dropout, or a hook, at which every forward
    must look.
    The contents come first: what another thread changes meanwhile is seen later.

    Args:
        left_out: the attribute of the model that will hold it.
    """
    if module_fields_refusal() is not None:
        return None
    try:
        contents, family = Contents(model, left_out), family_of(model)
    except LookupError:
        return None
    places = native.Watch(contents.tensors, (), ())
    if not structure.fits(model, family) or model_reasons(model, structure, family):
        return None
    if rate(at(model, family.embeddings_dropout)) or any(map(read_dropout, structure.layers)):
        return None
    stack, prepared = read_stack(structure.layers, cache, dtype)
    return None if stack is None or prepared is None else Seen(structure, contents, places, dtype, stack, prepared)
