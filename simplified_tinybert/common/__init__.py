"""What all parts share: files, text, checks, processes."""
