"""Metrics of the benchmarks: pure functions of strings and numbers, one file per family.

Scores of one item are fractions in 0..1. Summaries are dictionaries under the names the benchmarks'
own tools print; their docstrings say when these are percentages.
"""
