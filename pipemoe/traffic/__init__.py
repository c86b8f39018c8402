"""Requests over time: traces, arrival times, and how well they were served; measured, or simulated without a model."""
