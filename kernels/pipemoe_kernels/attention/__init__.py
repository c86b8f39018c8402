"""What a decoder layer computes around its matrix products and its attention, a kernel for each step."""
