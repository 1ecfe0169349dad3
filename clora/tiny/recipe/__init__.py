"""How the tiny base was made."""
