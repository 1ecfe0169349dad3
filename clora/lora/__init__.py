"""A LoRA as a file, and on a base."""
