"""Measurements that print a table and append one JSON row a run to benchmarks/results/. Imports kernels and components only.

Model shapes come from shapes.json, which `python -m framework.shapes` writes from the option files; a test fails when it is stale.
"""
