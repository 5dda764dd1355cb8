"""What all parts share: files, text, compatibility of inputs, processes."""
