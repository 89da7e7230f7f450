"""Studies: a grid of training runs times seeds, compared at equal tokens, FLOPs and time, with honest intervals."""
