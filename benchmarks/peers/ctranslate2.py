"""CTranslate2: fp32, int8, and bf16 on the CPUs for which it has it. It drops padding by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.peers.rival import Bind, Run, missing
from fastbert.workloads import Batch

DTYPES_OF = ("fp32", "bf16", "int8")
TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def available() -> str:
    return missing(("ctranslate2",))


def make(model: Any, dtype: str, folder: Path) -> Bind:
    import ctranslate2

    place, threads = converted(model, folder), torch.get_num_threads()
    encoder = ctranslate2.Encoder(
        str(place), device="cpu", compute_type=TYPES[dtype], intra_threads=threads, inter_threads=1
    )

    def bind(batch: Batch) -> Run:
        ids = ctranslate2.StorageView.from_array(batch.input_ids.int().numpy())
        lengths = ctranslate2.StorageView.from_array(np.array(batch.lengths, dtype=np.int32))

        def run() -> torch.Tensor:  # token types are zeros without being told
            hidden = encoder.forward_batch(ids, lengths).last_hidden_state
            if hidden.dtype != ctranslate2.DataType.float32:  # numpy has no bf16
                hidden = hidden.to(ctranslate2.DataType.float32)
            return torch.from_numpy(np.asarray(hidden))

        return run

    return bind


def converted(model: Any, folder: Path) -> Path:
    """Its converter's form of the model; without a pooler, as every engine here."""
    place = folder / "ctranslate2"
    if not place.exists():
        from ctranslate2.converters.transformers import BertLoader
        from ctranslate2.specs.transformer_spec import TransformerEncoderModelSpec

        own = copy.deepcopy(model)
        own.config.position_embedding_type = "absolute"  # which transformers 5 does not name any more
        hidden = own.config.hidden_size
        own.pooler = torch.nn.ModuleDict({"dense": torch.nn.Linear(hidden, hidden)})  # the loader asks for one
        words = {f"word {i}": i for i in range(own.config.vocab_size)}
        with torch.no_grad():
            loaded = BertLoader()(own, SimpleNamespace(get_vocab=lambda: words, unk_token="word 0"))
        found = TransformerEncoderModelSpec(loaded.encoder)
        found.register_vocabulary(list(words))
        found.config.layer_norm_epsilon, found.config.unk_token = own.config.layer_norm_eps, "word 0"
        found.validate()
        found.optimize()
        place.mkdir()
        found.save(str(place))
    return place
