"""A realistic run report, K = 3 and N = 3, for the tests of the report.

`python -m tests.unit.report_example PAGE.html` writes its page, to be looked at in a browser.
"""

import json
import math
import random
import sys
from pathlib import Path

from nextn import config, tables
from nextn.decoding.statistics import AcceptanceStatistics
from nextn.evaluation import results
from nextn.report import html, schema
from nextn.training import TeacherForcedEvaluation

NUM_DEPTHS = 3
CODE = "        self.assertEqual(response.status, 200)\n        if response.headers is None:\n            return None\n"


def history() -> tuple[dict, ...]:
    """Sixty logged steps and four evaluations of a run whose deeper depths learn more slowly."""
    noise = random.Random(0)
    lines = []
    for step in range(10, 610, 10):
        loss = [1.05 + 0.28 * k + 4.2 * math.exp(-step / (60 + 15 * k)) for k in range(NUM_DEPTHS + 1)]
        losses = [value + noise.gauss(0, 0.03) for value in loss]
        lines.append(
            {"kind": "train", "step": step, "num_tokens": step * 4096, "loss": losses[0] + 0.1 * sum(losses[1:]),
             "loss_per_depth": losses, "depth_weights": [0.1] * NUM_DEPTHS, "learning_rate": 1e-3, "grad_norm": 0.8,
             "tok_per_s": 9876.0, "elapsed_s": step * 0.41,
             "expert_load_max_over_mean": {
                 f"trunk.model.layers.{layer}.mlp": 1.12 + 0.02 * layer + 1.3 * math.exp(-step / 80)
                 for layer in (1, 2, 3)}}
        )  # fmt: skip
        if step % 150 == 0:
            lines.append(
                {"kind": "evaluation", "step": step, "num_tokens": step * 4096,
                 "loss_per_depth": [value + 0.04 for value in loss],
                 "bits_per_byte_per_depth": [(value + 0.04) / math.log(2) for value in loss],
                 "teacher_forced_accuracy": [0.68, 0.58, 0.51, 0.46],
                 "main_agreement": [0.7, 0.6, 0.53], "decoding": {},
                 "expert_load": {"trunk.model.layers.1.mlp": [0.3, 0.2, 0.25, 0.25],
                                 "scheme.layers.0.block.mlp": [0.25, 0.25, 0.27, 0.23]}}
            )  # fmt: skip
    return tuple(lines)


def arm(name: str, temperature: float, counts: tuple[int, ...], plain: tuple[float, ...], fast: tuple[float, ...]):
    statistics = AcceptanceStatistics(len(counts) - 1, {len(counts) - 1: counts})
    greedy = temperature == 0
    return results.DecodingArm.of_statistics(
        name, temperature, statistics, plain_tok_per_s=plain, speculative_tok_per_s=fast, num_prompts=16,
        num_new_tokens=statistics.num_drafts + statistics.num_accepted_tokens,
        num_identical_outputs=16 if greedy else None, num_compared_outputs=16 if greedy else None,
        repeated_text_share_plain=0.317 if greedy else 0.0387,
        repeated_text_share_speculative=0.317 if greedy else 0.0413,
    )  # fmt: skip


def sample(name: str, text: str, seed: int) -> results.Sample:
    noise, pieces, depth = random.Random(seed), [], 0
    for character in text:
        pieces.append(results.TokenText(character, depth))
        depth = depth + 1 if depth < NUM_DEPTHS and noise.random() < 0.62 else 0
    return results.Sample(
        name, "import unittest\n\nclass ResponseTest(unittest.TestCase):\n    def test_ok(self):\n", tuple(pieces)
    )


def example() -> schema.RunReport:
    """A finished run with K = 3 and N = 3."""
    return schema.RunReport(
        title="A small DeepSeek-V3 with three MTP depths on python-stdlib",
        data=schema.DataFacts("python-stdlib", "bytes", 681, 11_734_201, 14, 268_113, 1.0),
        model=schema.ModelFacts(6_283_520, 3_104_768, 1_212_416, 10, NUM_DEPTHS, 192, 257, 8, 2),
        training=schema.TrainingFacts(600, 2_457_600, 247.3, 9938.2, 0.2917, None, history()),
        teacher_forced=TeacherForcedEvaluation(
            loss_per_depth=(1.091, 1.372, 1.655, 1.938), bits_per_byte_per_depth=(1.574, 1.979, 2.388, 2.796),
            teacher_forced_accuracy=(0.683, 0.587, 0.512, 0.463), main_agreement=(0.713, 0.604, 0.531),
            num_labels=(8160, 8128, 8096, 8064),
        ),
        arms=(
            arm("greedy", 0.0, (212, 151, 104, 377),
                plain=(161.2, 163.9, 158.4, 160.7, 162.5), fast=(251.0, 249.2, 255.8, 243.1, 252.6)),
            arm("sampled", 1.0, (398, 262, 143, 171),
                plain=(158.0, 159.1, 155.2, 157.7, 158.8), fast=(196.1, 192.4, 199.8, 190.3, 195.5)),
        ),
        repeated_text_share_held_out=0.058,
        samples=(
            sample("greedy", CODE * 2, 1),
            sample("sampled", "        for name, <script>alert('&')</script> in x:\n\t\treturn a & b\n" + CODE, 2),
        ),
        notes=("Four minutes of training leave a model undertrained: the figures show the mechanism, not what MTP "
               "reaches at scale.",),
        settings=json.loads(json.dumps(tables.to_table(config.Recipe(mtp=config.MTPConfig(num_depths=NUM_DEPTHS))))),
        provenance={
            "time_utc": "2026-11-22T14:39:54+00:00", "command": ["nextn", "demo"], "seed": 0,
            "nextn": {"version": "0.1.0", "commit": "443eac2f", "has_changes": False},
            "libraries": {"python": "3.11.9", "torch": "2.13.0"},
            "machine": {"cpu": "Example CPU", "num_cores": 2, "memory_bytes": 8_000_000_000},
            "corpus": {"name": "python-stdlib", "sha256": "ab" * 32},
        },
    )  # fmt: skip


if __name__ == "__main__":
    html.write_report(example(), Path(sys.argv[1]))
