"""What operations cost: the model, its defaults, files, fits, and the dimensions and devices that they come from."""
