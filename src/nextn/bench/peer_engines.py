"""Other engines, started with this checkpoint: transformers in this process, vLLM and llama.cpp as servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from nextn.bench.peers import LLAMACPP, PEERS, TRANSFORMERS, VLLM, Complete, PeerArm
from nextn.errors import ConfigError, ExportError
from nextn.interop.adapter import TransformersTrunk
from nextn.interop.engine_clients import Completion, llamacpp_binary, llamacpp_server, vllm_python, vllm_server
from nextn.interop.engines import layer_patterns
from nextn.interop.export import export_model
from nextn.interop.hf_layout import quiet
from nextn.interop.load import load_with_transformers
from nextn.mtp import MTPModel
from nextn.mtp.config_file import num_released_modules


def check_peers(names: Sequence[str], engines: Path) -> None:
    """Raise ConfigError for a name that is none of `PEERS`, or an engine that is not installed in that folder."""
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--peers knows {', '.join(PEERS)}, or none; got {name!r}")
        missing = not vllm_python(engines).exists() if name == VLLM else llamacpp_binary(engines) is None
        if name != TRANSFORMERS and missing:
            raise ConfigError(
                f"{name} is not installed in {engines}: run make engines (20 minutes), name the folder with --engines, "
                "or leave it out of --peers"
            )


@contextmanager
def peer_arms(
    names: Sequence[str],
    folder: Path,
    model: MTPModel,
    draft_lengths: Sequence[int],
    work: Path,
    *,
    engines: Path,
    dtype: str,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[list[PeerArm]]:
    """The engines with this checkpoint, plain first, ready to be asked; servers end with the context.

    transformers drafts as many tokens as the checkpoint has modules. A model that nextn itself runs through
    transformers is asked as it is, plainly.

    Args:
        names: of `PEERS`.
        folder: the checkpoint.
        model: the same, loaded.
        draft_lengths: N of the servers, each with a server of its own; 0 is always there.
        work: an empty folder for exports.
        engines: where `make engines` has installed them.
        dtype: of the weights, float32 or bfloat16.
        say: told what begins.

    Raises:
        ExportError: an engine cannot serve this model, with every reason.
        ConfigError: an engine is not installed.
    """
    check_peers(names, engines)
    lengths = sorted({0, *draft_lengths}) if model.num_depths else [0]
    arms: list[PeerArm] = []
    with ExitStack() as stack:
        if TRANSFORMERS in names:
            arms += _transformers_arms(folder, model, work / "hf", dtype)
        if VLLM in names:
            exported = export_model(folder, "vllm", work / "vllm", dtype=dtype).path
            for length in lengths:
                say(f"starting vLLM, N = {length}")
                vllm = stack.enter_context(vllm_server(vllm_python(engines), exported, length, dtype))
                arms.append(PeerArm(VLLM, length, vllm.complete))
        if LLAMACPP in names:
            binary = llamacpp_binary(engines)
            assert binary is not None, "checked above"
            file = export_model(folder, "gguf", work / "model.gguf", dtype=_gguf_dtype(dtype)).path
            for length in lengths:
                say(f"starting llama.cpp, N = {length}")
                llamacpp = stack.enter_context(llamacpp_server(binary, file, length, torch.get_num_threads()))
                arms.append(PeerArm(LLAMACPP, length, llamacpp.complete))
        yield arms


def _transformers_arms(folder: Path, model: MTPModel, exported: Path, dtype: str) -> list[PeerArm]:
    """Plain, and `use_mtp` with a draft per stored module; plain alone where nextn itself runs transformers' trunk."""
    if isinstance(model.trunk, TransformersTrunk):
        return [PeerArm(TRANSFORMERS, 0, _in_process(model.trunk, 0))]
    export_model(folder, "hf", exported, dtype=dtype)
    trunk = load_with_transformers(exported, str(model.trunk.device), dtype).trunk
    assert isinstance(trunk, TransformersTrunk), "it was loaded so"
    # transformers looks for MTP weights under the names that the model's class ignores, which are those of one release.
    trunk.model._keys_to_ignore_on_load_unexpected = layer_patterns(model.config, model.mtp_config)  # type: ignore[assignment]
    return [
        PeerArm(TRANSFORMERS, length, _in_process(trunk, length))
        for length in sorted({0, num_released_modules(model.mtp_config)})
    ]


def _in_process(trunk: TransformersTrunk, draft_length: int) -> Complete:
    """transformers' own generation. It tells no acceptance: trunk forwards after the prompt's are its cycles."""
    theirs: Any = trunk.model
    options = {"use_mtp": True} if draft_length else {}

    def complete(prompt_ids: Sequence[int], max_new_tokens: int) -> Completion:
        num_forwards = 0

        def count(*_: object) -> None:
            nonlocal num_forwards
            num_forwards += 1

        ids = torch.tensor([list(prompt_ids)], device=trunk.device)
        hook = theirs.get_decoder().layers[0].register_forward_hook(count)
        try:
            started = time.perf_counter()
            with quiet():
                out = theirs.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
                )
            token_ids = tuple(out[0, ids.shape[1] :].tolist())
            wall_s = time.perf_counter() - started
        finally:
            hook.remove()
        num_drafts = num_forwards - 1 if draft_length else 0
        num_accepted = len(token_ids) - 1 - num_drafts if draft_length else 0
        return Completion(token_ids, num_drafts, num_drafts * draft_length, num_accepted, wall_s)

    return complete


def _gguf_dtype(dtype: str) -> str:
    known = {"float32": "f32", "bfloat16": "bf16"}
    if dtype not in known:
        raise ExportError(f"llama.cpp is compared in {' or '.join(known)}, got {dtype}")
    return known[dtype]
