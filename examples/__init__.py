"""The built-in example: the collection that `bash distill.sh` makes, and the models it uses."""
