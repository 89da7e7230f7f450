"""The serving engines: the requirements of each for a model with MTP modules, and its launch command.

A model is judged in its canonical form (`nextn.interop.canonical`), which is how it is exported.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nextn.config import ModelConfig, MTPConfig
from nextn.interop.canonical import canonical_config
from nextn.interop.requirements import (
    VLLM_LATENT_DIM,
    reasons_against_llamacpp,
    reasons_against_sglang,
    reasons_against_transformers,
    reasons_against_vllm,
)
from nextn.mtp.config_file import num_released_modules


@dataclass(frozen=True)
class Engine:
    """A serving engine.

    Attributes:
        name: as in ENGINES.
        reasons_against: why it cannot serve a model with MTP, one sentence each, empty when it can.
        launch_line: shell command (or Python) that serves what was exported, given its path, the model's settings, N
            (the tokens to draft per cycle) and the dtype of its weights.
    """

    name: str
    reasons_against: Callable[[ModelConfig, MTPConfig], list[str]]
    launch_line: Callable[[Path, ModelConfig, MTPConfig, int, str], str]


def reasons_against(engine: str, config: ModelConfig, mtp_config: MTPConfig) -> list[str]:
    """Why an engine of ENGINES cannot serve this model with its MTP modules, one sentence each; empty when it can."""
    return ENGINES[engine].reasons_against(*canonical_config(config, mtp_config))


def launch_line(
    engine: str,
    path: Path,
    config: ModelConfig,
    mtp_config: MTPConfig,
    draft_length: int = 2,
    dtype: str = "float32",
) -> str:
    """The command that serves the exported model at `path`, N = `draft_length`, computing in `dtype` where it asks."""
    return ENGINES[engine].launch_line(path, config, mtp_config, draft_length, dtype)


def layer_patterns(config: ModelConfig, mtp_config: MTPConfig) -> list[str]:
    """Regular expressions of the MTP layers' names, for transformers' `_keys_to_ignore_on_load_unexpected`.

    transformers looks for MTP weights under the layer numbers its class lists, which for DeepSeek-V3 is 61 alone.
    """
    first = config.num_hidden_layers
    return [rf"model\.layers\.{layer}\." for layer in range(first, first + num_released_modules(mtp_config))]


# ------------------------------------------------------------------------------------------------------ how to start it


def _launch_transformers(path: Path, config: ModelConfig, mtp_config: MTPConfig, draft_length: int, dtype: str) -> str:
    lines = [
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM",
        f"DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = {layer_patterns(config, mtp_config)!r}",
        f"model = AutoModelForCausalLM.from_pretrained({str(path)!r}, dtype=torch.{dtype})",
        f"tokenizer = AutoTokenizer.from_pretrained({str(path)!r})",
        'inputs = tokenizer("def main(", return_tensors="pt", add_special_tokens=False)',
        f"ids = model.generate(**inputs, max_new_tokens=64, do_sample=False{', use_mtp=True' * bool(draft_length)})",
        "print(tokenizer.decode(ids[0]))",
    ]
    return "\n".join(lines)


def _launch_vllm(path: Path, config: ModelConfig, mtp_config: MTPConfig, draft_length: int, dtype: str) -> str:
    environment = ["VLLM_CPU_KVCACHE_SPACE=1", "HF_HUB_OFFLINE=1"]
    if config.latent_dim != VLLM_LATENT_DIM:
        environment.append("VLLM_MLA_DISABLE=1")
    words = [
        *environment,
        *("python", "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--dtype", dtype),
        *("--max-model-len", str(config.max_position_embeddings), "--enforce-eager"),
        *("--compilation-config", json.dumps(VLLM_COMPILATION)),
    ]
    if draft_length:
        words += ["--speculative-config", json.dumps(vllm_speculation(draft_length))]
        words += ["--override-generation-config", json.dumps(VLLM_GREEDY)]
    return shlex.join(words)


VLLM_COMPILATION = {"custom_ops": ["-rotary_embedding"]}
"""Without it vLLM 0.32 on a CPU rotates DeepSeek's queries and keys wrongly in eager mode, silently."""


VLLM_GREEDY = {"temperature": 0}
"""What a request means that names no temperature: vLLM's sampler on a CPU is wrong with drafts and a temperature."""


def vllm_speculation(draft_length: int) -> dict[str, str | int]:
    """vLLM's `speculative_config` for N = `draft_length`."""
    return {"method": "mtp", "num_speculative_tokens": draft_length}


def _launch_sglang(path: Path, config: ModelConfig, mtp_config: MTPConfig, draft_length: int, dtype: str) -> str:
    words = ["python", "-m", "sglang.launch_server", "--model-path", str(path)]
    if draft_length:
        words += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(draft_length)]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(draft_length + 1)]
    return shlex.join(words)


def _launch_llamacpp(path: Path, config: ModelConfig, mtp_config: MTPConfig, draft_length: int, dtype: str) -> str:
    words = ["llama-server", "-m", str(path), "-c", str(config.max_position_embeddings)]
    if draft_length:
        words += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(draft_length)]
    return shlex.join(words)


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("transformers", reasons_against_transformers, _launch_transformers),
        Engine("vllm", reasons_against_vllm, _launch_vllm),
        Engine("sglang", reasons_against_sglang, _launch_sglang),
        Engine("llamacpp", reasons_against_llamacpp, _launch_llamacpp),
    )
}
"""Every engine by name."""
