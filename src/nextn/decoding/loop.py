"""The decoding loop: a batch of rows that start, accept and end at different times.

One cycle, for every row at once. A row's tokens t[0..n] are known, and the trunk has read all of them but t[n]:

    draft     d1..dN = guesses of t[n+1..n+N]
    verify    one trunk forward over [t[n], d1..dN] at positions n..n+N
    accept    a <= N drafts; the trunk's own next token follows: t[n+1..n+a+1] are new
    roll back caches go on from position n+a+1; nothing is copied

N = 0 is a plain step through the same loop: the baseline that a speedup is measured against. Rows accept different a.
When a row ends, a waiting prompt takes its slot, or the last row of the batch does.

Worked example, two slots, three prompts, N = 2 (capitals are known tokens, small letters drafts, ! the trunk's own):

    slot 0   A B C    d e !   accepts both: D E F      ends: the third prompt is read into slot 0
    slot 1   P Q      r ! .   accepts one:  R S        goes on from position 3
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nextn.decoding.drafters.drafter import PROMPT_CHUNK, BatchTokens, Drafter, Drafts
from nextn.decoding.policy import Cycle, DraftPolicy
from nextn.decoding.row import Row, RowRandom, RowRequest
from nextn.decoding.sampling import SamplingConfig, choose, penalise, seen_after, transform
from nextn.decoding.steps import Steps
from nextn.decoding.verify import Exact, Verifier
from nextn.errors import GenerationError
from nextn.model import Trunk


@dataclass
class Costs:
    """Seconds spent, and on how many forwards.

    Attributes:
        prefill_s: reading prompts with the trunk and choosing each first token.
        draft_s: drafting, the drafter's reading of prompts included.
        verify_s: trunk forwards after the prompts', choosing tokens and all bookkeeping.
        num_prefills: prompts read.
        num_cycles: by N, cycles of the whole batch.
    """

    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    num_prefills: int = 0
    num_cycles: dict[int, int] = field(default_factory=dict)


class BatchLoop:
    """Slots for B rows of at most `capacity` tokens: caches, tokens, and the loop over them.

    Args:
        trunk: verifies.
        drafter: made for as many slots and the same capacity; None: plain decoding.
        num_slots: B.
        capacity: most tokens of a row.
        steps: eager or compiled.
    """

    def __init__(self, trunk: Trunk, drafter: Drafter | None, num_slots: int, capacity: int, steps: Steps):
        self._trunk, self._drafter, self._steps = trunk, drafter, steps
        self.num_slots, self.capacity = num_slots, capacity
        device = trunk.device
        self._cache = trunk.new_cache(num_slots, capacity)
        self._positions = torch.arange(capacity, device=device)
        self._token_ids = torch.zeros(num_slots, capacity, dtype=torch.int64, device=device)
        self._seen: Tensor | None = None
        self._rows: list[Row] = []
        self._randoms: list[RowRandom] = []
        self.costs = Costs()

    @torch.inference_mode()
    def decode(
        self, requests: Iterator[RowRequest], policy: DraftPolicy, sampling: SamplingConfig, verifier: Verifier
    ) -> Iterator[list[Row]]:
        """Continue all prompts; yields the rows that got new tokens or ended, after each cycle.

        Args:
            requests: taken as slots become free, in their order.
            policy: the draft length of each cycle.
            sampling: how tokens are chosen.
            verifier: which drafts stay.

        Raises:
            GenerationError: the model's logits are not finite.
        """
        self._rows.clear()
        self._randoms.clear()
        self.costs = Costs()
        self._seen = None
        if sampling.repetition_penalty != 1:
            shape = (self.num_slots, self._trunk.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._trunk.device)
        while True:
            changed = self._fill(requests, sampling, policy.longest)
            if changed:
                yield changed
                continue  # whoever took these may have cancelled some
            if not self._rows:
                return
            self._cycle(policy, sampling, verifier)
            yield list(self._rows)

    def _fill(self, requests: Iterator[RowRequest], sampling: SamplingConfig, longest: int) -> list[Row]:
        """Rows that have ended give up their slots, waiting prompts take them; returns rows cancelled and begun."""
        changed: list[Row] = []
        for slot in reversed(range(len(self._rows))):
            row = self._rows[slot]
            if row.is_cancelled and row.finish_reason is None:
                row.finish_reason = "cancelled"
                changed.append(row)
            if row.finish_reason is not None:
                self._close(slot)
        while len(self._rows) < self.num_slots and (request := next(requests, None)) is not None:
            row = Row(request)
            self._rows.append(row)
            self._randoms.append(RowRandom(request))
            self._begin(len(self._rows) - 1, row, sampling, longest)
            changed.append(row)
            if row.finish_reason is not None:
                self._close(len(self._rows) - 1)
        return changed

    def _close(self, slot: int) -> None:
        """The last row of the batch takes over the place of one that ended."""
        last = len(self._rows) - 1
        if slot != last:
            num_tokens = self._rows[last].num_known
            self._token_ids[slot, :num_tokens] = self._token_ids[last, :num_tokens]
            self._cache.copy_row(last, slot, num_tokens)
            if self._seen is not None:
                self._seen[slot] = self._seen[last]
            if self._drafter is not None:
                self._drafter.move(last, slot, num_tokens)
            self._rows[slot], self._randoms[slot] = self._rows[last], self._randoms[last]
        del self._rows[last], self._randoms[last]

    def _begin(self, slot: int, row: Row, sampling: SamplingConfig, longest: int) -> None:
        """Read a prompt and choose the first token."""
        started = time.perf_counter()
        trunk, prompt = self._trunk, row.request.prompt_ids
        num_prompt = len(prompt)
        self._token_ids[slot, :num_prompt] = torch.tensor(prompt, device=trunk.device)
        cache = self._cache.rows(slot, slot + 1)
        for first in range(0, num_prompt, PROMPT_CHUNK):
            end = min(first + PROMPT_CHUNK, num_prompt)
            positions = self._positions[None, first:end]
            context = trunk.cached_context(positions, num_keys=end)
            hidden = trunk.hidden_states(self._token_ids[slot : slot + 1, first:end], context, cache)
            normed = trunk.final_norm(hidden)
            if self._drafter is not None and longest:
                self._drafter.observe(hidden, normed, positions, slot)
        seen = None
        if self._seen is not None:
            self._seen[slot] = False
            self._seen[slot, self._token_ids[slot, :num_prompt]] = True
            seen = self._seen[slot : slot + 1]
        probs = transform(trunk.output_head(normed[:, -1]), sampling, seen)
        if not (bool(normed[:, -1].isfinite().all()) and bool(probs.isfinite().all())):
            raise GenerationError(
                "the model's logits are not finite: its weights are damaged, or overflow in this dtype"
            )
        uniforms = None if sampling.is_greedy else self._randoms[slot].first().to(trunk.device)
        token_id = int(choose(probs, uniforms))
        self._token_ids[slot, num_prompt] = token_id
        if seen is not None:
            seen[0, token_id] = True
        row.emit([token_id], [0])
        read = time.perf_counter()
        self.costs.prefill_s += read - started
        self.costs.num_prefills += 1
        if self._drafter is not None and longest and row.finish_reason is None:
            self._drafter.begin(slot, self._token_ids[slot], num_prompt)
            self._synchronise()
            self.costs.draft_s += time.perf_counter() - read

    def _cycle(self, policy: DraftPolicy, sampling: SamplingConfig, verifier: Verifier) -> None:
        """Draft, verify, emit: one cycle of all rows."""
        started = time.perf_counter()
        # The verifying forward adds a token of its own, so one draft fewer than what is left can still be emitted.
        most = [row.num_left - 1 for row in self._rows]
        wanted = policy.next_length() if self._steps.compiled else min(policy.next_length(), max(most))
        tokens = self._tokens()
        # Each decision has its own number, however many tokens are drafted: a row's tokens do not depend on the others.
        uniforms = None if sampling.is_greedy else self._uniforms(2 * policy.longest + 1)
        drafts = Drafts.none(len(tokens.num_known), self._trunk.device)
        if self._drafter is not None and wanted:
            drawn = None if uniforms is None else uniforms[:, :wanted]
            drafts = self._drafter.draft(tokens, wanted, sampling, drawn)
            self._synchronise()
        drafted = time.perf_counter()

        num_drafts = drafts.token_ids.shape[1]
        counts = [num_drafts] * len(most) if drafts.num_drafted is None else drafts.num_drafted
        limits = [min(count, left) for count, left in zip(counts, most, strict=False)]
        limits += [0] * (len(tokens.num_known) - len(limits))
        outcome = self._steps.run(
            self._verify,
            (num_drafts, len(limits), self.capacity, sampling, verifier),
            tokens.token_ids,
            tokens.known_and_total,
            drafts.token_ids,
            drafts.probs,
            torch.tensor(limits, device=self._trunk.device),
            None if uniforms is None else _of_verification(uniforms, num_drafts),
            tokens.seen,
            self._steps.key_positions(self._positions, max(tokens.num_known) + num_drafts),
            sampling,
            verifier,
        ).tolist()
        num_final = []
        for row, limit, result in zip(self._rows, limits, outcome, strict=False):
            num_accepted, next_id, num_changed, *draft_ids = result
            num_final.append(row.num_known + num_accepted)
            row.cycles.append((limit, num_accepted))
            row.num_changed += num_changed
            row.emit([*draft_ids[:num_accepted], next_id], [*range(1, num_accepted + 1), 0])
        if self._drafter is not None:
            self._drafter.roll_back(num_final)
        ended = time.perf_counter()
        self.costs.draft_s += drafted - started
        self.costs.verify_s += ended - drafted
        self.costs.num_cycles[num_drafts] = self.costs.num_cycles.get(num_drafts, 0) + 1
        cycles = [row.cycles[-1] for row in self._rows]
        policy.record(
            Cycle(
                num_drafts,
                num_drafted=tuple(count for count, _ in cycles),
                num_accepted=tuple(accepted for _, accepted in cycles),
                draft_s=drafted - started,
                verify_s=ended - drafted,
            )
        )

    def _verify(
        self,
        token_ids: Tensor,
        known_and_total: Tensor,
        draft_ids: Tensor,
        draft_probs: Tensor | None,
        num_drafted: Tensor,
        uniforms: Tensor | None,
        seen: Tensor | None,
        key_positions: Tensor,
        sampling: SamplingConfig,
        verifier: Verifier,
    ) -> Tensor:
        """One trunk forward over the last known token and the drafts, a step of fixed shapes.

        Returns:
            Per row how many drafts were accepted, the token after them, how many of them the lossless rule would have
            refused, and the drafts: int64 [B, 3 + N].
        """
        num_rows, num_drafts = draft_ids.shape
        trunk = self._trunk
        known, total = known_and_total[0, :, None], known_and_total[1, :, None]
        offsets = torch.arange(num_drafts + 1, device=token_ids.device)
        positions = torch.minimum(known - 1 + offsets, total - 1)
        read_ids = torch.cat((token_ids.gather(1, known - 1), draft_ids), dim=1)
        cache = self._cache.rows(0, num_rows)
        hidden = trunk.hidden_states(read_ids, trunk.cached_context(positions, key_positions.shape[0]), cache)
        normed = trunk.final_norm(hidden)
        if self._drafter is not None:
            self._drafter.observe(hidden, normed, positions)
        seen_there = None if seen is None else seen_after(seen, draft_ids)
        target = self._target(trunk.output_head(normed), seen_there, sampling, verifier)
        verified = verifier(draft_ids, draft_probs, target, num_drafted, uniforms)
        accepted, next_ids = verified.num_accepted[:, None], verified.next_ids[:, None]
        # Accepted drafts, then the next token, and the next token once more in place of rejected drafts.
        emitted = torch.where(offsets < accepted, torch.cat((draft_ids, next_ids), dim=1), next_ids)
        token_ids.scatter_(1, torch.minimum(known + torch.minimum(offsets, accepted), total - 1), emitted)
        if seen is not None and sampling.repetition_penalty != 1:
            seen.scatter_(1, emitted, True)
        return torch.cat((accepted, next_ids, verified.num_changed[:, None], draft_ids), dim=1)

    @staticmethod
    def _target(logits: Tensor, seen: Tensor | None, sampling: SamplingConfig, verifier: Verifier) -> Tensor:
        """What the verifier compares with, [B, N+1, V]: logits for `Exact`, otherwise probabilities.

        A lossy verifier reads the model's own probabilities where decoding is greedy: one-hot ones would be exact.
        """
        if isinstance(verifier, Exact):
            return logits if seen is None else penalise(logits, seen, sampling)
        if sampling.is_greedy and not getattr(verifier, "is_lossless", True):
            sampling = replace(sampling, temperature=1.0)
        return transform(logits, sampling, seen)

    def _tokens(self) -> BatchTokens:
        """All rows' tokens; compiled steps have all slots, of which the idle ones compute what nobody reads."""
        num_known = [row.num_known for row in self._rows]
        num_total = [row.request.num_total for row in self._rows]
        idle = self.num_slots - len(self._rows) if self._steps.compiled else 0
        num_known += [2] * idle
        num_total += [self.capacity] * idle
        seen = None if self._seen is None else self._seen[: len(num_known)]
        return BatchTokens(self._token_ids[: len(num_known)], num_known, num_total, seen)

    def _uniforms(self, count: int) -> Tensor:
        """Each row's own random numbers, float64 [B, count]."""
        drawn = [random.next(count) for random in self._randoms]
        if self._steps.compiled:
            drawn += [torch.zeros(count, dtype=torch.float64)] * (self.num_slots - len(drawn))
        return torch.stack(drawn).to(self._trunk.device)

    def _synchronise(self) -> None:
        """Wait for the device, so that seconds are charged to what took them."""
        if self._trunk.device.type == "cuda":
            torch.cuda.synchronize(self._trunk.device)


def _of_verification(uniforms: Tensor, num_drafts: int) -> Tensor:
    """The numbers that decide n drafts and the next token, float64 [B, n + 1].

    Args:
        uniforms: of one cycle, float64 [B, 2 N + 1]: for N drafts, for their acceptance, for the next token.
        num_drafts: n, at most N.

    N = 2, one draft: column 2 decides it, column 4 chooses the next token:

    >>> _of_verification(torch.arange(5)[None], 1).tolist()
    [[2, 4]]
    """
    longest = uniforms.shape[1] // 2
    return torch.cat((uniforms[:, longest : longest + num_drafts], uniforms[:, -1:]), dim=1)
