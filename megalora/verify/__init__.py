"""Compare our model with a reference before it trains: one layer of each kind, and the loss of the
first microbatch."""
