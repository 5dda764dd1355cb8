"""What all parts share: files, text, processes, devices."""
