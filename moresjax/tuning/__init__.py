"""Tuning methods. To add one: write its file beside the others and import it here."""

from moresjax.tuning import full, ia3, lora, mores, prompt

__all__ = ["full", "ia3", "lora", "mores", "prompt"]
