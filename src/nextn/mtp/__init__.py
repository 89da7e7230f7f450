"""Multi-token prediction: the schemes, one file each, their common interface, and the model that carries one."""

from nextn.mtp.model import MTPModel, MTPOutput
from nextn.mtp.scheme import DepthState, Scheme
from nextn.mtp.sequential import Sequential
from nextn.mtp.storage import find_checkpoint, load_model, save_model

__all__ = ["DepthState", "MTPModel", "MTPOutput", "Scheme", "Sequential", "find_checkpoint", "load_model", "save_model"]
