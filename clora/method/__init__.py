"""The paper: pure functions, no input or output."""
