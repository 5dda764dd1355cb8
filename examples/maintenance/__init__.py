"""How the models of the built-in example were made."""
