"""Scenes: what the tiny world is drawn from."""
