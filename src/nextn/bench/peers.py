"""Other engines with the same weights in the same run, asked in turn; `peer_engines` starts them.

All continue the same prompts greedily, one at a time, and every prompt goes to every engine in turn, so that a slow
minute of the machine hits all alike. An engine does not tell how long it took to read a prompt, so rates are new tokens
over the time from request to answer, prompt included, HTTP included where there is a server; ours are measured so here.

Before each request to a server the machine rests, since engines wait for work by spinning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nextn.decoding import GenerationResult
from nextn.evaluation.interleaving import rotated
from nextn.evaluation.results import Speedup
from nextn.interop.engine_clients import Completion
from nextn.lossless.differences import first_difference

TRANSFORMERS, VLLM, LLAMACPP = "transformers", "vllm", "llamacpp"
PEERS = (TRANSFORMERS, VLLM, LLAMACPP)
"""What `--peers` takes."""

REST_S = {VLLM: 2.0, LLAMACPP: 0.3}
"""Pause after a request to a server: vLLM spins for a second, and the next engine would run at a tenth of its speed."""

NUM_WARM_UP_TOKENS = 8

Complete = Callable[[Sequence[int], int], Completion]
"""Continue a prompt greedily, by at most so many tokens."""


@dataclass
class PeerArm:
    """An engine at one N.

    Attributes:
        engine: its name.
        draft_length: N.
        complete: how it is asked.
        answers: of the first repeat, one per prompt.
        tok_per_s: of every repeat.
    """

    engine: str
    draft_length: int
    complete: Complete
    answers: list[Completion] = field(default_factory=list)
    tok_per_s: list[float] = field(default_factory=list)

    @property
    def mean_acceptance_length(self) -> float:
        """AL as the engine reports it; 1 where it drafted nothing."""
        return mean_acceptance_length(self.answers)


@dataclass(frozen=True)
class PeerFigures:
    """What was measured of one engine at one N.

    Attributes:
        engine: its name; `nextn` is ours.
        draft_length: N.
        scenario: its name.
        end_to_end_tok_per_s: one rate per repeat, prompts included.
        speedup: against plain decoding by the same engine.
        mean_acceptance_length: AL as the engine reports it.
        num_identical_outputs, num_compared_outputs: outputs equal to our plain decoding, a final end of text left out.
        first_difference: index of the first token that differs in any output; None: there is none.
    """

    engine: str
    draft_length: int
    scenario: str
    end_to_end_tok_per_s: tuple[float, ...]
    speedup: Speedup
    mean_acceptance_length: float
    num_identical_outputs: int
    num_compared_outputs: int
    first_difference: int | None


def measure_peers(
    arms: Sequence[PeerArm],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    num_repeats: int,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Ask every arm for every prompt, in turn, `num_repeats` times after a warm-up; figures are added to the arms."""
    has_servers = any(arm.engine in REST_S for arm in arms)

    def ask(arm: PeerArm, prompt: Sequence[int], num_tokens: int) -> Completion:
        answer = arm.complete(prompt, num_tokens)
        if has_servers:
            time.sleep(REST_S.get(arm.engine, min(REST_S.values())))
        return answer

    for arm in arms:
        ask(arm, prompts[0], min(NUM_WARM_UP_TOKENS, max_new_tokens))
    for repeat in range(num_repeats):
        answers: dict[int, list[Completion]] = {id(arm): [] for arm in arms}
        for number, prompt in enumerate(prompts):
            for arm in rotated(arms, number + repeat):
                answers[id(arm)].append(ask(arm, prompt, max_new_tokens))
                progress(arm.engine)
        for arm in arms:
            own = answers[id(arm)]
            arm.answers = arm.answers or own
            arm.tok_per_s.append(sum(len(one.token_ids) for one in own) / sum(one.wall_s for one in own))


def peer_figures(arms: Sequence[PeerArm], end_of_text: int | None, scenario: str) -> tuple[PeerFigures, ...]:
    """Figures of arms that were asked; the first one is ours, plain, and every engine has a plain one.

    Args:
        arms: as `measure_peers` leaves them.
        end_of_text: token that an engine may leave out at the end.
        scenario: name of the scenario they were asked in.
    """
    plain = {arm.engine: arm for arm in arms if arm.draft_length == 0}
    figures = []
    for arm in arms:
        pairs = zip(arm.answers, arms[0].answers, strict=True)
        differences = [difference_before_end(one.token_ids, ours.token_ids, end_of_text) for one, ours in pairs]
        figures.append(
            PeerFigures(
                engine=arm.engine,
                draft_length=arm.draft_length,
                scenario=scenario,
                end_to_end_tok_per_s=tuple(arm.tok_per_s),
                speedup=Speedup.of_repeats(plain[arm.engine].tok_per_s, arm.tok_per_s),
                mean_acceptance_length=arm.mean_acceptance_length,
                num_identical_outputs=differences.count(None),
                num_compared_outputs=len(differences),
                first_difference=min((place for place in differences if place is not None), default=None),
            )
        )
    return tuple(figures)


def mean_acceptance_length(answers: Sequence[Completion]) -> float:
    """AL of several completions; 1 where nothing was drafted."""
    num_drafts = sum(answer.num_drafts for answer in answers)
    return 1 + sum(answer.num_accepted_tokens for answer in answers) / num_drafts if num_drafts else 1.0


def difference_before_end(a: Sequence[int], b: Sequence[int], end_of_text: int | None) -> int | None:
    """`first_difference` of two outputs, of which either may leave out a final end of text.

    >>> difference_before_end([5, 6, 0], [5, 6], end_of_text=0) is None
    True
    >>> difference_before_end([5, 6, 7], [5, 8, 7], end_of_text=0), difference_before_end([5], [5, 6], end_of_text=0)
    (1, 1)
    """
    return first_difference(*([token for token in output if token != end_of_text] for output in (a, b)))


def our_arm(draft_length: int, generate: Callable[..., GenerationResult]) -> PeerArm:
    """nextn itself, asked as the others are.

    Args:
        draft_length: N.
        generate: like `Decoder.generate`, at that N.
    """

    def complete(prompt_ids: Sequence[int], max_new_tokens: int) -> Completion:
        started = time.perf_counter()
        result = generate([list(prompt_ids)], max_new_tokens=max_new_tokens)
        wall_s, stats = time.perf_counter() - started, result.stats
        return Completion(
            result.token_ids[0], stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens, wall_s
        )

    return PeerArm("nextn", draft_length, complete)
