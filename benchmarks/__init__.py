"""Measurements that print a table and append one JSON row a run to benchmarks/results/. Imports kernels and components only."""
