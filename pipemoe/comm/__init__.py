"""How ranks reach one another: exchanges, the side channel and the transports."""
