"""Models of transformers' families in folders: the trunk as transformers writes it, MTP modules as their family did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nextn.config import MTPConfig
from nextn.errors import CheckpointError
from nextn.files import TensorFiles, add_weights
from nextn.interop.families import Family, text_config
from nextn.mtp.layout import COPIES, check_plausible, separate_experts, shapes, some, stacked_experts, unlike
from nextn.mtp.store import CONFIG_FILE, Layout, ModelFolder, zero_norms

if TYPE_CHECKING:
    from nextn.interop.adapter import TransformersTrunk
    from nextn.mtp.model import MTPModel

_BLOCK = "block.layers."


class TransformersLayout(Layout):
    """One transformers model's, as `save_pretrained` writes it.

    Args:
        family: whose layout MTP modules have; None: a family that never had any, and they lie in nextn's.
    """

    def __init__(self, family: Family | None = None) -> None:
        self.family = family
        self.files: TensorFiles | None = None
        """Of the folder that the trunk was read from: it may hold what the language model is only a part of."""

    def has_place_for(self, mtp_config: MTPConfig) -> bool:
        """Only modules that compute what this family's do: nothing is written back under another meaning."""
        if self.family is None or self.family.refusal or not mtp_config.num_depths:
            return False
        num_modules = 1 if mtp_config.share_weights else mtp_config.num_depths
        if num_modules > 1 and not any("{" in stored for stored, _ in self.family.layout):
            return False
        return _conventions(self.family.mtp_config(1)) == _conventions(mtp_config)

    def config_table(self, model: MTPModel, with_modules: bool) -> dict[str, Any]:
        """The folder's own config.json, or the model's, with the number of modules and the dtype as they are now."""
        trunk: TransformersTrunk = model.trunk  # type: ignore[assignment]
        table = dict(model.origin.table) or trunk.model.config.to_dict()  # type: ignore[operator, union-attr]
        text = dict(text_config(table))
        dtype = str(trunk.output_head.weight.dtype).removeprefix("torch.")
        for part in (table, text):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = dtype
        count_key = None if self.family is None else self.family.count_key
        if count_key is not None:
            text[count_key] = len(model.scheme.layers) if with_modules and model.scheme else 0  # type: ignore[arg-type]
        return table | {"text_config": text} if text_config(table) is not table else text

    def write_weights(self, model: MTPModel, folder: Path, max_shard_bytes: int, with_modules: bool) -> None:
        """`save_pretrained`, then a further shard: modules, and what the folder held beside the language model."""
        trunk: TransformersTrunk = model.trunk  # type: ignore[assignment]
        try:
            with quiet():
                trunk.model.save_pretrained(  # type: ignore[operator]
                    folder, max_shard_size=max_shard_bytes, state_dict=_without_factors(trunk.model.state_dict())
                )
        except (ValueError, KeyError, RuntimeError, TypeError, NotImplementedError) as error:
            raise CheckpointError(f"{folder}: transformers cannot save {trunk.name}: {error}") from None
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes for its owner alone; servers run as others
        added = self._unread(trunk, folder)
        if with_modules:
            added |= self._module_tensors(model)
        if added:
            add_weights(folder, added)

    def read_state(self, folder: ModelFolder, model: MTPModel) -> dict[str, Tensor]:
        """The trunk through transformers, and the modules from the family's layout."""
        from nextn.interop.load import transformers_model

        trunk: TransformersTrunk = model.trunk  # type: ignore[assignment]
        stored = transformers_model(folder, self.family, trunk.output_head.weight.dtype).state_dict()
        names = {name.replace(".base_layer.", "."): name for name in trunk.model.state_dict()}
        state = {f"trunk.model.{names.get(name, name)}": tensor for name, tensor in stored.items()}
        if model.scheme is not None and not folder.has_own_modules:
            state |= self.module_state(folder, model)
        return state

    def module_state(self, folder: ModelFolder, model: MTPModel) -> dict[str, Tensor]:
        """The scheme's state from the family's layout. Raises CheckpointError naming tensors as they are stored."""
        assert self.family is not None, "modules in a released layout have a family"
        assert model.scheme is not None, "there are modules to fill"
        names, num_layers, files = self.family.layout, model.trunk.num_layers, folder.files
        stored: dict[int, dict[str, str]] = {}
        for name in files.names:
            if (located := names.locate(name, num_layers)) is not None:
                stored.setdefault(located[0], {})[located[1]] = name
        state: dict[str, Tensor] = {}
        for number, module in enumerate(model.scheme.layers):  # type: ignore[arg-type]
            wanted = _inside_names(module)
            tensors = {inside: files.read(name) for inside, name in stored.get(number, {}).items()}
            for inside in COPIES.keys() & tensors.keys():
                _check_copy(inside, tensors.pop(inside), model.trunk, stored[number][inside], folder.path)
            is_separate = any(".experts.0." in inside for inside in tensors)
            held = {inside: module.state_dict()[name] for inside, name in wanted.items()}
            means = shapes(separate_experts(held) if is_separate else held)
            missing, unexpected, misshapen = unlike(means, shapes(tensors))
            if missing:
                named = [names.stored_name(number, inside, num_layers) for inside in missing]
                raise CheckpointError(
                    f"{folder.path}: tensors of MTP module {number} are missing: {some(named)}. "
                    f"`nextn doctor {folder.path}` looks closer"
                )
            if unexpected:
                raise CheckpointError(
                    f"{folder.path}: tensors of MTP module {number} are unexpected: {some(unexpected)}"
                )
            if misshapen:
                inside = misshapen[0]
                raise CheckpointError(
                    f"{folder.path}: {stored[number][inside]} has shape {tuple(tensors[inside].shape)}, {CONFIG_FILE} "
                    f"means {means[inside]}"
                )
            for inside, tensor in tensors.items():
                check_plausible(stored[number][inside], tensor, str(folder.path), zero_norms(model))
            for inside, tensor in stacked_experts(tensors).items():
                state[f"scheme.layers.{number}.{wanted[inside]}"] = tensor
        return state

    def _module_tensors(self, model: MTPModel) -> dict[str, Tensor]:
        assert self.family is not None, "modules in a released layout have a family"
        assert model.scheme is not None, "there are modules to write"
        tensors: dict[str, Tensor] = {}
        for number, module in enumerate(model.scheme.layers):  # type: ignore[arg-type]
            state = module.state_dict()
            inside = {stored: state[name] for stored, name in _inside_names(module).items()}
            for name, tensor in separate_experts(inside).items():
                tensors[self.family.layout.stored_name(number, name, model.trunk.num_layers)] = tensor
        return tensors

    def _unread(self, trunk: TransformersTrunk, folder: Path) -> dict[str, Tensor]:
        """Tensors of the folder read from that belong to other parts than the language model: a vision tower, say."""
        if self.files is None:
            return {}
        written = TensorFiles.open(folder).names
        known = {_part(name) for name in (*written, *trunk.model.state_dict())}
        family, num_layers = self.family, trunk.num_layers
        return {
            name: self.files.read(name)
            for name in self.files.names
            if _part(name) not in known and not (family and family.layout.locate(name, num_layers))
        }


def _without_factors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a trunk as it was before LoRA factors were put in."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}


def _part(name: str) -> str:
    """The part of a multimodal model that a tensor belongs to: `model.visual`, `model.language_model`, `lm_head`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "model" else parts[0]


def _conventions(config: MTPConfig) -> tuple[Any, ...]:
    """What a module computes; with a single one `carry` counts too, since engines run it again."""
    return config.scheme, config.concat, config.trunk_hidden, config.carry, config.head_norm, config.dense_blocks


def _inside_names(module: nn.Module) -> dict[str, str]:
    """From names inside a module as layouts have them to those of its state dict, which count the block's layers."""
    block = f"{_BLOCK}0." if len(module.block.layers) == 1 else _BLOCK  # type: ignore[union-attr, arg-type]
    return {name.replace(block, "block.", 1): name for name in module.state_dict()}


def _check_copy(inside: str, copy: Tensor, trunk: Any, name: str, folder: Path) -> None:
    """Raise CheckpointError unless a module's embedding or head is the trunk's."""
    embedding = trunk.model.get_input_embeddings().weight
    original = embedding if COPIES[inside] == "embedding" else trunk.output_head.weight
    if copy.shape != original.shape or not torch.equal(copy.to(original.dtype), original.detach()):
        raise CheckpointError(
            f"{folder}: {name} differs from the trunk's {COPIES[inside]}; nextn's modules share the trunk's, so what "
            "this copy learnt would be lost"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Neither reports below errors nor progress bars of transformers inside the block; afterwards they are as before.

    Its reports are about tensors that it leaves out, and those are answered here.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
