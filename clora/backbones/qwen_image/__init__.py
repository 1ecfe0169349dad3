"""Qwen-Image-Edit (2509)."""
