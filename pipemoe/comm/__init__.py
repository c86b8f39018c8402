"""World, exchange, side channel and the transports."""
