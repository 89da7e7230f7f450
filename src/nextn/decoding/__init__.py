"""Lossless speculative decoding: draft with the MTP depths, verify with the trunk, count what was accepted."""

from nextn.decoding.decoder import Decoder
from nextn.decoding.generate import generate
from nextn.decoding.reference import plain_reference, speculative_reference
from nextn.decoding.request import DraftSettings, Request
from nextn.decoding.result import GenerationResult
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.statistics import AcceptanceStatistics
from nextn.decoding.stream import Piece, TokenStream

__all__ = [
    "AcceptanceStatistics",
    "Decoder",
    "DraftSettings",
    "GenerationResult",
    "Piece",
    "Request",
    "SamplingConfig",
    "TokenStream",
    "generate",
    "plain_reference",
    "speculative_reference",
]
