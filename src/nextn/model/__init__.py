"""The trunk: a DeepSeek-V3 transformer (MLA, mixture of experts) and the `Trunk` protocol. Knows nothing of MTP."""

from nextn.model.cache import Cache, LayerCache
from nextn.model.context import LayerContext
from nextn.model.transformer import Transformer
from nextn.model.trunk import Trunk

__all__ = ["Cache", "LayerCache", "LayerContext", "Transformer", "Trunk"]
