"""Measures of images, one family a file."""
