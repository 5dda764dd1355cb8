"""Tokenizers of models, as transformers reads them, and fast tokenization with them."""
