"""Benchmarks; see README.md. Each runs as a script and by `python -m`."""
