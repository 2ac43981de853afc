"""Models on real texts: docstrings of the standard library, in MiniLM's tokens."""

import torch
import transformers

from fastbert import checkpoint, workloads


def minilm():
    """The demo checkpoint in eval mode."""
    return transformers.AutoModel.from_pretrained(checkpoint.demo_folder()).eval()


def on_docstrings(models, texts, length):
    """Per batch: the mask [B, S, 1], and each model's last hidden state in float64, 0 where the mask is."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.demo_folder())
    made = workloads.batches(
        "docstrings", vocab_size=30522, tokenizer=tokenizer, max_length=length, max_texts=texts, sort=True
    )
    for part in made.batches:
        real = part.attention_mask[..., None]
        with torch.no_grad():
            yield real, [model(**part.inputs())[0].double() * real for model in models]


def relative_error(pairs):
    """Of tensors and what they should be, together."""
    sizes = [(float((a - b).square().sum()), float(b.square().sum())) for a, b in pairs]
    return (sum(wrong for wrong, _ in sizes) / sum(size for _, size in sizes)) ** 0.5
