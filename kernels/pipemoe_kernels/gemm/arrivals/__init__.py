"""Grouped GEMMs that take rows as they arrive."""
