"""Measurements, as ratios in one run; `python -m benchmarks.NAME --help`."""
