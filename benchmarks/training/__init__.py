"""The training step, and a plain one to compare it with."""
