"""The lossless suite: does a model decode with drafts what it decodes without them? On any checkpoint, with evidence.

| check | what must hold |
|---|---|
| `no cache` | greedy texts, plain and with drafts, are those of one whole forward per token |
| `greedy` | greedy texts for every N and batch size are those of plain decoding |
| `eos` | a row ends at an EOS inside an accepted draft, nowhere else |
| `full accept` | drafts that are all right are all accepted, and the texts are those of plain decoding |
| `zero accept` | drafts that are all wrong are all refused, and the texts are those of plain decoding |
| `rollback` | after random accepted lengths, cached trunk states are those recomputed from scratch |
| `sampling` | sampled text has the law of the trunk: chi-square against exact probabilities |
| `control` | the same test rejects a verifier without the residual; else it has no power, and nothing was shown |

Greedy checks hold in float32 up to near ties (`NEAR_TIE`), which are counted: a forward of one token and one of several
round differently. In bfloat16 that happens often enough to be measured (`bfloat16_divergence`), which is no check.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nextn.decoding import Decoder, GenerationResult, SamplingConfig, plain_reference
from nextn.decoding.batch import Batch, Rules
from nextn.decoding.decoder import PROMPT_LOOKUP
from nextn.decoding.draft import BatchTokens, Drafts
from nextn.decoding.policy import FixedLength
from nextn.decoding.request import longest_draft
from nextn.decoding.rows import Job, Row
from nextn.decoding.sampling import choose, transform
from nextn.decoding.steps import Steps
from nextn.decoding.verify import Exact, Rejection, Verification, Verifier
from nextn.model import Trunk
from nextn.mtp import MTPModel

DRAFT_LENGTHS = (1, 2, 3)
BATCH_SIZES = (1, 4)
NUM_UNCACHED, UNCACHED_TOKENS = 2, 32
"""Prompts decoded without a cache, and new tokens of each."""

NEAR_TIE = 2e-5
"""Two logits are tied in float32 when they differ by at most this share of the largest absolute logit."""

STATE_TOLERANCE = 1e-3
"""Largest difference between cached and recomputed states, relative to the largest absolute state."""

SAMPLING = SamplingConfig(temperature=1.5, top_k=4)
NUM_LAWS, LAW_CONTEXT, LAW_DRAFTS, LAW_BATCH = 2, 32, 2, 32
"""Prompts whose law is tested, tokens of each, N, and rows sampled at a time."""

NUM_SAMPLES = (500, 1000, 2000, 4000)
"""Samples per prompt: the first number at which the control is rejected."""

SIGNIFICANCE = 1e-4
"""A correct sampler fails with this probability; shared among the prompts (Bonferroni)."""


@dataclass(frozen=True)
class Check:
    """One check and its outcome.

    Attributes:
        name: see the table at the top of this module.
        compared: what with what.
        num_compared: texts, rows or samples compared.
        passed: the verdict; None: measured only.
        finding: the outcome in a line.
        evidence: of a failure: first differing prompt, position, tokens, margins; or p-values.
    """

    name: str
    compared: str
    num_compared: int
    passed: bool | None
    finding: str
    evidence: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Subject:
    """What is verified.

    Attributes:
        model: in float32 and eval mode.
        prompts: token ids, at least one.
        max_new_tokens: tokens decoded after each, at least 2.
        drafter: "mtp", or "prompt_lookup" for a model that has no MTP depths.
        draft_lengths: every N that is tried.
    """

    model: MTPModel
    prompts: tuple[list[int], ...]
    max_new_tokens: int
    drafter: str = field(init=False)
    draft_lengths: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        longest = longest_draft(self.model)
        lengths = DRAFT_LENGTHS[:longest] if longest else DRAFT_LENGTHS
        object.__setattr__(self, "drafter", PROMPT_LOOKUP if longest == 0 else "mtp")
        object.__setattr__(self, "draft_lengths", lengths)

    def decoder(self, draft_length: int, batch_size: int, verifier: str | Verifier = "auto") -> Decoder:
        """What decodes with the model's own drafts; N = 0 is plain decoding."""
        return Decoder(
            self.model, batch_size=batch_size, draft_length=draft_length, drafter=self.drafter, verifier=verifier
        )

    def greedy(self, draft_length: int, batch_size: int, eos_token_id: int | None = None) -> GenerationResult:
        """All prompts, continued greedily."""
        decoder = self.decoder(draft_length, batch_size)
        return decoder.generate(self.prompts, max_new_tokens=self.max_new_tokens, eos_token_id=eos_token_id)


def lossless_checks(subject: Subject, say: Callable[[str], None] = lambda _: None) -> Iterator[Check]:
    """All checks in turn, each as soon as it is done.

    Args:
        subject: what is verified.
        say: told what begins.
    """
    say("decoding plainly")
    plain = [list(ids) for ids in subject.greedy(0, 1).token_ids]
    results = {}
    for draft_length in subject.draft_lengths:
        for batch_size in BATCH_SIZES:
            say(f"decoding with N = {draft_length}, batch {batch_size}")
            results[draft_length, batch_size] = subject.greedy(draft_length, batch_size)
    say("decoding without a cache")
    yield check_no_cache(subject, plain, results)
    yield check_greedy(subject, plain, results)
    say("ending rows inside drafts")
    yield check_eos(subject, plain, results)
    say("drafting what comes, and what does not")
    yield check_scripted(subject, plain, are_right=True)
    yield check_scripted(subject, plain, are_right=False)
    say("rolling caches back")
    yield check_rollback(subject, plain)
    say("sampling")
    yield from check_sampling(subject, say)


# -------------------------------------------------------------------------------------------------------- greedy texts


@dataclass(frozen=True)
class Difference:
    """The first place where a text differs from the expected one.

    Attributes:
        setting: how it was decoded.
        prompt: which, 0-based.
        position: of the new token, 0-based.
        expected, got: token ids there; None: the text has ended.
        top_two_margin: by how much the model's largest logit exceeds the second, there.
        is_near_tie: both tokens are the most likely one up to rounding in float32.
    """

    setting: str
    prompt: int
    position: int
    expected: int | None
    got: int | None
    top_two_margin: float
    is_near_tie: bool


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The first place where two texts differ, 0-based; None if they are equal.

    >>> first_difference([5, 6, 7], [5, 6, 8]), first_difference([5, 6], [5]), first_difference([5], [5])
    (2, 1, None)
    """
    for position, (one, other) in enumerate(zip(expected, got, strict=False)):
        if one != other:
            return position
    return None if len(expected) == len(got) else min(len(expected), len(got))


def differences(
    subject: Subject, expected: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], setting: str
) -> list[Difference]:
    """Of each text that differs from the expected one, the first place; of as many prompts as are expected."""
    found = []
    for number, (wanted, text) in enumerate(zip(expected, texts, strict=True)):
        if (position := first_difference(wanted, text)) is not None:
            found.append(_difference(subject, number, wanted, text, position, setting))
    return found


@torch.inference_mode()
def _difference(
    subject: Subject, number: int, expected: Sequence[int], text: Sequence[int], position: int, setting: str
) -> Difference:
    wanted, got = (ids[position] if position < len(ids) else None for ids in (expected, text))
    logits = _logits_after(subject.model.trunk, [[*subject.prompts[number], *expected[:position]]])[0].float()
    best, second = logits.topk(2).values.tolist()
    lowest = best - NEAR_TIE * float(logits.abs().max())
    is_near_tie = all(token is not None and float(logits[token]) >= lowest for token in (wanted, got))
    return Difference(setting, number, position, wanted, got, best - second, is_near_tie)


def _logits_after(trunk: Trunk, rows: list[list[int]]) -> Tensor:
    """Logits of the token after each row, without a cache; rows of one length, [B, V]."""
    hidden = trunk.hidden_states(torch.tensor(rows, device=trunk.device))
    return trunk.output_head(trunk.final_norm(hidden[:, -1]))


def _text_check(name: str, compared: str, num_compared: int, found: Sequence[Difference]) -> Check:
    wrong = [difference for difference in found if not difference.is_near_tie]
    if wrong:
        first = wrong[0]
        finding = (
            f"{len(wrong)} texts differ; first: {first.setting}, prompt {first.prompt}, new token {first.position}: "
            f"{first.got} in place of {first.expected}"
        )
    elif found:
        margin = max(difference.top_two_margin for difference in found)
        finding = f"equal up to {len(found)} near ties (margins up to {margin:.1e})"
    else:
        finding = "all equal"
    return Check(name, compared, num_compared, not wrong, finding, tuple(vars(one) for one in wrong or found))


Results = dict[tuple[int, int], GenerationResult]
"""Greedy results by (N, batch size)."""


def _setting(draft_length: int, batch_size: int) -> str:
    return f"N = {draft_length}, batch {batch_size}"


def check_no_cache(subject: Subject, plain: Sequence[list[int]], results: Results) -> Check:
    """Beginnings of a few texts beside the slow reference; `plain` is cached plain decoding of all prompts."""
    prompts, num_new = subject.prompts[:NUM_UNCACHED], min(UNCACHED_TOKENS, subject.max_new_tokens)
    expected = [plain_reference(subject.model, prompt, num_new) for prompt in prompts]
    found: list[Difference] = []
    num_compared = 0
    for setting, texts in [("plain", plain), *((_setting(*key), one.token_ids) for key, one in results.items())]:
        found += differences(subject, expected, [ids[:num_new] for ids in texts[: len(prompts)]], setting)
        num_compared += len(prompts)
    return _text_check("no cache", f"{num_new} tokens with one whole forward per token", num_compared, found)


def check_greedy(subject: Subject, plain: Sequence[list[int]], results: Results) -> Check:
    """All texts for every N and batch size beside plain decoding."""
    found = []
    for key, result in results.items():
        found += differences(subject, plain, result.token_ids, _setting(*key))
    lengths, sizes = ", ".join(map(str, subject.draft_lengths)), ", ".join(map(str, BATCH_SIZES))
    compared = f"{subject.max_new_tokens} tokens at N = {lengths}, batch {sizes}, with plain decoding"
    return _text_check("greedy", compared, len(results) * len(plain), found)


def check_eos(subject: Subject, plain: Sequence[list[int]], results: Results) -> Check:
    """Every text cut by an EOS that stands inside an accepted draft, beside the plain text up to there.

    For each N the EOS is a token that was drafted and accepted; where none was, and to be sure, one that drafts which
    are all right contain.
    """
    found, num_compared, in_drafts = [], 0, []
    for (draft_length, batch_size), result in results.items():
        eos = _accepted_token(results[draft_length, BATCH_SIZES[0]])
        if eos is None:
            continue
        in_drafts.append(eos)
        expected = [_up_to(ids, eos) for ids in plain]
        setting = f"{_setting(draft_length, batch_size)}, EOS {eos}"
        found += differences(subject, expected, subject.greedy(draft_length, batch_size, eos).token_ids, setting)
        num_compared += len(result.token_ids)
    eos = plain[0][min(2, len(plain[0]) - 1)]
    expected = [_up_to(ids, eos) for ids in plain]
    for batch_size in BATCH_SIZES:
        script = Script(subject, plain, num_right=lambda: max(subject.draft_lengths))
        ended = [row.token_ids for row in script.decode(batch_size, eos)]
        setting = f"right drafts, batch {batch_size}, EOS {eos}"
        found += differences(subject, expected, ended, setting)
        num_compared += len(plain)
    compared = f"texts up to an EOS among accepted drafts (tokens {', '.join(map(str, sorted({*in_drafts, eos})))})"
    return _text_check("eos", compared, num_compared, found)


def _accepted_token(result: GenerationResult) -> int | None:
    """The accepted draft that first occurs latest in its text, so that most of the text comes before it."""
    places = {
        (ids.index(token_id), token_id)
        for ids, origins in zip(result.token_ids, result.origins, strict=True)
        for token_id, origin in zip(ids, origins, strict=True)
        if origin and origins[ids.index(token_id)]
    }
    return max(places)[1] if places else None


def _up_to(token_ids: list[int], eos: int) -> list[int]:
    return token_ids[: token_ids.index(eos) + 1] if eos in token_ids else token_ids


# ------------------------------------------------------------------------------------------------- drafts as one wishes


class Script:
    """Decodes greedily from drafts that know the plain texts, and takes note of the trunk's states.

    Args:
        subject: its prompts are decoded, with the largest of its draft lengths.
        plain: their plain continuations.
        num_right: called for every row and cycle; so many of its drafts are right, and all after them wrong.

    Attributes:
        final_states: by prompt, the trunk's states (before its final norm) of all tokens but those of the last cycle,
            as the cache gave them, [n, C].
    """

    def __init__(self, subject: Subject, plain: Sequence[list[int]], num_right: Callable[[], int]):
        self._subject, self._num_right = subject, num_right
        self._texts = [[*prompt, *ids] for prompt, ids in zip(subject.prompts, plain, strict=True)]
        self._draft_length = max(subject.draft_lengths)
        self.final_states: dict[int, Tensor] = {}

    def decode(self, batch_size: int, eos_token_id: int | None = None) -> list[Row]:
        """All prompts, through `batch_size` places."""
        subject, trunk = self._subject, self._subject.model.trunk
        capacity = max(map(len, self._texts))
        self._states = torch.zeros(batch_size, capacity, trunk.hidden_size, device=trunk.device)
        self._numbers = [0] * batch_size
        batch = Batch(trunk, self, batch_size, capacity, Steps(trunk.device, compiled=False))
        jobs = [Job(number, prompt, subject.max_new_tokens) for number, prompt in enumerate(subject.prompts)]
        rules = Rules(SamplingConfig(), Exact(), eos_token_id)
        rows: dict[int, Row] = {}
        for changed in batch.decode(iter(jobs), FixedLength(self._draft_length), rules):
            rows |= {row.job.number: row for row in changed}
        return [rows[number] for number in range(len(jobs))]

    def begin(self, place: int, token_ids: Tensor, num_known: int) -> None:
        """See `Drafter`; which prompt it is shows in its tokens."""
        self._numbers[place] = self._subject.prompts.index(token_ids[:num_known].tolist())

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor, first_place: int = 0) -> None:
        """See `Drafter`."""
        states = self._states[first_place : first_place + positions.shape[0]]
        states.scatter_(1, positions[..., None].expand_as(hidden), hidden)

    def draft(
        self, tokens: BatchTokens, num_draft_tokens: int, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Drafts:
        """See `Drafter`."""
        vocab_size = self._subject.model.trunk.vocab_size
        rows = []
        for place, known in enumerate(tokens.num_known):
            text, num_right = self._texts[self._numbers[place]], self._num_right()
            coming = [*text[known : known + num_draft_tokens], *[0] * num_draft_tokens][:num_draft_tokens]
            rows.append([(token + (step >= num_right)) % vocab_size for step, token in enumerate(coming)])
        return Drafts(torch.tensor(rows, device=tokens.token_ids.device))

    def roll_back(self, num_final: Sequence[int]) -> None:
        """See `Drafter`."""
        for place, final in enumerate(num_final):
            self.final_states[self._numbers[place]] = self._states[place, :final].clone()

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """See `Drafter`."""
        self._states[target] = self._states[source]
        self._numbers[target] = self._numbers[source]


def check_scripted(subject: Subject, plain: Sequence[list[int]], are_right: bool) -> Check:
    """Texts from drafts that are all right, or all wrong; each must be accepted, or none."""
    found, wrongly, num_drafted = [], 0, 0
    for batch_size in BATCH_SIZES:
        script = Script(subject, plain, num_right=lambda: max(subject.draft_lengths) if are_right else 0)
        rows = script.decode(batch_size)
        setting = f"batch {batch_size}"
        found += differences(subject, plain, [row.token_ids for row in rows], setting)
        for drafted, accepted in (cycle for row in rows for cycle in row.cycles):
            num_drafted += drafted
            wrongly += drafted - accepted if are_right else accepted
    name, kind = ("full accept", "right") if are_right else ("zero accept", "wrong")
    compared = f"texts from drafts that are all {kind}, N = {max(subject.draft_lengths)}, with plain decoding"
    check = _text_check(name, compared, len(BATCH_SIZES) * len(plain), found)
    if wrongly and not found:
        finding = f"of {num_drafted} {kind} drafts {wrongly} were {'refused' if are_right else 'accepted'}"
        return replace(check, passed=False, finding=finding, evidence=({"num_wrongly_judged": wrongly},))
    return check


@torch.inference_mode()
def check_rollback(subject: Subject, plain: Sequence[list[int]], seed: int = 0) -> Check:
    """States from the trunk's cache after random accepted lengths beside those of one whole forward."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(subject.draft_lengths)
    evidence, largest, num_states = [], 0.0, 0
    for batch_size in BATCH_SIZES:
        script = Script(subject, plain, lambda: int(torch.randint(longest + 1, (), generator=generator)))
        rows = script.decode(batch_size)
        for number, states in script.final_states.items():
            tokens = [*subject.prompts[number], *rows[number].token_ids][: len(states)]
            trunk = subject.model.trunk
            expected = trunk.hidden_states(torch.tensor([tokens], device=trunk.device))[0]
            errors = (states - expected).abs().amax(-1) / expected.abs().max()
            error = float(errors.max())
            largest, num_states = max(largest, error), num_states + len(states)
            if not error <= STATE_TOLERANCE:
                position = int((~(errors <= STATE_TOLERANCE)).nonzero()[0])
                evidence.append({"batch_size": batch_size, "prompt": number, "position": position, "error": error})
    finding = f"largest relative difference {largest:.1e}"
    if evidence:
        first = evidence[0]
        finding += f"; first: batch {first['batch_size']}, prompt {first['prompt']}, position {first['position']}"
    compared = "trunk states after random accepted lengths with one whole forward"
    return Check("rollback", compared, num_states, not evidence, finding, tuple(evidence))


# ------------------------------------------------------------------------------------------------------------ sampling


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
    """The law of the first tokens of sampled text beside the trunk's exact probabilities; then the control.

    The prompts end where the trunk is least certain. Only the tokens that one cycle drafts, and the one before them,
    are looked at.
    """
    draft_length = min(LAW_DRAFTS, max(subject.draft_lengths))
    prompts = uncertain_prompts(subject, draft_length + 2)
    laws = [exact_law(subject.model, prompt, draft_length + 1) for prompt in prompts]

    def corrected_p_value(verifier: str | Verifier, num_samples: int, seed: int) -> float:
        decoder = subject.decoder(draft_length, LAW_BATCH, verifier)
        p_values = []
        for prompt, law in zip(prompts, laws, strict=True):
            result = decoder.generate(
                [prompt] * num_samples,
                max_new_tokens=draft_length + 2,
                temperature=SAMPLING.temperature,
                top_k=SAMPLING.top_k,
                seed=seed,
                eos_token_id=None,
            )
            p_values.append(chi_square_p_value(law, [ids[: draft_length + 1] for ids in result.token_ids]))
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
    compared = f"law of {draft_length + 1} sampled tokens (temperature {SAMPLING.temperature}, top-k {SAMPLING.top_k})"
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
def exact_law(model: MTPModel, prompt: list[int], num_new: int) -> dict[tuple[int, ...], float]:
    """Probability of every continuation by `num_new` tokens under plain sampling, from whole forwards."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num_new):
        probs = transform(_logits_after(model.trunk, [[*prompt, *tokens] for tokens in law]), SAMPLING)
        extended = {}
        for row, (tokens, weight) in enumerate(law.items()):
            for token in probs[row].nonzero()[:, 0].tolist():
                extended[(*tokens, token)] = weight * float(probs[row, token])
        law = extended
    return law


def chi_square_p_value(law: dict[tuple[int, ...], float], samples: Sequence[tuple[int, ...]]) -> float:
    """Probability of a fit as bad as this one or worse, if the samples follow the law: Pearson's chi-square test.

    Outcomes expected fewer than 5 times are pooled; one that the law excludes gives 0.

    Of 100 throws of a coin 60 are heads: the statistic is 4, with one degree of freedom:

    >>> round(chi_square_p_value({(0,): 0.5, (1,): 0.5}, [(0,)] * 60 + [(1,)] * 40), 4)
    0.0455
    """
    observed = Counter(samples)
    if observed.keys() - law.keys():
        return 0.0
    cells, rest = [], [0.0, 0.0]
    for outcome, prob in law.items():
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


# ------------------------------------------------------------------------------------------------------------ bfloat16


def bfloat16_divergence(subject: Subject) -> Check:
    """How often a text with drafts differs from plain decoding in bfloat16, where, and how near the tie was.

    Args:
        subject: with a bfloat16 model.
    """
    draft_length = max(subject.draft_lengths)
    plain = subject.greedy(0, 1).token_ids
    result = subject.greedy(draft_length, 1)
    found = differences(subject, plain, result.token_ids, _setting(draft_length, 1))
    finding = f"{len(found) / len(plain):.0%} of texts differ"
    if found:
        margins = sorted(difference.top_two_margin for difference in found)
        positions = sorted(difference.position for difference in found)
        finding += (
            f"; first at new token {', '.join(map(str, positions))}; top-two margins there "
            f"{margins[0]:.2g} to {margins[-1]:.2g}"
        )
    compared = f"{subject.max_new_tokens} tokens at N = {draft_length} with plain decoding"
    return Check("bfloat16", compared, len(plain), None, finding, tuple(vars(one) for one in found))
