"""What a model and its MTP depths cost: parameters, and floating-point operations per trained token."""

from __future__ import annotations

from dataclasses import dataclass

from nextn.model.flops import trunk_flops
from nextn.model.moe import Experts
from nextn.mtp.model import MTPModel


@dataclass(frozen=True)
class ModelCost:
    """Sizes; a parameter shared by several modules counts once.

    Attributes:
        num_parameters: trunk and MTP modules.
        num_active_parameters: of the trunk, without the routed experts that a token does not choose.
        num_mtp_parameters: of the MTP modules' own weights; shared embedding and head are not among them.
        trunk_flops_per_token: forward pass of the trunk and its head, in floating-point operations.
        mtp_flops_per_token: forward pass of all trained depths and their heads.
    """

    num_parameters: int
    num_active_parameters: int
    num_mtp_parameters: int
    trunk_flops_per_token: float
    mtp_flops_per_token: float

    @property
    def mtp_flops_overhead(self) -> float:
        """Extra training cost of MTP, relative to the trunk alone: 0.25 is a quarter more per token."""
        return self.mtp_flops_per_token / self.trunk_flops_per_token


def model_cost(model: MTPModel, sequence_length: int) -> ModelCost:
    """Parameters, and FLOPs per token in rows of `sequence_length` tokens (T).

    Backward passes take twice the forward's operations, so ratios of forward FLOPs are ratios of training FLOPs.
    `nextn.model.flops` says what is counted.
    """
    config = model.config
    num_parameters = sum(p.numel() for p in model.parameters())
    num_mtp = 0 if model.scheme is None else sum(p.numel() for p in model.scheme.parameters())
    unchosen_share = 1 - config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 0.0
    routed = [p for m in model.trunk.modules() if isinstance(m, Experts) for p in m.parameters()]
    num_unchosen = round(unchosen_share * sum(p.numel() for p in routed))
    return ModelCost(
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - num_mtp - num_unchosen,
        num_mtp_parameters=num_mtp,
        trunk_flops_per_token=trunk_flops(config, sequence_length),
        mtp_flops_per_token=0.0 if model.scheme is None else model.scheme.flops_per_token(config, sequence_length),
    )
