"""`pipemoe report`: results of the ttft benchmark as one HTML file that needs nothing else."""
