"""Multi-token prediction: the schemes, one file each, their common interface, and the model that carries one."""

from nextn.mtp.model import MTPModel, MTPOutput
from nextn.mtp.pretrained import find_checkpoint, load_model, save_model
from nextn.mtp.scheme import DepthState, Scheme
from nextn.mtp.sequential import Sequential

__all__ = ["DepthState", "MTPModel", "MTPOutput", "Scheme", "Sequential", "find_checkpoint", "load_model", "save_model"]
