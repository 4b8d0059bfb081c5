"""The version, which every package may know."""

__version__ = "0.2.0"
