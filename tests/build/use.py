"""Not imported, run as a program's text: imports fastbert, runs a small model, prints what it found as JSON.

Its arguments are packages that it is not to find.
"""
# ruff: noqa: E402

import json
import sys

for hidden in sys.argv[1:]:
    sys.modules[hidden] = None

import fastbert.kernels.probe
import torch
import transformers

import fastbert
from fastbert import native, parity


def place(name):
    try:
        return __import__(name).__file__ or "a folder"
    except ImportError:
        return "nowhere"


SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
torch.manual_seed(0)
model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
real = torch.arange(7) < torch.tensor([[7], [3], [1]])
batch = {"input_ids": torch.randint(99, (3, 7)), "attention_mask": real.long()}
with torch.no_grad():
    stock = model(**batch).last_hidden_state[real]
    exact = model.double()(**batch).last_hidden_state[real]
    fastbert.accelerate(model.float())
    fast = model(**batch).last_hidden_state[real]
    model(**batch, output_attentions=True)  # HuggingFace's path
found = {
    "fastbert.kernels": fastbert.kernels.probe.PLACE,
    "kernels": place("kernels"),
    "kernels, as transformers sees it": transformers.utils.is_kernels_available(),
    "triton": place("triton"),
    "native": native.load().reason,
    "cuda": native.load().cuda_reason,
    "parity": parity.judge(fast, exact, stock).passed,
    "forwards": fastbert.explain(model).models[0].calls,
}
print(json.dumps(found))
