"""`nextn export`: a checkpoint as a serving engine wants it, and the line that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nextn.cli.console import messages, status
from nextn.interop.export import export_model
from nextn.provenance import collect


def export(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its last checkpoint is taken).")],
    to: Annotated[
        Literal["hf", "vllm", "sglang", "gguf"],
        typer.Option(help="hf (transformers), vllm, sglang: a folder; gguf (llama.cpp): a file."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder or file to write; must not exist. Default: PATH-FORMAT, or PATH.gguf.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Folders: float32 (default), bfloat16, float16. GGUF: f32 (default), bf16, q8_0."),
    ] = None,
    draft_length: Annotated[int, typer.Option(min=0, help="N in the printed line; hf: one draft per module.")] = 2,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Folders: largest file, in 10^9 bytes.")] = 5.0,
) -> None:
    """Write a checkpoint for a serving engine, its MTP modules included, and print the line that serves it.

    Refuses, with the reasons, what the engine cannot serve: schemes other than sequential, several modules where it
    runs one, conventions or dimensions that it does not compute.

    Examples:

        nextn export runs/demo --to vllm

        nextn export runs/demo --to gguf --dtype q8_0 --out demo.gguf --draft-length 3
    """
    suffix = ".gguf" if to == "gguf" else f"-{to}"
    place = path if path.name else path.resolve()  # "." has no name
    target = out or place.with_name(place.name + suffix)
    with status(messages()) as say:
        say(f"exporting {path}")
        exported = export_model(
            path,
            to,
            target,
            dtype=dtype,
            draft_length=draft_length,
            max_shard_bytes=round(max_shard_gb * 1e9),
            provenance=collect(seed=0),
        )
    messages().print(f"wrote {exported.path}; serve it with {exported.engine}:")
    print(exported.launch_line)
