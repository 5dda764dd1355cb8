"""What the scripts share: models, losses, optimizer, feature files, TREC files. Each module can be read on its own."""
