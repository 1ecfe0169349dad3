"""Images from a base with adapters."""
