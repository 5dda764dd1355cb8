"""Distillation: losses, objectives, optimizer and the training loop."""
