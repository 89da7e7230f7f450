"""A realistic study for the tests of its page: four variants, three seeds, a ladder, claims of all three verdicts.

`python -m tests.unit.study_example PAGE.html` writes its page, to be looked at in a browser.
"""

import math
import sys
from pathlib import Path

from nextn import config, tables
from nextn.study import page
from nextn.study.claims import judge
from nextn.study.compare import compare
from nextn.study.definition import Claim, Criterion, ModelEvaluationConfig
from nextn.study.results import CurvePoint, RunResult, StudyResult, TargetReached, VariantFacts

BASELINE = "next token"
SEEDS = (0, 1, 2)
NUM_STEPS, TOKENS_PER_STEP, EVALUATE_EVERY = 512, 4096, 32
LADDER = (0.25, 0.5, 2.0)
# name: (MTP depths, gain in loss over the baseline, step relative to its, FLOPs relative to its, changed variants)
VARIANTS = {
    BASELINE: (0, 0.0, 1.0, 1.0, {"mtp.num_depths": 0}),
    "one depth": (1, 0.004, 1.25, 1.19, {"mtp.num_depths": 1, "objective.lambda_": 0.3}),
    "three depths": (3, -0.021, 1.68, 1.58, {"mtp.num_depths": 3, "objective.lambda_": 0.3}),
    "three depths, reverse curriculum": (3, 0.018, 1.41, 1.36, {"mtp.num_depths": 3, "objective.curriculum.kind": "r"}),
}
STEP_S, STEP_FLOPS = 0.35, 9.4e9 * TOKENS_PER_STEP / 1000


def _wobble(*numbers: float) -> float:
    """Between -1 and 1, the same every time."""
    return math.sin(12.9898 * sum((place + 1.7) * number for place, number in enumerate(numbers)))


def _loss(step: int, num_steps: int, seed: int) -> float:
    settled = 1.38 - 0.055 * math.log2(num_steps / NUM_STEPS) + 0.012 * _wobble(seed, 3)
    return settled + 1.9 * math.exp(-step / (0.17 * num_steps)) + 0.25 * (1 - step / num_steps)


def _curve(name: str, seed: int, num_steps: int) -> tuple[CurvePoint, ...]:
    num_depths, gain, step, flops, _ = VARIANTS[name]
    own = gain + 0.0025 * _wobble(seed, len(name), num_depths)
    return tuple(
        CurvePoint(at, at * TOKENS_PER_STEP, at * STEP_FLOPS * flops, at * STEP_S * step,
                   _loss(at, num_steps, seed) - own * at / num_steps)
        for at in range(EVALUATE_EVERY, num_steps + 1, EVALUATE_EVERY)
    )  # fmt: skip


def _values(name: str, seed: int, loss: float) -> dict[str, float]:
    depths, _, _, flops, _ = VARIANTS[name]
    noise = _wobble(seed, len(name), 9)
    values = {
        "loss": loss, "bits_per_byte": loss / math.log(2), "loss_near": loss + 0.21, "loss_far": loss - 0.06,
        "decode_tok_per_s_plain": 212.0 + 4 * noise, "parse_share": 0.48 + 0.05 * noise - 0.06 * (depths == 1),
        "repeated_share": 0.031 + 0.004 * noise, "training_tok_per_s": 11_700 / flops,
        "peak_memory_bytes": 8.1e8 * flops,
        "training_flops": STEP_FLOPS * NUM_STEPS * flops, "num_parameters": 1.21e6 + 2.1e5 * depths,
        "num_mtp_parameters": 2.1e5 * depths,
    }  # fmt: skip
    if not depths:
        return values
    accepted = 1.0
    lengths = {"greedy": 1.0, "sampled": 1.0}
    for depth in range(1, depths + 1):
        values[f"loss_of_depth_{depth}"] = loss + 0.3 * depth
        for kind, easier in (("greedy", 0.0), ("sampled", -0.19)):
            share = 0.79 + easier - 0.06 * depth + 0.01 * noise - 0.15 * (flops - 1.19)
            values[f"acceptance_{kind}_{depth}"] = share
            accepted = share * values.get(f"acceptance_{kind}_unconditional_{depth - 1}", 1.0)
            values[f"acceptance_{kind}_unconditional_{depth}"] = accepted
            lengths[kind] += accepted
    values |= {f"al_{kind}": length for kind, length in lengths.items()}
    values |= {f"decode_speedup_{kind}": length / (1 + 0.18 * depths) for kind, length in lengths.items()}
    values["decode_tok_per_s"] = values["decode_tok_per_s_plain"] * values["decode_speedup_greedy"]
    return values


def _run(name: str, seed: int, ladder: float | None = None) -> RunResult:
    curve = _curve(name, seed, round(NUM_STEPS * (ladder or 1.0)))
    loss = curve[-1].loss
    identity = f"{len(name):04x}{seed:04x}{round(100 * (ladder or 0)):08x}"
    if ladder is not None:
        return RunResult(identity, name, seed, ladder, curve, {"loss": loss}, (), ())
    depths = VARIANTS[name][0]
    positions = tuple(
        loss + 0.34 * 0.5**eighth - 0.05 - 0.002 * depths * eighth + 0.003 * _wobble(seed, eighth, depths)
        for eighth in range(8)
    )
    return RunResult(identity, name, seed, None, curve, _values(name, seed, loss), positions, (8192,) * 8)


CLAIMS = (
    Claim("Three depths with a reverse curriculum predict the next token best",
          (Criterion(metric="loss", best="three depths, reverse curriculum"),
           Criterion(metric="loss", variant="three depths, reverse curriculum", high=0.0, against_baseline=True))),
    Claim("Three depths take at most 0.7 of the steps to the same loss",
          (Criterion(metric="steps_ratio", variant="three depths", high=0.7),)),
    Claim("One depth costs nothing: its loss is within 0.002 nats of the baseline's",
          (Criterion(metric="loss", variant="one depth", low=-0.005, high=0.0, against_baseline=True),
           Criterion(metric="time_overhead", variant="one depth", high=0.3))),
    Claim("With one depth, more than 65% of sampled drafts <are> accepted",
          (Criterion(metric="acceptance_sampled_1", variant="one depth", low=0.65),)),
    Claim("Training with depths does not hurt the code it writes",
          (Criterion(metric="parse_share", variant="three depths", low=-0.01, against_baseline=True),)),
)  # fmt: skip


def example() -> StudyResult:
    """The study; only the numbers are invented, comparisons and verdicts follow from them."""
    runs = [
        _run(name, seed, ladder)
        for seed in SEEDS
        for name, ladder in [*((name, None) for name in VARIANTS), *((BASELINE, ladder) for ladder in LADDER)]
    ]
    timing_runs = [0.01 * _wobble(timing_run, 5) for timing_run in range(4)]
    others = [name for name in VARIANTS if name != BASELINE]
    overheads = {
        "time_overhead": {name: [VARIANTS[name][2] - 1 + shift for shift in timing_runs] for name in others},
        "flops_overhead": {name: [VARIANTS[name][3] - 1] * 2 for name in others},
    }
    comparisons = compare(runs, BASELINE, SEEDS, overheads)
    return StudyResult(
        name="example",
        title="How many future tokens?",
        question="Does predicting more than one token pay at this size, and what does it cost?",
        scale="cpu",
        baseline=BASELINE,
        seeds=SEEDS,
        variants=tuple(VariantFacts(name, facts[4], "", STEP_S * facts[2]) for name, facts in VARIANTS.items()),
        runs=tuple(runs),
        comparisons=comparisons,
        targets=tuple(
            TargetReached(name, loss, *((3, 3, 300.0, 1.2e13, 104.0) if loss > 1.4 else (2, 3, 470.0, 1.9e13, 165.0)))
            if loss > 1.35
            else TargetReached(name, loss, 0, 3, None, None, None)
            for name in VARIANTS
            for loss in (1.6, 1.4, 1.2)
        ),
        claims=tuple(judge(claim, comparisons, BASELINE) for claim in CLAIMS),
        notes=("Two runs were resumed <once>.",),
        base_recipe=_as_json(tables.to_table(config.Recipe(training=config.TrainingConfig(num_steps=NUM_STEPS)))),
        evaluation=_as_json(tables.to_table(ModelEvaluationConfig())),
        provenance={"nextn": {"version": "0.1.0"}, "time_utc": "2026-11-23T03:14:00", "device": "cpu", "threads": 1},
    )


def _as_json(value):
    """Lists for tuples, as a study that was written and read has them."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    page.write_page(example(), Path(sys.argv[1]))
