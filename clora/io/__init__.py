"""All that crosses the border, bounded."""
