"""Tuning: the four kinds of methods, their sites and selectors, and one file per method."""

from moresjax.tuning import methods  # noqa: F401  (methods register themselves)
