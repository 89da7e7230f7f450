"""The distribution of sampled text beside the exact one, and a control that the same test must reject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nextn.decoding import SamplingConfig
from nextn.decoding.sampling import choose, transform
from nextn.decoding.verify import Rejection, Verification, Verifier
from nextn.lossless.differences import logits_after
from nextn.lossless.subject import Check, Subject
from nextn.mtp import MTPModel

SAMPLING = SamplingConfig(temperature=1.5, top_k=4)
NUM_LAWS, LAW_CONTEXT, LAW_DRAFTS, LAW_BATCH = 2, 32, 2, 32
"""Prompts whose distribution is tested, tokens of each, N, and rows sampled at a time."""

NUM_SAMPLES = (500, 1000, 2000, 4000)
"""Samples per prompt: the first number at which the control is rejected."""

SIGNIFICANCE = 1e-4
"""A correct sampler fails with this probability; shared among the prompts (Bonferroni)."""


@dataclass(frozen=True)
class WithoutResidual:
    """Broken in the classic way, for the control: after a rejection the next token is drawn from the target itself."""

    name = "without residual"
    is_lossless = False

    def __call__(
        self,
        draft_ids: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        num_drafted: Tensor,
        uniforms: Tensor | None,
    ) -> Verification:
        """Verify one cycle; shapes as in `Verifier`."""
        assert uniforms is not None, "it samples"
        verified = Rejection()(draft_ids, draft_probs, target_probs, num_drafted, uniforms)
        rows = torch.arange(draft_ids.shape[0], device=draft_ids.device)
        next_ids = choose(target_probs[rows, verified.num_accepted], uniforms[:, -1])
        return replace(verified, next_ids=next_ids)


def check_sampling(subject: Subject, say: Callable[[str], None] = lambda _: None) -> Iterator[Check]:
    """The distribution of the first tokens of sampled text beside the trunk's exact probabilities; then the control.

    The prompts end where the trunk is least certain. Only the tokens that one cycle drafts, and the one before them,
    are looked at.
    """
    draft_length = min(LAW_DRAFTS, max(subject.draft_lengths))
    prompts = uncertain_prompts(subject, draft_length + 2)
    distributions = [exact_distribution(subject.model, prompt, draft_length + 1) for prompt in prompts]

    def corrected_p_value(verifier: str | Verifier, num_samples: int, seed: int) -> float:
        decoder = subject.decoder(draft_length, LAW_BATCH, verifier)
        p_values = []
        for prompt, exact in zip(prompts, distributions, strict=True):
            result = decoder.generate(
                [prompt] * num_samples,
                max_new_tokens=draft_length + 2,
                temperature=SAMPLING.temperature,
                top_k=SAMPLING.top_k,
                seed=seed,
                eos_token_id=None,
            )
            p_values.append(chi_square_p_value(exact, [ids[: draft_length + 1] for ids in result.token_ids]))
        return min(1.0, len(p_values) * min(p_values))

    for num_samples in NUM_SAMPLES:
        say(f"sampling {num_samples} times with a broken verifier")
        control = corrected_p_value(WithoutResidual(), num_samples, seed=1)
        if control < SIGNIFICANCE:
            break
    say(f"sampling {num_samples} times")
    p_value = corrected_p_value("rejection", num_samples, seed=0)
    total = num_samples * len(prompts)
    passed = p_value >= SIGNIFICANCE
    finding = f"chi-square p = {p_value:.2g}"
    how = f"temperature {SAMPLING.temperature}, top-k {SAMPLING.top_k}"
    compared = f"distribution of {draft_length + 1} sampled tokens ({how})"
    evidence = {"p_value": p_value, "limit": SIGNIFICANCE, "prompts": prompts}
    yield Check(
        "sampling", f"{compared} with exact probabilities", total, passed, finding, () if passed else (evidence,)
    )
    has_power = control < SIGNIFICANCE
    finding = f"p = {control:.2g}: " + ("rejected, as it must be" if has_power else "no power, not rejected")
    evidence = {"p_value": control, "limit": SIGNIFICANCE, "num_samples": total}
    compared = "the same for a verifier without the residual"
    yield Check("control", compared, total, has_power, finding, () if has_power else (evidence,))


@torch.inference_mode()
def uncertain_prompts(subject: Subject, num_new: int) -> list[list[int]]:
    """Pieces of the prompts that end where the next token is least certain, at most `LAW_CONTEXT` tokens each."""
    trunk = subject.model.trunk
    found = []
    for prompt in subject.prompts:
        hidden = trunk.hidden_states(torch.tensor([prompt], device=trunk.device))
        probs = transform(trunk.output_head(trunk.final_norm(hidden[0])), SAMPLING)
        entropy = torch.special.entr(probs).sum(-1)
        first = min(LAW_CONTEXT // 2, len(prompt) - 1)
        end = first + int(entropy[first:].argmax()) + 1
        context = min(LAW_CONTEXT, trunk.max_position_embeddings - num_new)
        found.append((float(entropy[end - 1]), prompt[max(end - context, 0) : end]))
    found.sort(reverse=True)
    return [prompt for _, prompt in found[:NUM_LAWS]]


@torch.inference_mode()
def exact_distribution(model: MTPModel, prompt: list[int], num_new: int) -> dict[tuple[int, ...], float]:
    """Probability of every continuation by `num_new` tokens under plain sampling, from whole forwards."""
    distribution: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num_new):
        probs = transform(logits_after(model.trunk, [[*prompt, *tokens] for tokens in distribution]), SAMPLING)
        extended = {}
        for row, (tokens, weight) in enumerate(distribution.items()):
            for token in probs[row].nonzero()[:, 0].tolist():
                extended[(*tokens, token)] = weight * float(probs[row, token])
        distribution = extended
    return distribution


def chi_square_p_value(distribution: dict[tuple[int, ...], float], samples: Sequence[tuple[int, ...]]) -> float:
    """Probability of a fit as bad as this one or worse, if the samples follow it: Pearson's chi-square test.

    Outcomes expected fewer than 5 times are pooled; one that the distribution excludes gives 0.

    Of 100 throws of a coin 60 are heads: the statistic is 4, with one degree of freedom:

    >>> round(chi_square_p_value({(0,): 0.5, (1,): 0.5}, [(0,)] * 60 + [(1,)] * 40), 4)
    0.0455
    """
    observed = Counter(samples)
    if observed.keys() - distribution.keys():
        return 0.0
    cells, rest = [], [0.0, 0.0]
    for outcome, prob in distribution.items():
        seen, expected = float(observed[outcome]), len(samples) * prob
        if expected >= 5:
            cells.append((seen, expected))
        else:
            rest = [rest[0] + seen, rest[1] + expected]
    if rest[1] > 0:
        cells.append((rest[0], rest[1]))
    if len(cells) < 2:
        return 1.0
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    half_freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2, dtype=torch.float64)))
