"""Which part of a run this process has: one process on one device is the special case of many."""

from nextn.distributed.world import OneProcess, World

__all__ = ["OneProcess", "World"]
