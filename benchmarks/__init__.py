"""Speed and memory, compared with the original and with sentence-transformers."""
