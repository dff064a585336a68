"""Measures backbones: `python -m trainer.evaluate`."""
