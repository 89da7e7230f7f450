#!/usr/bin/env bash
# transformers 5.23.0: a folder whose index names `model.safetensors` and a second file, as sidecars with MTP tensors do.
# Expected: the index governs, both files are read (as its sharded folders are).
# Seen: `model.safetensors` is taken for the whole model, the index is not opened, and every tensor of the second file
# is initialised at random, with a warning but no error. Under any other name for the first file both are read.
# This script fails once that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=2))
whole = Path(sys.argv[1]) / "whole"
model.save_pretrained(whole)
tensors = load_file(whole / "model.safetensors")


def missing(first_name: str) -> int:
    """Tensors that transformers does not find, with the last layer in a second file that the index names."""
    folder = Path(sys.argv[1]) / first_name
    folder.mkdir()
    parts = {first_name: {}, "model_extra.safetensors": {}}
    for name, tensor in tensors.items():
        parts["model_extra.safetensors" if ".layers.1." in name else first_name][name] = tensor
    for file, part in parts.items():
        save_file(part, folder / file, {"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text((whole / "config.json").read_text())
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return len(info["missing_keys"])


seen = {name: missing(name) for name in ("model.safetensors", "model_first.safetensors")}
print("transformers", transformers.__version__, "tensors missing, by the first file's name:", seen)
assert seen == {"model.safetensors": 9, "model_first.safetensors": 0}, "transformers has changed: rewrite this finding"
PY
