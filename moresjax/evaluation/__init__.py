"""Benchmarks: questions from official files, a model's answers, scores and submissions."""
