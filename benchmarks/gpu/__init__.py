"""Bring-up of a GPU: `python -m benchmarks gpu --out DIR`; stages.py has the command."""
