"""This version of pipemoe."""

__version__ = "0.2.0"
