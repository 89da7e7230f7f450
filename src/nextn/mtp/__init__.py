"""Multi-token prediction: the schemes, one file each, their common interface, and the model that carries one."""

from nextn.mtp.model import MTPModel, MTPOutput, TrunkStates
from nextn.mtp.registry import SCHEMES, check_scheme
from nextn.mtp.released import load_model
from nextn.mtp.scheme import DepthState, Scheme
from nextn.mtp.store import find_checkpoint, save_model

__all__ = [
    "SCHEMES",
    "DepthState",
    "MTPModel",
    "MTPOutput",
    "Scheme",
    "TrunkStates",
    "check_scheme",
    "find_checkpoint",
    "load_model",
    "save_model",
]
