"""The page of a run: its schema, its plots, and the parts that other pages share."""
