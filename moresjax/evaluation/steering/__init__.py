"""Steering a model with vectors of its own states: what is steered (a file for each), and runs."""

from moresjax.evaluation.steering import answers, captions, gender, refusal  # noqa: F401
