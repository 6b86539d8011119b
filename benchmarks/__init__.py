"""Benchmarks, one module a suite; `python -m benchmarks` runs them."""
