"""Rolling steps: each slot steps by itself, in rounds that all ranks agree on."""
