"""Studies: trains variants of a recipe over seeds and compares them at equal tokens, FLOPs and time."""
