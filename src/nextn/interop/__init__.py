"""Other formats and engines."""
