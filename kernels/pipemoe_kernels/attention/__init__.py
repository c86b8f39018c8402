"""What a decoder layer computes around its matrix products, a kernel for each step; attention itself is forward.py."""
