"""Texts, tokens and features: what models are trained on and rank."""
