"""Datasets of source and target images, safe image loading, and the cache of tensors made from them."""
