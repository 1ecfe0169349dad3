"""The tiny world: a procedural data set whose ground truth is known exactly."""
