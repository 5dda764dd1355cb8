"""From documents, queries and judgements to passages, training examples and feature files."""
