"""Conductor, lanes, workspace and the run of a plan."""
