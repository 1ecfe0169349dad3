"""A run of the paper on real models: one step and all it is given."""
