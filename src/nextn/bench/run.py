"""A whole `nextn bench`: all arms in every scenario, the other engines, the approaches, and the report of it all."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nextn.bench.approaches import Approach, approaches, trained_model
from nextn.bench.arms import CHECKPOINT, PARALLEL, STANDARD
from nextn.bench.figures import BenchReport, ScenarioFigures
from nextn.bench.peer_engines import peer_arms
from nextn.bench.peers import PeerFigures, measure_peers, our_arm, peer_figures
from nextn.bench.plan import BenchPlan
from nextn.bench.timing import Runner, measure_scenario
from nextn.errors import ExportError
from nextn.evaluation.prompts import PromptSet
from nextn.provenance import collect
from nextn.wording import plural


class Progress(Protocol):
    """Who is told how far it is."""

    def begin(self, text: str) -> None:
        """A scenario begins."""
        ...

    def describe(self, text: str) -> None:
        """What is being done now."""
        ...

    def advance(self, arm: str) -> None:
        """A run of that arm is done."""
        ...


def run_bench(plan: BenchPlan, progress: Progress) -> BenchReport:
    """Measure everything that is planned, and conclude.

    Raises:
        ExportError: another engine that the user named cannot serve this model.
    """
    measured, peers, notes = _measure(plan, progress)
    request = plan.request
    if plan.emulates_an_engine:
        name = plan.drafting
        notes.append(f"AL and acceptance are those of {name}'s drafts; tokens per second are nextn's, not {name}'s")
    if request.num_repeats == 1:
        notes.append("one repeat has no range, so whether a gain is more than noise is not known")
    return BenchReport.of_scenarios(
        str(request.path),
        measured,
        peers=peers,
        approaches=_approaches(plan, measured[0]) if len(plan.models) > 1 else (),
        notes=tuple(notes),
        options={
            "drafting": plan.drafting,
            "compiled": plan.compiled,
            "num_repeats": request.num_repeats,
            "dtype": request.dtype,
            "peers": list(request.peers),
        },
        provenance=collect(
            seed=0, device=request.device, corpus={"prompt_sets": [given.source for given in plan.prompt_sets]}
        ),
    )


def _measure(plan: BenchPlan, progress: Progress) -> tuple[list[ScenarioFigures], tuple[PeerFigures, ...], list[str]]:
    """All scenarios, the peers, and notes for the reader.

    Decoders are made once for a batch size, and its longest rows come first: what is compiled for them serves the
    shorter ones.
    """
    figures: dict[int, ScenarioFigures] = {}
    found: list[PeerFigures] = []
    notes: list[str] = []
    peers = plan.request.peers
    for batch_size in dict.fromkeys(scenario.batch_size for scenario, _ in plan.scenarios):
        own = [number for number, (scenario, _) in enumerate(plan.scenarios) if scenario.batch_size == batch_size]
        runners = [Runner(arm, batch_size, progress.describe) for arm in plan.arms]
        for number in sorted(own, key=lambda number: -_longest_row(plan.scenarios[number][1])):
            scenario, given = plan.scenarios[number]
            progress.begin(f"{scenario.name}: {plural(len(plan.arms), 'arm')}")
            figures[number] = measure_scenario(
                scenario,
                runners,
                given.prompts,
                given.source,
                max_new_tokens=given.max_new_tokens,
                num_repeats=plan.request.num_repeats,
                progress=progress.advance,
            )
            if peers and (batch_size, scenario.temperature) == (1, 0.0):
                progress.begin(f"{scenario.name}: nextn beside {', '.join(peers)}")
                try:
                    found += _measure_peers(plan, figures[number], given, runners, progress)
                except ExportError as error:
                    if plan.request.peers_are_wanted:
                        raise
                    notes.append(f"other engines were not measured: {error}")
    if plan.request.peers_are_wanted and peers and not found:
        notes.append("other engines are compared greedily at batch 1, which was not asked for")
    return [figures[number] for number in range(len(plan.scenarios))], tuple(found), notes


def _measure_peers(
    plan: BenchPlan, figures: ScenarioFigures, given: PromptSet, runners: Sequence[Runner], progress: Progress
) -> tuple[PeerFigures, ...]:
    """Our fastest plain arm and our fastest MTP arm of one N, beside the other engines."""
    request, model, ours = plan.request, plan.models["mtp"], []
    for drafter in (None, "mtp"):
        best = figures.fastest(CHECKPOINT, drafter, fixed=True)
        for runner in runners:
            if best is not None and runner.arm.name == best.name:
                ours.append(our_arm(best.draft_length or 0, runner.decoder.generate))
    tried = [runner.arm.draft_length for runner in runners if runner.arm.drafter == "mtp"]
    lengths = sorted({length for length in tried if isinstance(length, int)})
    with (
        tempfile.TemporaryDirectory() as work,
        peer_arms(
            request.peers,
            plan.folders["mtp"],
            model,
            lengths,
            Path(work),
            engines=request.engines,
            dtype=request.dtype,
            say=progress.describe,
        ) as theirs,
    ):
        arms = [*ours, *theirs]
        measure_peers(arms, given.prompts, given.max_new_tokens, request.num_repeats, progress.describe)
        tokenizer = model.tokenizer
        return peer_figures(arms, None if tokenizer is None else tokenizer.eos_token_id, figures.scenario.name)


def _longest_row(given: PromptSet) -> int:
    return max(map(len, given.prompts)) + given.max_new_tokens


def _approaches(plan: BenchPlan, figures: ScenarioFigures) -> tuple[Approach, ...]:
    """The four approaches with the figures of one scenario."""
    models = plan.models
    target = STANDARD if "standard" in models else CHECKPOINT
    chosen = {
        "standard": figures.fastest(STANDARD, None),
        "mtp": figures.fastest(CHECKPOINT, "mtp"),
        "draft_model": figures.fastest(target, "draft_model"),
        "parallel": figures.fastest(PARALLEL, "mtp"),
    }
    plain = figures.fastest(target, None)
    assert plain is not None, "plain decoding is always measured"
    trained = {
        key: trained_model(plan.folders[key], model)
        for key, model in models.items()
        if key != "mtp" or model.scheme is not None
    }
    return approaches(
        trained,
        {key: (arm.name, statistics.median(arm.decode_tok_per_s)) for key, arm in chosen.items() if arm is not None},
        statistics.median(plain.decode_tok_per_s),
    )
