"""The operations of `kernels` against what a library offers for the same."""
