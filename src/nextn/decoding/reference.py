"""What decoding computes, slowly and plainly: one row, no cache, whole forwards. The batch loop is held to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextn.alignment import embedded_positions, num_final_positions
from nextn.decoding.request import GREEDY
from nextn.decoding.row import RowRandom, RowRequest
from nextn.decoding.sampling import SamplingConfig, choose, transform
from nextn.mtp.model import MTPModel


@torch.inference_mode()
def plain_reference(model: MTPModel, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding without any cache or draft: one whole forward per token. The slow reference; EOS is not special.

    Args:
        model: only its trunk is used; it should be in eval mode.
        prompt_ids: at least one token.
        max_new_tokens: tokens to add.

    Returns:
        The new tokens.
    """
    trunk, token_ids = model.trunk, list(prompt_ids)
    for _ in range(max_new_tokens):
        hidden = trunk.hidden_states(torch.tensor([token_ids], device=trunk.device))
        token_ids.append(int(trunk.output_head(trunk.final_norm(hidden[:, -1])).argmax()))
    return token_ids[len(prompt_ids) :]


@torch.inference_mode()
def speculative_reference(
    model: MTPModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    draft_length: int,
    sampling: SamplingConfig = GREEDY,
    seed: int = 0,
) -> tuple[list[int], list[int]]:
    """Speculative decoding as a specification: drafts as trained, lossless verification (arXiv 2211.17192, alg. 1).

    When greedy, all distributions are one-hot: a draft stays iff it is the target's token, whatever the number drawn.

    Args:
        model: trunk and MTP depths, in eval mode.
        prompt_ids: at least one token.
        max_new_tokens: tokens to add; EOS is not special.
        draft_length: N >= 1, at most the scheme's `max_draft_length`.
        sampling: without a repetition penalty.
        seed: the random numbers are those of prompt 0 of `nextn.generate` with this seed.

    Returns:
        The new tokens, and how many drafts each cycle accepted.
    """
    tokens, num_total, num_accepted = list(prompt_ids), len(prompt_ids) + max_new_tokens, []
    random = RowRandom(RowRequest(0, prompt_ids, max_new_tokens, seed))
    tokens.append(_draw(_target_probs(model, tokens, sampling)[-1], random.first()[0]))
    while len(tokens) < num_total:
        uniforms = random.next(2 * draft_length + 1)  # for N drafts, for their acceptance, for the next token
        num_drafts = min(draft_length, num_total - len(tokens) - 1)
        drafts, draft_probs = _draft(model, tokens, num_drafts, sampling, uniforms)
        target_probs = _target_probs(model, [*tokens, *drafts], sampling)[-num_drafts - 1 :]
        weights, accepted = target_probs[num_drafts], num_drafts  # the bonus follows when all drafts stay
        for step, token in enumerate(drafts):
            if uniforms[draft_length + step] * draft_probs[step][token] >= target_probs[step][token]:
                weights, accepted = (target_probs[step] - draft_probs[step]).clamp(min=0), step  # the correction
                break
        tokens += [*drafts[:accepted], _draw(weights, uniforms[-1])]
        num_accepted.append(accepted)
    return tokens[len(prompt_ids) :], num_accepted


def _draft(
    model: MTPModel, known: Sequence[int], num_drafts: int, sampling: SamplingConfig, uniforms: Tensor
) -> tuple[list[int], list[Tensor]]:
    """Drafts and their distributions, float32 [V] each: depth k embeds t[j+k] at every position j, drafts included."""
    trunk, scheme = model.trunk, model.scheme
    assert scheme is not None, "drafting needs MTP depths"
    tokens, probs = torch.tensor(known, device=trunk.device), []
    positions = torch.arange(num_final_positions(len(known), depth=1), device=trunk.device)
    hidden = trunk.hidden_states(tokens[None, positions])
    state = scheme.trunk_state(hidden, trunk.final_norm(hidden))
    for depth in range(1, num_drafts + 1):
        embedded_ids = tokens[None, embedded_positions(positions, depth)]
        step = scheme.step(trunk, depth, state, embedded_ids, trunk.context(len(positions)))
        probs.append(transform(scheme.head(trunk, depth)(step.head_input[0, -1]), sampling))
        tokens = torch.cat((tokens, tokens.new_tensor([_draw(probs[-1], uniforms[depth - 1])])))
        state = step.carry
    return tokens[len(known) :].tolist(), probs


def _target_probs(model: MTPModel, tokens: Sequence[int], sampling: SamplingConfig) -> Tensor:
    """The trunk's distribution after every token, float32 [T, V]."""
    trunk = model.trunk
    hidden = trunk.hidden_states(torch.tensor([tokens], device=trunk.device))
    return transform(trunk.output_head(trunk.final_norm(hidden[0])), sampling)


def _draw(weights: Tensor, uniform: Tensor) -> int:
    return int(choose(weights[None], uniform[None].to(weights.device)))
