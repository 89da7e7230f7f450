"""Other formats and engines: transformers' models as trunks, families of checkpoints, GGUF, and what engines accept.

Names and shapes are mapped here, never behaviour. Nothing in this package imports transformers before it is needed.
"""
