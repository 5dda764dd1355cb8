"""What the scripts share: models, losses, optimizer, feature files, TREC files."""
