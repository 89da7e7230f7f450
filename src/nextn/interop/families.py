"""Model families that come with MTP modules: how their files name them, and what the modules compute.

Nothing in a checkpoint says in which order the two inputs are joined or which hidden state is meant; a wrong guess
loads, runs and drafts badly. So every entry is read off code that computes the family, named in `source`. A value that
no code establishes is None; where implementations differ, `disputed` says who does what, and the entry follows the
first named.

Paths in sources: "transformers" is version 5.23, "vLLM" 0.32 (vllm/model_executor/models), "llama.cpp" build 11434
(src/models, conversion), "SGLang" and "FastDeploy" the main branches of their repositories.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nextn.config import MTPConfig
from nextn.errors import ConfigError
from nextn.mtp.layout import ModuleNames, appended

Norm = Literal["post_norm", "pre_norm"]


@dataclass(frozen=True)
class Family:
    """One family's layout and conventions.

    Attributes:
        name: for people.
        model_types: `model_type` in config.json; the text model's and the multimodal one's where both exist.
        count_key: config.json's key for the number of modules; None: not declared, the stored tensors say it.
        layout: how files name the modules' tensors.
        concat: order of the projection's two inputs.
        trunk_hidden: h[0], the trunk's state after or before its final norm.
        carry: what the next depth reads; None: one module, and nobody runs it again.
        head_norm: the module's own norm before the output head, or the trunk's final norm.
        dense_blocks: the block's feed-forward is dense though the trunk has experts.
        source: the code this was read from.
        disputed: where implementations differ, and what this entry follows.
        block_settings: fields of the trunk's config that make transformers' layer class build the block; a list is
            for the block's layers, of which `layer_types` says how many.
        trunk_model_type: the transformers family that computes the trunk, if not the model's own.
        refusal: why nextn does not load the modules; empty: it does.
    """

    name: str
    model_types: tuple[str, ...]
    count_key: str | None
    layout: ModuleNames
    concat: Literal["embed_first", "hidden_first"]
    trunk_hidden: Norm | None
    carry: Norm | None
    head_norm: Literal["own", "shared"] | None
    source: str
    dense_blocks: bool = False
    disputed: str = ""
    block_settings: Mapping[str, Any] = field(default_factory=dict)
    trunk_model_type: str | None = None
    refusal: str = ""

    def mtp_config(self, num_depths: int) -> MTPConfig:
        """The sequential scheme with this family's conventions. Raises ValueError where one is not established."""
        if num_depths == 0:
            return MTPConfig(num_depths=0)
        if self.trunk_hidden is None or self.head_norm is None:
            raise ValueError(f"{self.name}: not every convention is established ({self.disputed})")
        return MTPConfig(
            num_depths=num_depths,
            concat=self.concat,
            trunk_hidden=self.trunk_hidden,
            carry=self.carry or "post_norm",
            head_norm=self.head_norm,
            dense_blocks=self.dense_blocks,
        )

    def num_declared(self, table: Mapping[str, Any]) -> int | None:
        """Modules that config.json declares; None where the family does not declare them.

        Raises ConfigError for anything but a number of modules.
        """
        if self.count_key is None:
            return None
        match text_config(table).get(self.count_key):
            case None:
                return 0
            case int(number) if number >= 0 and not isinstance(number, bool):
                return number
            case other:
                raise ConfigError(f"{self.count_key} is {other!r} in config.json, wanted a number of MTP modules")

    def num_stored(self, names: Iterable[str], num_layers: int) -> int:
        """Modules of which at least one tensor is stored (the highest number + 1)."""
        located = [found for name in names if (found := self.layout.locate(name, num_layers)) is not None]
        return max((module + 1 for module, _ in located), default=0)


def family_of(table: Mapping[str, Any]) -> Family | None:
    """The family of a config.json, by `model_type`; None if the table lacks it."""
    kinds = (table.get("model_type"), text_config(table).get("model_type"))
    return next((family for family in FAMILIES if any(kind in family.model_types for kind in kinds)), None)


def text_config(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json: all of it, or what a multimodal one keeps under `text_config`."""
    inner = table.get("text_config")
    return inner if isinstance(inner, Mapping) else table


def count_keys() -> tuple[str, ...]:
    """Every key under which a family declares its modules."""
    return tuple(sorted({family.count_key for family in FAMILIES if family.count_key}))


_QWEN = ModuleNames(
    (
        ("mtp.fc.", "eh_proj."),
        ("mtp.pre_fc_norm_embedding.", "enorm."),
        ("mtp.pre_fc_norm_hidden.", "hnorm."),
        ("mtp.norm.", "shared_head.norm."),
        ("mtp.layers.{module}.", "block."),
    )
)

FAMILIES = (
    Family(
        name="DeepSeek-V3",
        model_types=("deepseek_v3",),
        count_key="num_nextn_predict_layers",
        layout=appended(),
        concat="embed_first",
        trunk_hidden="post_norm",
        carry="post_norm",
        head_norm="own",
        block_settings={"first_k_dense_replace": 0},
        source="transformers modeling_layers.py MtpLayer, MtpModel.get_weight_conversions; vLLM deepseek_mtp.py "
        "DeepSeekMultiTokenPredictorLayer (zeroes Emb at position 0), deepseek_v2.py; llama.cpp deepseek2.cpp "
        "graph_mtp",
    ),
    Family(
        name="GLM-4.5 / 4.6 (mixture of experts)",
        model_types=("glm4_moe",),
        count_key="num_nextn_predict_layers",
        layout=appended(),
        concat="embed_first",
        trunk_hidden="post_norm",
        carry="post_norm",
        head_norm="own",
        block_settings={"first_k_dense_replace": 0},
        source="transformers modeling_layers.py MtpLayer; vLLM glm4_moe_mtp.py Glm4MoeMultiTokenPredictorLayer (zeroes "
        "Emb at position 0); llama.cpp glm4-moe.cpp graph_mtp",
        disputed="carry: transformers and llama.cpp post_norm, vLLM pre_norm",
    ),
    Family(
        name="GLM-4.7-Flash",
        model_types=("glm4_moe_lite",),
        count_key="num_nextn_predict_layers",
        layout=appended(),
        concat="embed_first",
        trunk_hidden="post_norm",
        carry="post_norm",
        head_norm="own",
        block_settings={"mlp_layer_types": ["sparse"]},
        source="llama.cpp deepseek2.cpp graph_mtp (this family's trunk and modules); vLLM glm4_moe_lite_mtp.py "
        "Glm4MoeLiteMultiTokenPredictorLayer (zeroes Emb at position 0), glm4_moe_lite.py",
        disputed="carry: llama.cpp post_norm, vLLM pre_norm",
    ),
    Family(
        name="MiMo-7B",
        model_types=("mimo",),
        count_key="num_nextn_predict_layers",
        layout=ModuleNames(
            (
                ("model.mtp_layers.{module}.token_layernorm.", "enorm."),
                ("model.mtp_layers.{module}.hidden_layernorm.", "hnorm."),
                ("model.mtp_layers.{module}.input_proj.", "eh_proj."),
                ("model.mtp_layers.{module}.final_layernorm.", "shared_head.norm."),
                ("model.mtp_layers.{module}.", "block."),
            )
        ),
        concat="hidden_first",
        trunk_hidden="pre_norm",
        carry="post_norm",
        head_norm="own",
        trunk_model_type="qwen2",
        source="vLLM mimo_mtp.py MiMoMultiTokenPredictorLayer (zeroes Emb at position 0), mimo.py MiMoModel: Qwen2's "
        "trunk, whose state leaves before the final norm",
    ),
    Family(
        name="MiMo-V2-Flash",
        model_types=("mimo_v2_flash",),
        count_key=None,
        layout=ModuleNames(
            (
                ("model.mtp.layers.{module}.enorm.", "enorm."),
                ("model.mtp.layers.{module}.hnorm.", "hnorm."),
                ("model.mtp.layers.{module}.eh_proj.", "eh_proj."),
                ("model.mtp.layers.{module}.final_layernorm.", "shared_head.norm."),
                ("model.mtp.layers.{module}.pre_mlp_layernorm.", "block.post_attention_layernorm."),
                ("model.mtp.layers.{module}.self_attn.attention_sink_bias", "block.self_attn.sinks"),
                ("model.mtp.layers.{module}.", "block."),
            )
        ),
        concat="embed_first",
        trunk_hidden="pre_norm",
        carry="pre_norm",
        head_norm="own",
        dense_blocks=True,
        block_settings={"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]},
        source="llama.cpp mimo2.cpp graph_mtp, conversion/mimo.py (three modules, declared nowhere); SGLang "
        "mimo_v2_nextn.py MiMoV2ModelNextN; vLLM mimo_v2_mtp.py MiMoV2MTPLayer, mimo_v2.py",
        disputed="trunk_hidden and carry: llama.cpp pre_norm (SGLang can pass either), vLLM post_norm",
    ),
    Family(
        name="Qwen3-Next",
        model_types=("qwen3_next",),
        count_key=None,
        layout=_QWEN,
        concat="embed_first",
        trunk_hidden="post_norm",
        carry="post_norm",
        head_norm="own",
        block_settings={"layer_types": ["full_attention"], "mlp_only_layers": [], "decoder_sparse_step": 1},
        source="vLLM qwen3_next_mtp.py Qwen3NextMultiTokenPredictor, qwen3_next.py; llama.cpp qwen3next.cpp graph_mtp, "
        "conversion/qwen.py _QwenMtpMixin (one module, declared nowhere)",
    ),
    Family(
        name="Qwen3.5",
        model_types=("qwen3_5_text", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe"),
        count_key="mtp_num_hidden_layers",
        layout=_QWEN,
        concat="embed_first",
        trunk_hidden="post_norm",
        carry="post_norm",
        head_norm="own",
        block_settings={"layer_types": ["full_attention"]},
        source="vLLM qwen3_5_mtp.py Qwen3_5MultiTokenPredictor; llama.cpp qwen35.cpp and qwen35moe.cpp graph_mtp, "
        "conversion/qwen.py _QwenMtpMixin",
    ),
    Family(
        name="Ernie 4.5 (mixture of experts)",
        model_types=("ernie4_5_moe",),
        count_key="num_nextn_predict_layers",
        layout=ModuleNames(
            (
                ("model.mtp_emb_norm.{module}.", "enorm."),
                ("model.mtp_hidden_norm.{module}.", "hnorm."),
                ("model.mtp_linear_proj.{module}.", "eh_proj."),
                ("model.mtp_block.{module}.", "block."),
            )
        ),
        concat="embed_first",
        trunk_hidden="post_norm",
        carry="post_norm",
        head_norm="shared",
        dense_blocks=True,
        block_settings={"moe_layer_start_index": 1},
        source="FastDeploy ernie4_5_mtp.py Ernie4_5_MTPModel (its makers' server: the trunk's own norm before the "
        "head); vLLM ernie_mtp.py ErnieMultiTokenPredictorLayer (zeroes Emb at position 0; dense block), "
        "ernie45_moe.py",
        disputed="head_norm: FastDeploy and the makers' trainer (ERNIE modeling_moe.py) share the trunk's final norm, "
        "vLLM and SGLang apply none; trunk_hidden and carry: FastDeploy and vLLM post_norm, that trainer pre_norm",
    ),
    Family(
        name="Nemotron-H",
        model_types=("nemotron_h",),
        count_key="num_nextn_predict_layers",
        layout=ModuleNames(
            (
                ("mtp.layers.0.enorm.", "enorm."),
                ("mtp.layers.0.hnorm.", "hnorm."),
                ("mtp.layers.0.eh_proj.", "eh_proj."),
                ("mtp.layers.1.final_layernorm.", "shared_head.norm."),
                ("mtp.layers.0.", "block.0."),
                ("mtp.layers.1.", "block.1."),
            )
        ),
        concat="embed_first",
        trunk_hidden="post_norm",
        carry="post_norm",
        head_norm="own",
        source="vLLM nemotron_h_mtp.py NemotronHMTPAttentionDecoderLayer and NemotronHMTPMoEDecoderLayer, "
        "nemotron_h.py; llama.cpp nemotron-h.cpp, nemotron-h-moe.cpp graph_mtp, conversion/nemotron.py. One module, "
        "which is an attention layer and then an expert layer (pattern *E)",
        disputed="the norm before the head: vLLM and SGLang (nemotron_h_mtp.py) an RMSNorm, llama.cpp a LayerNorm",
        block_settings={"layer_types": ["full_attention", "moe"]},
    ),
    Family(
        name="LongCat-Flash",
        model_types=("longcat_flash",),
        count_key="num_nextn_predict_layers",
        layout=ModuleNames(
            (
                ("model.mtp.layers.{module}.enorm.m.", "enorm."),
                ("model.mtp.layers.{module}.hnorm.m.", "hnorm."),
                ("model.mtp.layers.{module}.eh_proj.", "eh_proj."),
                ("model.mtp.layers.{module}.transformer_layer.mlp.", "block.mlp."),
                ("model.mtp.layers.{module}.", "block."),
                ("model.mtp.norm.", "shared_head.norm."),
                ("model.mtp.embed_tokens.", "embed_tokens."),
            )
        ),
        concat="embed_first",
        trunk_hidden="post_norm",
        carry="post_norm",
        head_norm="own",
        dense_blocks=True,
        source="vLLM longcat_flash_mtp.py LongCatMultiTokenPredictorLayer and load_weights, longcat_flash.py",
        refusal="its block is a plain layer (one latent attention, one dense feed-forward), and transformers has only "
        "the trunk's double layer",
    ),
    Family(
        name="Step-3.5 / 3.7",
        model_types=("step3p5", "step3p7"),
        count_key="num_nextn_predict_layers",
        layout=appended("transformer.shared_head.norm.", "transformer.shared_head.output."),
        concat="embed_first",
        trunk_hidden="pre_norm",
        carry="pre_norm",
        head_norm="own",
        source="vLLM step3p5_mtp.py Step3p5AMultiTokenPredictorLayer and load_weights, step3p5.py; llama.cpp "
        "step35.cpp graph_mtp; transformers step3p7/configuration_step3p7.py",
        refusal="every module has an output head of its own, and nextn's modules share the trunk's",
    ),
)
"""Every family whose MTP modules nextn knows."""
