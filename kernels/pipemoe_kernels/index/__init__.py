"""The index: which rows go to which expert, sorted."""
