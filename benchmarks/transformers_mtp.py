"""The peer of `train_step.py`: transformers' DeepseekV3ForCausalLM with MTP written the obvious way.

Modules of transformers only: its decoder layer, its norm, `nn.Linear`; whole logits of every depth, and
`F.cross_entropy` on them, as one would write it after reading arXiv 2412.19437 section 2.2. The weights come from our
model, so both compute the same loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from nextn.mtp import MTPModel
from nextn.mtp.config_file import config_table


class Module(nn.Module):
    """One depth of equations 21-23."""

    def __init__(self, config: DeepseekV3Config, layer_index: int):
        super().__init__()
        self.enorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = DeepseekV3DecoderLayer(config, layer_index)
        self.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)})


class TransformersMTP(nn.Module):
    """transformers' trunk and K modules after it, with the weights of `ours`."""

    def __init__(self, ours: MTPModel, experts: str):
        super().__init__()
        table = config_table(ours)
        config = DeepseekV3Config(**{key: value for key, value in table.items() if key not in ("nextn", "torch_dtype")})
        config._experts_implementation = experts
        config.use_cache = False
        self.trunk = DeepseekV3ForCausalLM(config)
        self.trunk.load_state_dict(ours.trunk.state_dict())
        self.depths = nn.ModuleList(Module(config, config.num_hidden_layers - 1) for _ in range(ours.num_depths))
        for theirs, module in zip(self.depths, ours.scheme.layers if ours.scheme is not None else (), strict=True):
            theirs.load_state_dict(module.state_dict())
        self.train()

    def forward(self, input_ids: Tensor, depth_weights: tuple[float, ...]) -> Tensor:
        """main + sum of weight * L_k, each L_k a mean over its own labels."""
        trunk = self.trunk
        hidden = trunk.model(input_ids).last_hidden_state
        loss = cross_entropy(trunk.lm_head(hidden[:, :-1]), input_ids[:, 1:])
        for depth, (module, weight) in enumerate(zip(self.depths, depth_weights, strict=True), start=1):
            length = input_ids.shape[1] - depth
            embedded = module.enorm(trunk.model.embed_tokens(input_ids[:, depth:]))
            joined = module.eh_proj(torch.cat((embedded, module.hnorm(hidden[:, :length])), dim=-1))
            positions = torch.arange(length, device=input_ids.device)[None]
            out = module.block(
                joined,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=trunk.model.rotary_emb(joined, positions),
            )
            hidden = module.shared_head["norm"](out)
            loss = loss + weight * cross_entropy(trunk.lm_head(hidden[:, :-1]), input_ids[:, depth + 1 :])
        return loss


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
