"""From scores of passages to rankings of documents, and how good these are."""
