"""Benchmarks; see docs/benchmarks.md. Each runs as a script and by `python -m`."""
