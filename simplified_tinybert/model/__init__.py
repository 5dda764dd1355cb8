"""The BERT cross-encoder: its configuration, its weights, its layers."""
