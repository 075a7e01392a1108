"""Measurements of the code: each prints a table, writes JSON, and runs as `python -m benchmarks.NAME`."""
