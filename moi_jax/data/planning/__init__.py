"""Which instruction stands in which group in which row, from lengths alone."""
