"""Lossless speculative decoding: draft with the MTP depths, verify with the trunk, count what was accepted."""

from nextn.decoding.decoder import Decoder, GenerationResult, Piece, TokenStream
from nextn.decoding.generate import generate, plain_reference
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.statistics import AcceptanceStatistics

__all__ = [
    "AcceptanceStatistics",
    "Decoder",
    "GenerationResult",
    "Piece",
    "SamplingConfig",
    "TokenStream",
    "generate",
    "plain_reference",
]
