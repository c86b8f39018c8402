"""`pipemoe tune`: measures the costs of operations on this machine, and fits a cost model to them."""
