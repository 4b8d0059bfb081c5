"""Metrics of the benchmarks: pure functions of strings and numbers, one file per family.

The score of one example is a fraction in 0..1. A summary is a dictionary under the names that the
benchmark's own tool prints; its docstring says where the numbers are percentages.
"""
