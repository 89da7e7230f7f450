"""Lossless speculative decoding: draft with the MTP depths, verify with the trunk, count what was accepted."""

from nextn.decoding.generate import GenerationResult, generate, plain_reference
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.statistics import AcceptanceStatistics

__all__ = ["AcceptanceStatistics", "GenerationResult", "SamplingConfig", "generate", "plain_reference"]
