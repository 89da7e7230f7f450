"""What a study measures of one model: the names, the laws between the figures, and what is left out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextn.config import DataConfig, EvaluationConfig, ModelConfig, MTPConfig, Recipe, TrainingConfig
from nextn.data import ByteTokenizer, Corpus, Document, pack, validation_rows
from nextn.decoding import generate
from nextn.errors import ConfigError
from nextn.mtp import MTPModel
from nextn.study import evaluate
from nextn.study.definition import ModelEvaluationConfig
from nextn.study.evaluate import TIMED, RunMetrics, evaluate_model
from nextn.study.metrics import metric_of
from nextn.training import PreparedData, evaluate_teacher_forced

torch.set_num_threads(1)

BYTES = ByteTokenizer()
RECIPE = Recipe(
    model=ModelConfig(
        vocab_size=BYTES.vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, kv_lora_rank=4,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, intermediate_size=8, first_k_dense_replace=1,
        n_routed_experts=0, n_shared_experts=0, max_position_embeddings=96, initializer_range=0.5,
    ),
    mtp=MTPConfig(num_depths=2),
    data=DataConfig(sequence_length=32),
    training=TrainingConfig(batch_size=3),
    evaluation=EvaluationConfig(num_prompts=0),
)  # fmt: skip
EVALUATION = ModelEvaluationConfig(
    num_rows=8, num_prompts=3, prompt_length=8, max_new_tokens=20, num_timed_prompts=1, num_repeats=2,
    num_completions=5, completion_length=12,
)  # fmt: skip
PYTHON = "".join(f"def f{i}(x):\n    y = x + {i}\n    return y\n\n\n" for i in range(12))
PROSE = "Once upon a time there was a fox who lived in a wood.\n" * 12
SPEEDS = [name for name in TIMED if name.startswith("decode_speedup")]


def held_out(*texts: str) -> PreparedData:
    documents = tuple(Document(f"{index}.txt", text) for index, text in enumerate(texts))
    return PreparedData(Corpus("a test's", (), documents, ()), BYTES, pack((), BYTES), pack(documents, BYTES))


def model(num_depths: int, seed: int = 0) -> MTPModel:
    made = MTPModel(RECIPE.model, replace(RECIPE.mtp, num_depths=num_depths)).initialize(seed).eval()
    made.tokenizer = BYTES
    return made


DATA = held_out(PYTHON, PYTHON.replace("f", "g").replace("deg", "def"))
UNTIMED = replace(EVALUATION, num_timed_prompts=0)


@pytest.fixture(scope="module")
def measured() -> RunMetrics:
    return evaluate_model(model(2), DATA, RECIPE, EVALUATION)


# ---------------------------------------------------------------------------------------------------------- the names


def test_every_name_is_known_and_every_value_is_finite(measured):
    assert all(metric_of(name) is not None for name in measured.values)
    assert all(math.isfinite(value) for value in measured.values.values())


def test_a_model_with_depths_has_everything_but_tasks(measured):
    expected = {"loss", "bits_per_byte", "loss_near", "loss_far", "loss_of_depth_1", "loss_of_depth_2"}
    expected |= {"al_greedy", "al_sampled", "repeated_share", "parse_share", "num_parameters", "num_mtp_parameters"}
    assert expected | set(TIMED) <= set(measured.values)


@pytest.mark.parametrize("num_depths", [0, 2])
def test_a_draft_model_brings_acceptance_of_three_drafts_and_its_parameters(num_depths):
    plain, helper = model(num_depths), model(0, seed=1)
    values = evaluate_model(plain, DATA, RECIPE, EVALUATION, draft_model=helper).values
    assert {"al_greedy", "al_sampled", *TIMED} <= values.keys()
    assert "acceptance_greedy_unconditional_3" in values
    num_both = sum(p.numel() for one in (plain, helper) for p in one.parameters())
    assert values["num_parameters"] == num_both


def test_a_plain_model_has_no_acceptance_and_only_its_plain_speed():
    values = evaluate_model(model(0), DATA, RECIPE, EVALUATION).values
    assert not [name for name in values if name.startswith(("al_", "acceptance_", "loss_of_depth"))]
    assert values.keys() & set(TIMED) == {"decode_tok_per_s_plain"}
    assert {"repeated_share", "parse_share", "loss_far"} <= values.keys()
    assert values["num_mtp_parameters"] == 0


def test_what_is_not_asked_for_is_not_measured():
    nothing = replace(EVALUATION, num_prompts=0, num_timed_prompts=0, num_completions=0)
    losses_and_sizes = {"loss", "bits_per_byte", "loss_near", "loss_far", "loss_of_depth_1", "loss_of_depth_2"}
    losses_and_sizes |= {"num_parameters", "num_mtp_parameters"}
    assert evaluate_model(model(2), DATA, RECIPE, nothing).values.keys() == losses_and_sizes
    assert not evaluate_model(model(2), DATA, RECIPE, UNTIMED).values.keys() & set(TIMED)


def test_a_single_new_token_has_neither_cycles_nor_a_speed():
    values = evaluate_model(model(2), DATA, RECIPE, replace(EVALUATION, max_new_tokens=1)).values
    assert not [name for name in values if name.startswith(("al_", "acceptance_", "decode_"))]


def test_all_but_the_timed_is_the_same_every_time(measured):
    again = evaluate_model(model(2), DATA, RECIPE, EVALUATION)
    assert {**again.values, **{name: measured.values[name] for name in TIMED}} == measured.values
    assert again.loss_by_position == measured.loss_by_position


# --------------------------------------------------------------------------------------------------------- the losses


def test_the_losses_are_those_of_the_evaluation_on_the_same_rows(measured):
    rows = validation_rows(DATA.validation, RECIPE.data.sequence_length, EVALUATION.num_rows)
    forced = evaluate_teacher_forced(model(2), rows, DATA.validation.bytes_per_token)
    found = [measured.values[name] for name in ("loss", "loss_of_depth_1", "loss_of_depth_2")]
    assert found == pytest.approx(forced.loss_per_depth, rel=1e-5)
    assert measured.values["bits_per_byte"] == pytest.approx(forced.bits_per_byte_per_depth[0], rel=1e-5)


def test_the_loss_is_the_mean_of_the_loss_by_position_over_labels(measured):
    pairs = list(zip(measured.loss_by_position, measured.num_by_position, strict=True))
    mean = sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)
    assert len(pairs) == 8
    assert measured.values["loss"] == pytest.approx(mean, rel=1e-5)


COUNTS = st.lists(st.integers(0, 9), min_size=8, max_size=8)


@given(counts=COUNTS, losses=st.lists(st.floats(0, 9), min_size=8, max_size=8))
def test_near_and_far_are_means_over_labels_of_the_first_and_the_last_quarter(counts, losses):
    labels = {
        "loss_near": [losses[0]] * counts[0] + [losses[1]] * counts[1],
        "loss_far": [losses[6]] * counts[6] + [losses[7]] * counts[7],
    }
    expected = {name: sum(values) / len(values) for name, values in labels.items() if values}
    assert evaluate._near_and_far(losses, counts) == pytest.approx(expected)


def test_a_mean_over_buckets_instead_of_labels_is_caught():
    found = evaluate._near_and_far([4.0, 2.0] * 4, [3, 1] * 4)
    assert found["loss_near"] == 3.5 != (4.0 + 2.0) / 2


# ------------------------------------------------------------------------------------------------------- the decoding


def test_a_model_that_drafts_for_itself_has_everything_accepted():
    plain = model(0)
    values = evaluate_model(plain, DATA, RECIPE, UNTIMED, draft_model=plain).values
    shares = {name: value for name, value in values.items() if name.startswith("acceptance_")}
    assert len(shares) == 12  # greedy and sampled, conditional and not, three depths
    assert set(shares.values()) == {1.0}
    assert values["al_greedy"] > 3.5


def test_another_draft_model_is_caught():
    values = evaluate_model(model(0), DATA, RECIPE, UNTIMED, draft_model=model(0, seed=1)).values
    assert values["acceptance_greedy_1"] < 1


def test_acceptance_is_that_of_decoding_prompt_by_prompt(measured, monkeypatch):
    monkeypatch.setattr(evaluate, "DECODING_BATCH_SIZE", 1)
    alone = evaluate_model(model(2), DATA, RECIPE, UNTIMED).values
    for name, value in alone.items():
        if name.startswith(("al_", "acceptance_", "repeated_share")):
            assert measured.values[name] == pytest.approx(value), name


def test_every_depth_drafts_one_token(monkeypatch):
    lengths = set()
    monkeypatch.setattr(evaluate, "generate", lambda *a, **k: lengths.add(k["draft_length"]) or generate(*a, **k))
    evaluate_model(model(2), DATA, RECIPE, replace(UNTIMED, num_completions=0))
    assert lengths == {2}


def test_text_is_not_ended_at_the_end_of_text(monkeypatch):
    ends = set()
    monkeypatch.setattr(evaluate, "generate", lambda *a, **k: ends.add(k["eos_token_id"]) or generate(*a, **k))
    evaluate_model(model(2), DATA, RECIPE, replace(EVALUATION, num_completions=0))
    assert ends == {None}


def test_plain_and_drafted_decoding_are_timed_in_turn_and_the_warm_up_is_not_counted(monkeypatch):
    order, rates = [], iter([900.0, 900.0, 10.0, 30.0, 50.0, 10.0, 30.0, 90.0])

    class Decoded:
        decode_tok_per_s = 0.0

    def fake(_, prompts, *, draft_length, **settings):
        assert settings.get("batch_size", 1) == 1
        order.append(draft_length)
        decoded = Decoded()
        decoded.decode_tok_per_s = next(rates)
        return decoded

    monkeypatch.setattr(evaluate, "generate", fake)
    ways = [evaluate.PLAIN, evaluate._Drafting(2)]
    evaluation = replace(EVALUATION, num_repeats=3)
    assert evaluate._decoding_rates(model(2), [[1, 2]], ways, evaluation, 0.0) == [
        [10.0, 10.0, 30.0],
        [30.0, 50.0, 90.0],
    ]
    assert order == [0, 2, 0, 2, 2, 0, 0, 2]


def test_speeds_are_medians_and_the_speedup_is_of_pairs(monkeypatch):
    monkeypatch.setattr(evaluate, "_decoding_rates", lambda *_: [[10.0, 20.0, 40.0], [30.0, 20.0, 80.0]])
    values = evaluate._speed(model(2), [[1]], EVALUATION, evaluate._Drafting(2))
    assert values == {
        "decode_tok_per_s_plain": 20.0,
        "decode_tok_per_s": 30.0,
        "decode_speedup_greedy": 2.0,  # not 30 / 20
        "decode_speedup_sampled": 2.0,
    }


# -------------------------------------------------------------------------------------------------------- the quality


def completing_with(monkeypatch: pytest.MonkeyPatch, texts: list[str], reasons: list[str]) -> dict[str, float]:
    """parse_share where the model samples these texts."""

    class Completed:
        pass

    def fake(_, prompts, **settings):
        assert len(prompts) == len(texts)
        completed = Completed()
        completed.texts, completed.finish_reasons = tuple(texts), tuple(reasons)
        return completed

    monkeypatch.setattr(evaluate, "generate", fake)
    evaluation = replace(EVALUATION, num_completions=len(texts))
    return evaluate._parse_share(model(0), DATA, 32, evaluation, lambda _: None)


def test_the_share_that_parses_is_of_the_completions_of_which_it_can_be_said(monkeypatch):
    texts = ["    return x\n", "    return x)\n", '    """Not yet', "    return x\nx = 1", "    return ("]
    assert completing_with(monkeypatch, texts, ["length"] * 5) == {"parse_share": 2 / 3}


def test_a_text_that_ended_by_itself_is_not_forgiven_its_open_bracket(monkeypatch):
    assert completing_with(monkeypatch, ["    y = x\n    z = ("], ["length"]) == {"parse_share": 1.0}
    assert completing_with(monkeypatch, ["    y = x\n    z = ("], ["eos"]) == {"parse_share": 0.0}


def test_no_share_is_given_where_nothing_can_be_said(monkeypatch):
    assert completing_with(monkeypatch, ["    return", '    """Open'], ["length"] * 2) == {}


def test_prose_has_no_share_that_parses():
    values = evaluate_model(model(0), held_out(PROSE, PROSE), RECIPE, UNTIMED).values
    assert "parse_share" not in values
    assert "repeated_share" in values


def test_a_completion_that_leaves_no_room_for_a_function_in_a_row_is_refused():
    with pytest.raises(ConfigError, match=r"completion_length = 25, but a row has data\.sequence_length = 32"):
        evaluate_model(model(0), DATA, RECIPE, replace(UNTIMED, completion_length=25))


def test_scores_of_tasks_are_named_by_task_and_metric(monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(Path(__file__).parents[1] / "e2e" / "tasks")  # their data are read from there
    tasks = replace(UNTIMED, num_prompts=0, num_completions=0, tasks=("which_fits.yaml",), task_limit=2)
    values = evaluate_model(model(0), DATA, RECIPE, tasks).values
    assert 0 <= values["task/which_fits/acc"] <= 1
    assert metric_of("task/which_fits/acc") is not None
