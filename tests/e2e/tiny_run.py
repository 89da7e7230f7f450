"""A training run small enough for tests: a DeepSeek-V3-shaped model of a few thousand weights on synthetic text."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from nextn.config import DataConfig, EvaluationConfig, ModelConfig, MTPConfig, OptimizerConfig, Recipe, TrainingConfig
from nextn.data import PackedTokens
from nextn.mtp import MTPModel
from nextn.training import Trainer

torch.set_num_threads(1)  # tiny products gain nothing from threads, and wait for them when the machine is busy

VOCAB_SIZE = 24

RECIPE = Recipe(
    model=ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    ),
    mtp=MTPConfig(num_depths=2),
    data=DataConfig(sequence_length=24),
    optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, num_warmup_steps=3),
    training=TrainingConfig(
        num_steps=12,
        batch_size=6,
        device="cpu",
        precision="float32",
        bias_update_speed=0.01,
        log_every=1,
        evaluate_every=4,
        checkpoint_every=4,
    ),
    evaluation=EvaluationConfig(num_rows=4, num_prompts=0),
)


def recipe_with(recipe: Recipe = RECIPE, **tables: dict[str, Any]) -> Recipe:
    """`recipe` with some settings of some tables changed: `recipe_with(training={"seed": 3})`."""
    changed = {name: dataclasses.replace(getattr(recipe, name), **values) for name, values in tables.items()}
    return dataclasses.replace(recipe, **changed)


def tokens(num_documents: int = 60, seed: int = 0) -> PackedTokens:
    """Documents of 3 to 40 tokens, each a noisy cycle through part of the vocabulary, ended by token 0."""
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(num_documents):
        length, start, stride = random.integers(3, 41), random.integers(0, 23), random.integers(1, 4)
        cycle = 1 + (start + stride * np.arange(length)) % (VOCAB_SIZE - 1)
        noise = random.random(length) < 0.1
        documents.append(np.append(np.where(noise, random.integers(1, VOCAB_SIZE, length), cycle), 0))
    return PackedTokens(
        token_ids=np.concatenate(documents).astype(np.int32),
        document_ids=np.repeat(np.arange(num_documents), [len(d) for d in documents]).astype(np.int32),
        num_bytes=2 * sum(len(document) for document in documents),
    )


def trainer(run_folder: Path, recipe: Recipe = RECIPE, **arguments: Any) -> Trainer:
    """A trainer of a fresh model; `arguments` replace the usual ones."""
    model = MTPModel(recipe.model, recipe.mtp).initialize(recipe.training.seed)
    usual: dict[str, Any] = {
        "model": model,
        "train_tokens": tokens(),
        "validation_tokens": tokens(20, seed=1),
        "evaluate": None,
        "provenance": {"made_by": "a test"},
        "console": Console(file=io.StringIO()),
    }
    return Trainer(recipe, run_folder=run_folder, **(usual | arguments))
