"""Drafts that are right as often as one wishes: all, none, or at random; and the caches rolled back after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nextn.decoding import SamplingConfig
from nextn.decoding.drafters.drafter import BatchTokens, Drafts
from nextn.decoding.loop import BatchLoop
from nextn.decoding.policy import FixedLength
from nextn.decoding.row import Row, RowRequest
from nextn.decoding.steps import Steps
from nextn.decoding.verify import Exact
from nextn.lossless.differences import differences, text_check
from nextn.lossless.subject import BATCH_SIZES, Check, Subject

STATE_TOLERANCE = 1e-3
"""Largest difference between cached and recomputed states, relative to the largest absolute state."""


class Script:
    """Decodes greedily from drafts that know the plain texts, and takes note of the trunk's states.

    Args:
        subject: its prompts are decoded, with the largest of its draft lengths.
        plain: their plain continuations.
        num_right: called for every row and cycle; so many of its drafts are right, and all after them wrong.

    Attributes:
        final_states: by prompt, the trunk's states (before its final norm) of all tokens but those of the last cycle,
            as the cache gave them, float32 [n, C].
    """

    def __init__(self, subject: Subject, plain: Sequence[list[int]], num_right: Callable[[], int]):
        self._subject, self._num_right = subject, num_right
        self._texts = [[*prompt, *ids] for prompt, ids in zip(subject.prompts, plain, strict=True)]
        self._draft_length = max(subject.draft_lengths)
        self.final_states: dict[int, Tensor] = {}

    def decode(self, batch_size: int, eos_token_id: int | None = None) -> list[Row]:
        """All prompts, through `batch_size` slots."""
        subject, trunk = self._subject, self._subject.model.trunk
        capacity = max(map(len, self._texts))
        self._states = torch.zeros(batch_size, capacity, trunk.hidden_size, device=trunk.device)
        self._numbers = [0] * batch_size
        loop = BatchLoop(trunk, self, batch_size, capacity, Steps(trunk.device, compiled=False))
        requests = [
            RowRequest(number, prompt, subject.max_new_tokens, eos_token_id=eos_token_id)
            for number, prompt in enumerate(subject.prompts)
        ]
        rows: dict[int, Row] = {}
        for changed in loop.decode(iter(requests), FixedLength(self._draft_length), SamplingConfig(), Exact()):
            rows |= {row.request.number: row for row in changed}
        return [rows[number] for number in range(len(requests))]

    def begin(self, slot: int, token_ids: Tensor, num_known: int) -> None:
        """See `Drafter`; which prompt it is shows in its tokens."""
        self._numbers[slot] = self._subject.prompts.index(token_ids[:num_known].tolist())

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor, first_slot: int = 0) -> None:
        """See `Drafter`."""
        states = self._states[first_slot : first_slot + positions.shape[0]]
        states.scatter_(1, positions[..., None].expand_as(hidden), hidden)

    def draft(
        self, tokens: BatchTokens, num_draft_tokens: int, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Drafts:
        """See `Drafter`."""
        vocab_size = self._subject.model.trunk.vocab_size
        rows = []
        for slot, known in enumerate(tokens.num_known):
            text, num_right = self._texts[self._numbers[slot]], self._num_right()
            coming = [*text[known : known + num_draft_tokens], *[0] * num_draft_tokens][:num_draft_tokens]
            rows.append([(token + (step >= num_right)) % vocab_size for step, token in enumerate(coming)])
        return Drafts(torch.tensor(rows, device=tokens.token_ids.device))

    def roll_back(self, num_final: Sequence[int]) -> None:
        """See `Drafter`."""
        for slot, final in enumerate(num_final):
            self.final_states[self._numbers[slot]] = self._states[slot, :final].clone()

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
    check = text_check(name, compared, len(BATCH_SIZES) * len(plain), found)
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
