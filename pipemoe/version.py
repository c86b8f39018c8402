"""This version of pipemoe."""

__version__ = "0.1.0"
