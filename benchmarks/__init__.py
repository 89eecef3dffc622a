"""Benchmarks: each prints ratios measured in one run, and writes its figures to benchmarks/results."""
