"""Checks before a run starts: that its models, features, files and settings fit together."""
