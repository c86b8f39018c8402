"""Grouped GEMMs, and what they share: tile shapes, rasters, rings, roles of warps."""
