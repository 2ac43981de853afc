"""HuggingFace's models on the fast path: families, `accelerate`, `restore`, `explain`, classes by import."""
