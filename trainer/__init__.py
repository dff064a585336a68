"""Turns a pre-trained vision transformer into a refined backbone: `python -m trainer`."""
