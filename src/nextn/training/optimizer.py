"""The optimizer of a run: AdamW, or Muon for hidden matrices and AdamW for the rest; and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from nextn.config import OptimizerConfig
from nextn.errors import CheckpointError
from nextn.training.muon import BatchedMuon

Role = Literal["matrix", "embedding", "router", "factor", "kernel", "vector"]


def learning_rate_factor(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of a step relative to the peak, in [0, 1].

    Linear warm-up reaches 1 at the last warm-up step; from there `cosine` falls to `final_learning_rate_ratio` at the
    last step, `wsd` stays at 1 and falls linearly over the last `decay_share` of all steps, `constant` stays at 1. A
    wsd decay that would start within the warm-up starts after it.

    Args:
        config: schedule, num_warmup_steps, decay_share, final_learning_rate_ratio.
        step: 0-based index of the step about to be taken.
        num_steps: steps of the whole run.

    Raises:
        ValueError: step lies outside 0..num_steps - 1.

    >>> config = OptimizerConfig(schedule="cosine", num_warmup_steps=2, final_learning_rate_ratio=0.5)
    >>> [round(learning_rate_factor(config, step, 4), 2) for step in range(4)]
    [0.5, 1.0, 0.75, 0.5]
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step must lie in 0..{num_steps - 1}, got {step}")
    num_done = step + 1
    if num_done <= config.num_warmup_steps:
        return num_done / config.num_warmup_steps
    if config.schedule == "constant":
        return 1.0
    final = config.final_learning_rate_ratio
    if config.schedule == "cosine":
        progress = (num_done - config.num_warmup_steps) / (num_steps - config.num_warmup_steps)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    start = max(num_steps - round(config.decay_share * num_steps), config.num_warmup_steps)
    return 1.0 if num_done <= start else 1 - (1 - final) * (num_done - start) / (num_steps - start)


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """What every parameter is to the optimizer, by name, from the module that holds it.

    `embedding`: an embedding table, or the trunk's output head; `router`: what scores experts, and a gate of one row;
    `factor`: low-rank factors beside a frozen matrix; `kernel`: what convolves, or a stack of matrices that lie
    transposed; `vector`: norms and biases; `matrix`: every other weight, stacks of expert matrices included. Muon is
    for matrices alone: it makes all directions of a weight equally long, as a map between hidden states may be.

    >>> list(parameter_roles(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))).values())
    ['embedding', 'matrix', 'vector']
    """
    trunk = getattr(model, "trunk", None)
    head = None if trunk is None else trunk.output_head.weight
    roles: dict[str, Role] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        is_scored = path.rpartition(".")[2] in _ROUTERS
        for parameter in module.parameters(recurse=False):
            role = _role(names[parameter], parameter, module, is_scored)
            roles[names[parameter]] = "embedding" if parameter is head else roles.get(names[parameter], role)
    return {name: roles[name] for name in names.values()}


_ROUTERS = ("gate", "router", "shared_expert_gate")
"""What modules that score experts are called, in every family."""


def _role(name: str, parameter: Tensor, module: nn.Module, is_scored: bool) -> Role:
    if parameter.ndim < 2:
        return "vector"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if ".lora_" in name:
        return "factor"
    if isinstance(module, nn.Conv1d) or getattr(module, "is_transposed", False):
        return "kernel"
    return "router" if is_scored or 1 in parameter.shape[-2:] else "matrix"


class TrainingOptimizer:
    """Steps a model's parameters, each once however many modules share it.

    With `adamw` everything is AdamW. With `muon`, hidden matrices (role `matrix`, of trunk and MTP modules alike) go to
    Muon at `muon_learning_rate`, and the rest to AdamW at `learning_rate`. Weight decay applies to whatever has two or
    more dimensions. Muon's rate is scaled by sqrt(max(1, rows / columns)), under which 0.02 is the usual peak.

    Args:
        model: its `named_parameters` that require gradients are stepped.
        config: rates, decay, schedule.
        num_steps: steps of the whole run, which the schedule needs.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, num_steps: int) -> None:
        self.config = config
        self.num_steps = num_steps
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        every = parameter_roles(model)
        roles = {name: every[name] for name in self.parameters}
        by_muon = [name for name, role in roles.items() if config.name == "muon" and role == "matrix"]
        by_adamw = [name for name in roles if name not in set(by_muon)]
        self._optimizer_of: dict[str, torch.optim.Optimizer] = {}
        self._peaks: list[tuple[torch.optim.Optimizer, float]] = []  # each optimizer with its peak learning rate
        if by_adamw:
            self._add(self._adamw(by_adamw, roles), by_adamw, config.learning_rate)
        if by_muon:
            self._add(self._muon(by_muon), by_muon, config.muon_learning_rate)

    def _add(self, optimizer: torch.optim.Optimizer, names: list[str], peak: float) -> None:
        self._peaks.append((optimizer, peak))
        self._optimizer_of.update(dict.fromkeys(names, optimizer))

    def _adamw(self, names: list[str], roles: dict[str, Role]) -> torch.optim.AdamW:
        config = self.config
        decayed = [self.parameters[name] for name in names if roles[name] != "vector"]
        vectors = [self.parameters[name] for name in names if roles[name] == "vector"]
        groups = [
            {"params": members, "weight_decay": weight_decay}
            for members, weight_decay in ((decayed, config.weight_decay), (vectors, 0.0))
            if members
        ]
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)

    def _muon(self, names: list[str]) -> BatchedMuon:
        stacked = [name for name in names if name.endswith("gate_up_proj")]  # gate above up: two matrices per expert
        single = [name for name in names if name not in set(stacked)]
        groups = [
            {"params": [self.parameters[name] for name in members], "row_blocks": row_blocks}
            for members, row_blocks in ((single, 1), (stacked, 2))
            if members
        ]
        config = self.config
        return BatchedMuon(
            groups, lr=config.muon_learning_rate, momentum=config.muon_momentum, weight_decay=config.weight_decay
        )

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Those that there are."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def non_finite_gradients(self) -> list[str]:
        """Names of the parameters whose gradient holds a NaN or an infinity."""
        return [name for name, p in self.parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]

    def step(self, step: int, grad_norm: Tensor) -> float:
        """Clip the gradients to `max_grad_norm` and take step `step` (0-based); returns AdamW's learning rate."""
        if self.config.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, grad_norm)
        factor = learning_rate_factor(self.config, step, self.num_steps)
        for optimizer, peak in self._peaks:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        return self.config.learning_rate * factor

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Moments and step counts by parameter and quantity; `load_state_dict` takes them back."""
        return {
            name: dict(self._optimizer_of[name].state[parameter])
            for name, parameter in self.parameters.items()
            if self._optimizer_of[name].state.get(parameter)
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: a tensor belongs to no parameter of this model, or has another shape.
        """
        restored: dict[str, dict[str, Tensor]] = {}
        for name, quantities in state.items():
            parameter = self.parameters.get(name)
            for key, tensor in quantities.items():
                if parameter is None or tensor.shape not in (parameter.shape, torch.Size([])):
                    here = "no such parameter" if parameter is None else f"the parameter is {tuple(parameter.shape)}"
                    raise CheckpointError(
                        f"optimizer state {f'{name}/{key}'!r} of shape {tuple(tensor.shape)} does not fit this model: "
                        f"{here}; resume with the recipe the checkpoint was trained with"
                    )
                restored.setdefault(name, {})[key] = tensor.to(parameter.device, copy=True)
        for name, parameter in self.parameters.items():
            held = self._optimizer_of[name].state
            held.pop(parameter, None)
            if name in restored:
                held[parameter] = restored[name]
