"""How the models of the embedded example were made."""
