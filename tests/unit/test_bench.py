"""What `nextn bench` measures and concludes: the verdict, the timing in turn, costs, peers, approaches, the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.bench import page as bench_page
from nextn.bench import peers, verdict
from nextn.bench.approaches import Approach, TrainedModel, approaches, trained_model
from nextn.bench.arms import CHECKPOINT, Arm, arms_of
from nextn.bench.figures import BenchReport, Scenario
from nextn.bench.peer_engines import check_peers
from nextn.bench.plan import draft_lengths_for
from nextn.bench.request import BenchRequest, draft_lengths_of, numbers
from nextn.bench.timing import Runner, Timed, measure_scenario, tokens_per_forward
from nextn.bench.verdict import decide, summarise
from nextn.decoding import GenerationResult
from nextn.decoding.loop import Costs
from nextn.decoding.policy import Cycle, FixedLength
from nextn.decoding.statistics import AcceptanceStatistics
from nextn.errors import ConfigError, GenerationError, NextnError
from nextn.evaluation.interleaving import rotated
from nextn.evaluation.results import Speedup
from nextn.interop.engine_clients import Completion
from nextn.tables import to_table
from tests.lossless.conftest import TEXT, memorising_model, random_model
from tests.unit.test_report import Page

PROMPTS = [TEXT[0, :5].tolist(), TEXT[2, :5].tolist(), TEXT[3, :5].tolist()]
SCENARIO = Scenario("random", 5, batch_size=2, temperature=0.0)

# ---------------------------------------------------------------------------------------------------------- the request

CONTRADICTIONS = {
    "negative temperature": ({"temperatures": (0.0, -1.0)}, "temperature must be 0"),
    "no rows": (
        {"batch_sizes": (4, 0)},
        r"-sizes and --context take numbers above 0, got \[4, 0\] and \[None\]",
    ),
    "no prompt tokens": ({"prompt_lengths": (8, 0)}, r"take numbers above 0, got \[1\] and \[8, 0\]"),
    "lossless verifier": ({"verifier": "exact"}, "--verifier adds a lossy arm: threshold, typical; got 'exact'"),
    "wrong number of parameters": ({"verifier": "threshold:0.1,0.2"}, "verifier 'threshold' takes"),
    "unknown peer": ({"peers": ("tgi",)}, "--peers knows transformers, vllm, llamacpp, or none; got 'tgi'"),
    "missing peer": (
        {"peers": ("vllm",), "engines": Path("nowhere")},
        "vllm is not installed in nowhere: run make",
    ),
    "missing prompts": ({"prompts": ("code", "nowhere.jsonl")}, "cannot read nowhere.jsonl"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS, ids=lambda name: name.replace(" ", "_"))
def test_a_request_that_contradicts_itself_is_refused_before_anything_is_loaded(case: str):
    options, message = CONTRADICTIONS[case]
    BenchRequest(Path("no model"))
    with pytest.raises(NextnError, match=message):
        BenchRequest(Path("no model"), **options)


@pytest.mark.parametrize("text", ["1,two", "1.5", "", "adaptive,"])
def test_text_that_is_no_list_of_draft_lengths_is_refused(text: str):
    with pytest.raises(GenerationError, match="such as 1,2,3,adaptive"):
        draft_lengths_of(text)


def test_text_that_is_no_list_of_numbers_is_refused_and_none_is_an_empty_list():
    with pytest.raises(GenerationError, match=r"--batch-sizes takes numbers separated by commas.*got '1;4'"):
        numbers("--batch-sizes", "1;4", int)
    assert numbers("--context", "", int) == ()


@pytest.mark.parametrize(
    ("wanted", "usual", "drafting", "lengths"),
    [
        (None, None, "as_trained", [1, 2, 3, "adaptive"]),
        (None, 5, "as_trained", [1, 2, 3, 4, 5, "adaptive"]),
        (("adaptive", 2, 0, 1), None, "as_trained", [1, 2, "adaptive"]),
        (None, None, "transformers", [2]),
        ((2, 1), None, "vllm", [1, 2]),
    ],
)
def test_draft_lengths_are_the_wanted_ones_or_the_usual_ones_of_model_and_drafting(wanted, usual, drafting, lengths):
    request = BenchRequest(Path("no model"), draft_lengths=wanted, usual_draft_length=usual)
    assert draft_lengths_for(random_model(0), request, drafting) == lengths


# -------------------------------------------------------------------------------------------------------------- verdict

RATIOS = st.floats(0.2, 5.0)
SPEEDUPS = st.lists(RATIOS, min_size=3, max_size=3).map(lambda ratios: Speedup(*(sorted(ratios)[i] for i in (1, 0, 2))))
TABLES = st.dictionaries(st.sampled_from(["N = 1", "N = 2", "N = 3", "adaptive"]), SPEEDUPS)


@given(TABLES)
def test_an_arm_is_recommended_only_if_its_whole_range_lies_above_1(table: dict[str, Speedup]):
    decision = decide(table)
    gaining = {name for name, speedup in table.items() if speedup.lowest > 1}
    assert (decision.arm is not None) == bool(gaining)
    if decision.arm is not None:
        assert table[decision.arm].median == max(table[name].median for name in gaining)


def test_judging_by_the_median_alone_would_recommend_noise():
    table = {"N = 1": Speedup(1.04, 0.97, 1.11)}
    assert max(table, key=lambda name: table[name].median) == "N = 1"  # the broken verdict
    assert decide(table).arm is None
    assert "no gain resolved" in decide(table).text


@given(st.lists(st.tuples(st.sampled_from([1, 4, 16]), TABLES), min_size=1, max_size=6))
def test_the_summary_recommends_in_a_batch_size_what_gains_in_all_its_scenarios(rows: list):
    named = [(size, f"scenario {number}", table) for number, (size, table) in enumerate(rows)]
    parts = summarise(named).split("; ")
    sizes = list(dict.fromkeys(size for size, _ in rows))
    assert len(parts) == len(sizes)
    for size, part in zip(sizes, parts, strict=True):
        tables = [table for own, table in rows if own == size]
        everywhere = set.intersection(
            *({name for name, speedup in table.items() if speedup.lowest > 1} for table in tables)
        )
        recommended = part.removeprefix(f"at batch {size} ")
        assert recommended.startswith("use ") == bool(everywhere)
        if everywhere:
            assert recommended.removeprefix("use ").partition(":")[0] in everywhere


def test_scenarios_of_one_batch_size_that_disagree_are_told_apart():
    rows = [
        (1, "temperature 0", {"N = 2": Speedup(1.6, 1.5, 1.7)}),
        (1, "temperature 1", {"N = 2": Speedup(0.9, 0.8, 0.95)}),
    ]
    assert summarise(rows) == "temperature 0: use N = 2 (1.60x), temperature 1: leave it off (0.90x)"


def test_without_drafts_there_is_nothing_to_say():
    assert decide({}).text == "nothing but plain decoding was measured"
    assert summarise([(1, "temperature 0", {})]) == "only plain decoding was measured"


# ------------------------------------------------------------------------------------------------------------ measuring


def runners(*arms: Arm) -> list[Runner]:
    return [Runner(arm, SCENARIO.batch_size) for arm in arms]


def some_arms(**options) -> list[Arm]:
    return arms_of(memorising_model(30), [1, 2, "adaptive"], compiled=False, drafting="as_trained", **options)


def test_all_lossless_arms_give_plain_outputs_and_every_figure_belongs_to_its_arm():
    arms = some_arms(
        verifier="typical", draft_model=random_model(5, num_depths=0), standard=random_model(6, num_depths=0)
    )
    figures = measure_scenario(SCENARIO, runners(*arms), PROMPTS, {}, max_new_tokens=12, num_repeats=2)
    assert figures.num_prompts == 4, "three prompts fill two batches of two"
    assert figures.arms[0].name == "plain, eager"
    for arm in figures.arms:
        assert len(arm.decode_tok_per_s) == len(arm.end_to_end_tok_per_s) == 2
        assert arm.num_compared_outputs == 4
        if arm.is_lossless:
            assert arm.num_identical_outputs == 4, arm.name
            assert arm.changed_share == 0
        if arm.is_plain:
            assert (arm.tokens_per_forward, arm.draft_cost) == (1.0, 0)
        elif arm.draft_length is None:
            assert (arm.verify_cost, arm.draft_cost, arm.predicted_speedup) == (None, None, None)
        else:
            costs = arm.verify_cost + arm.draft_length * arm.draft_cost
            assert arm.predicted_speedup == pytest.approx(arm.tokens_per_forward / costs)
    assert [arm.drafter for arm in figures.arms] == [
        None, None, "mtp", "mtp", "mtp", "mtp", "prompt_lookup", "draft_model", "draft_model",
    ]  # fmt: skip
    assert set(figures.speedups) == {
        "MTP N = 1",
        "MTP N = 2",
        "MTP adaptive",
        "prompt lookup N = 2",
        "draft model N = 2",
    }


def test_an_arm_that_changes_an_output_is_found(monkeypatch: pytest.MonkeyPatch):
    decode = Runner.decode

    def changed(self: Runner, prompts, **options):
        """Broken: with drafts, the second prompt is another one."""
        if self.arm.draft_length and len(prompts) > 2:
            prompts = [prompts[0], [1, 2, 3], *prompts[2:]]
        return decode(self, prompts, **options)

    monkeypatch.setattr(Runner, "decode", changed)
    figures = measure_scenario(SCENARIO, runners(*some_arms()[:2]), PROMPTS, {}, max_new_tokens=12, num_repeats=1)
    assert [arm.num_identical_outputs for arm in figures.arms] == [4, 3]


def test_sampled_outputs_are_not_compared():
    scenario = dataclasses.replace(SCENARIO, temperature=1.0)
    figures = measure_scenario(scenario, runners(*some_arms()[:2]), PROMPTS, {}, max_new_tokens=6, num_repeats=1)
    assert {arm.num_compared_outputs for arm in figures.arms} == {None}


def test_arms_are_timed_in_turn_and_none_always_runs_first(monkeypatch: pytest.MonkeyPatch):
    calls, decode = [], Runner.decode

    def recorded(self: Runner, prompts, **options):
        if len(prompts) == 4:
            calls.append((self.arm.name, options["seed"]))
        return decode(self, prompts, **options)

    monkeypatch.setattr(Runner, "decode", recorded)
    measure_scenario(SCENARIO, runners(*some_arms()[:3]), PROMPTS, {}, max_new_tokens=6, num_repeats=3)
    names = ["plain, eager", "MTP N = 1", "MTP N = 2"]
    assert calls == [(name, repeat) for repeat in range(3) for name in rotated(names, repeat)]
    assert [calls[3 * repeat][0] for repeat in range(3)] == names


def result(tok_per_s: float, histograms: dict[int, tuple[int, ...]], origins: tuple[int, ...]) -> GenerationResult:
    """One row that took as long as the rate says."""
    costs = Costs(verify_s=(len(origins) - 1) / tok_per_s, num_cycles={0: 1})
    stats = AcceptanceStatistics(2, histograms)
    return GenerationResult((), (tuple(range(len(origins))),), (origins,), ("length",), stats, 0, 1, costs)


def test_speedup_is_against_the_fastest_plain_arm(monkeypatch: pytest.MonkeyPatch):
    rates = {"plain, eager": 100.0, "plain, compiled": 200.0, "MTP N = 2": 300.0}
    arms = [Arm(name, CHECKPOINT, random_model(0), 2 if "MTP" in name else 0, compiled=False) for name in rates]
    monkeypatch.setattr(
        Runner, "decode", lambda self, prompts, **_: Timed(result(rates[self.arm.name], {}, (0, 0, 0)), 1.0)
    )
    figures = measure_scenario(SCENARIO, runners(*arms), PROMPTS, {}, max_new_tokens=3, num_repeats=1)
    assert {arm.name: arm.speedup.median for arm in figures.arms} == pytest.approx(
        {"plain, eager": 0.5, "plain, compiled": 1.0, "MTP N = 2": 1.5}  # against eager it would be 3.0
    )
    assert figures.speedups["MTP N = 2"] == figures.arms[2].speedup


class CountingDecoder:
    """Says that it compiles in its first two calls."""

    def __init__(self, say):
        self.num_calls, self._say = 0, say

    def generate(self, prompts, **_):
        self.num_calls += 1
        if self.num_calls < 3:
            self._say("compiling verify")
        return result(float(self.num_calls), {}, (0, 0))


def test_a_run_in_which_something_was_compiled_is_not_a_measurement(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Arm, "decoder", lambda self, batch_size, say: CountingDecoder(say))
    runner = Runner(Arm("plain", CHECKPOINT, None, 0, compiled=True), 1)
    assert runner.decode([[1]]).result.decode_tok_per_s == pytest.approx(3.0)
    assert runner.decode([[1]]).result.decode_tok_per_s == pytest.approx(4.0)


class CyclingDecoder:
    """Two full cycles with N = 2, and a shorter one at the end."""

    def __init__(self):
        self.policy = FixedLength(2)

    def generate(self, prompts, **_):
        for length, draft_s, verify_s in ((2, 0.004, 0.010), (2, 0.006, 0.014), (1, 0.001, 0.001)):
            self.policy.record(Cycle(length, (length,), (0,), draft_s, verify_s))
        return result(1.0, {}, (0, 0))


def test_costs_are_means_over_full_cycles_and_the_policy_is_put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Arm, "decoder", lambda self, batch_size, say: CyclingDecoder())
    runner = Runner(Arm("MTP N = 2", CHECKPOINT, None, 2, compiled=False), 1)
    found = runner.cycle([[1]])
    assert (found.verify_s, found.draft_s) == pytest.approx((0.012, 0.0025))  # with the short cycle 0.0083, 0.0018
    assert runner.decoder.policy == FixedLength(2)


def test_cycles_that_draft_nothing_lower_tokens_per_forward_and_not_the_mean_acceptance_length():
    one = result(1.0, {2: (0, 0, 2)}, (0, 1, 2, 0, 0, 0, 1, 2, 0))  # 3 tokens, 1, 1, 3
    assert one.stats.mean_acceptance_length == 3.0
    assert tokens_per_forward([one]) == 2.0


# ------------------------------------------------------------------------------------------------------------ the peers


def peer(engine: str, length: int, answers: dict[int, tuple[int, ...]], calls: list) -> peers.PeerArm:
    def complete(prompt, max_new_tokens):
        if max_new_tokens > peers.NUM_WARM_UP_TOKENS:
            calls.append((engine, length, prompt[0]))
        return Completion(answers[prompt[0]], 2 * bool(length), 2 * length, 3 * bool(length), 0.5)

    return peers.PeerArm(engine, length, complete)


def test_every_prompt_goes_to_every_engine_in_turn_and_outputs_are_compared_with_ours():
    calls: list = []
    same, other = {1: (7, 8), 2: (7, 8)}, {1: (7, 8, 0), 2: (7, 9)}
    arms = [peer("nextn", 0, same, calls), peer("theirs", 0, other, calls), peer("theirs", 2, same, calls)]
    peers.measure_peers(arms, [[1], [2]], 16, num_repeats=2)
    assert [call[:2] for call in calls[:6]] == [
        ("nextn", 0), ("theirs", 0), ("theirs", 2), ("theirs", 0), ("theirs", 2), ("nextn", 0),
    ]  # fmt: skip
    ours, plain, drafting = peers.peer_figures(arms, 0, "a scenario")
    assert (ours.num_identical_outputs, plain.num_identical_outputs, drafting.num_identical_outputs) == (2, 1, 2)
    assert plain.first_difference == 1
    assert drafting.mean_acceptance_length == 2.5
    assert drafting.speedup.median == pytest.approx(4 / 5), "against the same engine's plain decoding"
    assert len(ours.end_to_end_tok_per_s) == 2


def test_a_peer_that_is_unknown_or_not_installed_is_an_error_that_helps(tmp_path: Path):
    with pytest.raises(ConfigError, match="transformers, vllm, llamacpp, or none; got 'sglang'"):
        check_peers(["sglang"], tmp_path)
    for name in ("vllm", "llamacpp"):
        with pytest.raises(ConfigError, match=f"{name} is not installed.*make engines"):
            check_peers([name], tmp_path)


# ------------------------------------------------------------------------------------------------------- the approaches


def test_training_costs_are_those_up_to_the_checkpoint(tmp_path: Path):
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    lines = [
        {"kind": "train", "step": 2, "num_tokens": 200, "training_s": 4.0},
        {"kind": "evaluation", "step": 2, "bits_per_byte_per_depth": [2.5, 3.0]},
        {"kind": "train", "step": 4, "num_tokens": 400, "training_s": 8.0},
        {"kind": "evaluation", "step": 4, "bits_per_byte_per_depth": [1.5, 2.0]},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = random_model(0)
    found = trained_model(checkpoint, model)
    assert (found.num_training_tokens, found.training_s, found.bits_per_byte) == (200, 4.0, 2.5)
    assert found.num_mtp_parameters == sum(p.numel() for p in model.scheme.parameters())
    assert found.num_trunk_parameters + found.num_mtp_parameters == sum(p.numel() for p in model.parameters())
    elsewhere = trained_model(tmp_path, model)
    assert (elsewhere.num_training_tokens, elsewhere.bits_per_byte) == (None, None)


def test_a_draft_model_costs_its_own_training_and_its_targets():
    standard, mtp, draft = (TrainedModel(n, float(n), 2.0 + n, n, extra) for n, extra in ((100, 0), (120, 30), (10, 0)))
    models = {"standard": standard, "mtp": mtp, "draft_model": draft}
    rows = approaches(models, {"mtp": ("MTP N = 2", 150.0), "draft_model": ("draft model", 110.0)}, 100.0)
    by_name = {row.name: row for row in rows}
    assert len(rows) == 4
    drafting = by_name["speculative decoding, draft model"]
    assert (drafting.num_training_tokens, drafting.training_s, drafting.num_parameters) == (110, 110.0, 110)
    assert drafting.bits_per_byte == standard.bits_per_byte, "a draft model's own loss is not what one reads"
    assert by_name["MTP"].speedup == 1.5
    assert "--parallel" in by_name["parallel decoding"].arm
    alone = approaches({"mtp": mtp, "draft_model": draft}, {}, 100.0)[2]
    assert (alone.num_training_tokens, alone.num_parameters) == (130, 130), "the target's MTP modules are not used"


# ------------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def report() -> BenchReport:
    figures = []
    for temperature in (0.0, 1.0):
        scenario = Scenario("<held-out>", 5, 1, temperature)
        own = [Runner(arm, 1) for arm in some_arms(verifier="typical")]
        figures.append(measure_scenario(scenario, own, PROMPTS, {}, max_new_tokens=8, num_repeats=2))
    peer_figures = peers.PeerFigures("transformers", 0, "greedy", (90.0, 91.0), Speedup(1.0, 1.0, 1.0), 1.0, 2, 3, 4)
    return BenchReport.of_scenarios(
        "runs/<demo>",
        figures,
        peers=(peer_figures,),
        approaches=(
            Approach("standard decoding", "train one"),
            Approach("MTP", "MTP N = 2", 10, 1.0, 2.0, 5, 1, 9.0, 1.1),
        ),
        notes=("A note.",),
        options={"num_repeats": 2, "dtype": "float32"},
        provenance={"nextn": {"version": "0"}},
    )


def test_the_page_is_well_formed_safe_and_loads_nothing(report: BenchReport):
    text = bench_page.render(report)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") for link in page.links)
    assert "http" not in text
    assert "<held-out>" not in text
    words = "".join(page.words)
    assert all(line in words for line in (*report.verdicts, *report.notes, "runs/<demo>", "train one"))
    assert words.count("MTP N = 2, typical (lossy)") == 2


def test_a_report_without_drafts_peers_and_approaches_has_a_page_too():
    plain = arms_of(random_model(0, num_depths=0), [], compiled=False, drafting="as_trained")[:1]
    figures = measure_scenario(SCENARIO, runners(*plain), PROMPTS, {}, max_new_tokens=4, num_repeats=1)
    report = BenchReport.of_scenarios(
        "m", [figures], peers=(), approaches=(), notes=(), options={"num_repeats": 1}, provenance={}
    )
    assert "Only plain decoding was measured" in "".join(Page(bench_page.render(report)).words)


def test_the_report_goes_to_json_with_its_verdicts(report: BenchReport):
    table = json.loads(json.dumps(to_table(report), allow_nan=False))
    assert table["summary"] == report.summary
    assert len(table["verdicts"]) == len(table["scenarios"]) == 2
    assert table["scenarios"][0]["arms"][1]["speedup"].keys() == {"median", "lowest", "highest"}


def test_the_verdict_leaves_lossy_arms_out(report: BenchReport):
    for figures in report.scenarios:
        assert any("lossy" in arm.name for arm in figures.arms)
        assert not any("lossy" in name for name in figures.speedups)
        assert figures.verdict == verdict.decide(figures.speedups).text
