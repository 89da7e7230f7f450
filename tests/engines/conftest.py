"""A small trained model that every engine can serve, prompts for it, and where the engines are."""

from __future__ import annotations

import dataclasses
import io
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

import nextn
from nextn.config import DataConfig, EvaluationConfig, ModelConfig, MTPConfig, OptimizerConfig, Recipe, TrainingConfig
from nextn.data.corpora import Document
from nextn.data.packing import pack
from nextn.data.tokenizers import ByteTokenizer
from nextn.mtp import MTPModel
from nextn.training import Trainer

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")[:6000]

RECIPE = Recipe(
    model=ModelConfig(
        vocab_size=257,
        hidden_size=96,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,  # heads of 32: vLLM's kernels for a CPU take 32, 64 and more
        max_position_embeddings=512,
    ),
    mtp=MTPConfig(num_depths=2, share_weights=True),
    data=DataConfig(sequence_length=96),
    optimizer=OptimizerConfig(name="muon", learning_rate=8e-3, muon_learning_rate=0.03, num_warmup_steps=10),
    training=TrainingConfig(
        num_steps=130,
        batch_size=12,
        device="cpu",
        precision="float32",
        bias_update_speed=0.01,
        evaluate_every=0,
        checkpoint_every=0,
    ),
    evaluation=EvaluationConfig(num_rows=2, num_prompts=0),
)
"""DeepSeek-V3 with one MTP module used at both depths; it half learns the first half of the licence."""

PROMPTS = (TEXT[2000:2040], TEXT[4100:4117], "The Contributor shall mean any ", "x", "1. Grant\n\n   of né ")
"""Two that it has read, three that it has not."""


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint on disk and the same model loaded.

    Attributes:
        folder: the checkpoint.
        model: read from it, float32.
        prompts: token ids of each prompt.
    """

    folder: Path
    model: MTPModel
    prompts: tuple[tuple[int, ...], ...]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """The model of `RECIPE`, trained by the trainer itself in about a quarter of a minute."""
    tokenizer = ByteTokenizer()
    tokens = pack([Document("licence", TEXT)], tokenizer)
    model = MTPModel(RECIPE.model, RECIPE.mtp).initialize(RECIPE.training.seed)
    model.tokenizer = tokenizer
    trainer = Trainer(
        RECIPE,
        model,
        tokens,
        tokens,
        tmp_path_factory.mktemp("engines") / "run",
        evaluate=None,
        provenance={"made_by": "a test"},
        console=Console(file=io.StringIO()),
    )
    torch.set_num_threads(1)
    folder = trainer.train().checkpoint
    prompts = tuple(tuple(int(token) for token in tokenizer.encode(prompt)) for prompt in PROMPTS)
    return TrainedModel(folder, nextn.load(folder), prompts)


def random_model(seed: int, mtp: MTPConfig = RECIPE.mtp, **changes: object) -> MTPModel:
    """Fresh weights of a shape near `RECIPE`'s, larger than usual so that outputs differ, with the byte tokenizer."""
    config = dataclasses.replace(RECIPE.model, **{"initializer_range": 0.1, **changes})  # type: ignore[arg-type]
    model = MTPModel(config, mtp).initialize(seed).eval()
    model.tokenizer = ByteTokenizer()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.weight", "e_score_correction_bias")):  # else ones and zeros, which hide a mix-up
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return model


def engines_folder() -> Path:
    """Where the engines' virtual environments are: NEXTN_ENGINES, or `.engines` in the repository."""
    return Path(os.environ.get("NEXTN_ENGINES", ROOT / ".engines"))


def engine_python(engine: str) -> Path:
    """The Python of an engine's virtual environment; skips the test, with the reason, where there is none."""
    python = engines_folder() / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{engine} is not installed in {engines_folder()} (make engines, or set NEXTN_ENGINES)")
    return python


def engine_file(engine: str, pattern: str) -> Path:
    """The one file of an engine's installed packages that matches; skips the test where there is none."""
    engine_python(engine)
    found = sorted((engines_folder() / engine).glob(f"lib/python3*/site-packages/{pattern}"))
    if not found:
        pytest.skip(f"{engine} in {engines_folder()} has no {pattern}; install it anew (make engines)")
    return found[0]
