"""Parts of `python -m benchmarks.serve`: traffic, servers, what is watched, scenarios, results."""
