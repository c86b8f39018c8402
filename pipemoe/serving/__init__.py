"""Prefill as a service: requests at any time, on any rank, from any thread."""
