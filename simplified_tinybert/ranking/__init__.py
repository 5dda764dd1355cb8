"""Score passages, rank documents by the scores, and evaluate and compare rankings."""
