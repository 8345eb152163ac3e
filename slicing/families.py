"""Where each model family keeps the parts that slicing reads or writes: a table, keyed by `config.model_type`.

The decoder block of every family here is pre-norm: x + A(norm(x)), then h + M(norm(h)) on the result (sequential), or
x + A(norm(x)) + M(norm(x)) at once (parallel). A row names the modules; no forward is written for a family. Names are
dotted paths: of `layers` and `tables` below the causal LM, of everything in a `Block` below the decoder layer.

Imports nothing, since a saved sliced model carries a copy of this file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class InputError(ValueError):
    """Something the user gave can't be used; the message says what was got, the limit and what to do."""


@dataclass(frozen=True)
class Block:
    """One layout of a decoder layer."""

    attention: str  # the attention module
    attention_norm: str
    attention_in: tuple[str, ...]  # matrices that read the normalised stream
    attention_out: str  # the matrix that writes to the stream
    mlp: tuple[str, ...]  # modules run one after another
    mlp_norm: str  # the attention's own where a parallel block has one norm for both
    mlp_in: tuple[str, ...]
    mlp_out: tuple[str, ...]  # several in a mixture of experts
    parallel: bool | str = False  # or the layer's attribute that says so
    experts: bool = False  # the MLP's modules return the width that they read
    scale: str | None = None  # the layer's attribute that multiplies what a branch adds to the stream
    dropout: tuple[str | None, str | None] = (None, None)  # after attention, after MLP: a module or probability, dotted

    def paths(self) -> tuple[str, ...]:
        """Every module or parameter named here."""
        norms = (self.attention_norm, self.mlp_norm)
        return (
            self.attention,
            *norms,
            *self.attention_in,
            self.attention_out,
            *self.mlp,
            *self.mlp_in,
            *self.mlp_out,
        )


@dataclass(frozen=True)
class Family:
    """One row: a model family whose decoder layers can be sliced."""

    layers: str  # the list of decoder layers
    tables: tuple[str, ...]  # embeddings that are added up to the stream, the token table first
    blocks: tuple[Block, ...]  # a layer has the first layout whose every name it has
    layer_norm: bool = False  # LayerNorm (centres), else RMSNorm
    norm_eps: str | float = "variance_epsilon"  # the norm's attribute, or the constant where it has none
    norm_offset: float = 0.0  # added to the norm's weight when it is applied
    whole_tables: bool = False  # the body shapes its output like its embeddings, which so keep their width
    refuse: Callable[[Any], str | None] = lambda config: None  # why a config of this family can't be sliced


def _mlp_block(**names: Any) -> Block:
    """The layout and names that Llama gave to most of its successors."""
    llama: dict[str, Any] = {
        "attention": "self_attn",
        "attention_norm": "input_layernorm",
        "attention_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_out": "self_attn.o_proj",
        "mlp": ("mlp",),
        "mlp_norm": "post_attention_layernorm",
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_out": ("mlp.down_proj",),
    }
    return Block(**(llama | names))


def _decoder(*blocks: Block, **fields: Any) -> Family:
    """A family whose body keeps its parts where Llama's does."""
    return Family(layers="model.layers", tables=("model.embed_tokens",), blocks=blocks or (_mlp_block(),), **fields)


def _refuse_opt(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "it normalises after the residual addition (do_layer_norm_before is false, as in OPT-350m)"
    if config.word_embed_proj_dim != config.hidden_size:
        return f"it projects embeddings of {config.word_embed_proj_dim} to {config.hidden_size} (as OPT-350m)"
    if getattr(config, "_remove_final_layer_norm", False):
        return "it has no final norm (_remove_final_layer_norm)"
    return None


def _refuse_gpt2(config: Any) -> str | None:
    return "it has cross-attention (add_cross_attention)" if config.add_cross_attention else None


_EXPERTS_IN = ("mlp.gate", "mlp.experts.gate_up_proj")
_SHARED = "mlp.shared_expert"
_GPT_MLP = {"mlp_in": ("mlp.c_fc",), "mlp_out": ("mlp.c_proj",)}
_FALCON: dict[str, Any] = {
    "attention": "self_attention",
    "attention_in": ("self_attention.query_key_value",),
    "attention_out": "self_attention.dense",
    "mlp_in": ("mlp.dense_h_to_4h",),
    "mlp_out": ("mlp.dense_4h_to_h",),
}
_FALCON_PARALLEL: dict[str, Any] = {"parallel": True, "dropout": ("hidden_dropout", "hidden_dropout")}
_EXPERTS = _mlp_block(mlp_in=_EXPERTS_IN, mlp_out=("mlp.experts.down_proj",), experts=True)

FAMILIES: dict[str, Family] = {
    # sequential, RMSNorm
    "llama": _decoder(),
    "mistral": _decoder(),
    "qwen2": _decoder(),
    "qwen3": _decoder(),
    "smollm3": _decoder(),
    "phi3": _decoder(
        _mlp_block(
            attention_in=("self_attn.qkv_proj",),
            mlp_in=("mlp.gate_up_proj",),
            dropout=("resid_attn_dropout", "resid_mlp_dropout"),
        )
    ),
    "gemma": _decoder(norm_eps="eps", norm_offset=1.0),
    "granite": _decoder(_mlp_block(scale="residual_multiplier")),
    # sequential, LayerNorm
    "opt": Family(
        layers="model.decoder.layers",
        tables=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        blocks=(
            _mlp_block(
                attention_norm="self_attn_layer_norm",
                attention_out="self_attn.out_proj",
                mlp=("fc1", "activation_fn", "fc2"),
                mlp_norm="final_layer_norm",
                mlp_in=("fc1",),
                mlp_out=("fc2",),
                dropout=("dropout", "dropout"),
            ),
        ),
        layer_norm=True,
        norm_eps="eps",
        refuse=_refuse_opt,
    ),
    "gpt2": Family(
        layers="transformer.h",
        tables=("transformer.wte", "transformer.wpe"),
        blocks=(
            _mlp_block(
                attention="attn",
                attention_norm="ln_1",
                attention_in=("attn.c_attn",),
                attention_out="attn.c_proj",
                mlp_norm="ln_2",
                **_GPT_MLP,
            ),
        ),
        layer_norm=True,
        norm_eps="eps",
        whole_tables=True,
        refuse=_refuse_gpt2,
    ),
    "starcoder2": _decoder(_mlp_block(**_GPT_MLP), layer_norm=True, norm_eps="eps"),
    "stablelm": _decoder(
        _mlp_block(dropout=(None, "dropout")),
        _mlp_block(mlp_norm="input_layernorm", parallel=True, dropout=(None, "dropout")),
        layer_norm=True,
        norm_eps="eps",
    ),
    "olmo": _decoder(layer_norm=True, norm_eps=1e-5),
    # parallel
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        tables=("gpt_neox.embed_in",),
        blocks=(
            _mlp_block(
                attention="attention",
                attention_in=("attention.query_key_value",),
                attention_out="attention.dense",
                mlp_in=("mlp.dense_h_to_4h",),
                mlp_out=("mlp.dense_4h_to_h",),
                parallel="use_parallel_residual",
                dropout=("post_attention_dropout", "post_mlp_dropout"),
            ),
        ),
        layer_norm=True,
        norm_eps="eps",
    ),
    "phi": _decoder(
        _mlp_block(
            attention_out="self_attn.dense",
            mlp_norm="input_layernorm",
            mlp_in=("mlp.fc1",),
            mlp_out=("mlp.fc2",),
            parallel=True,
            dropout=("resid_dropout", "resid_dropout"),
        ),
        layer_norm=True,
        norm_eps="eps",
    ),
    "falcon": Family(
        layers="transformer.h",
        tables=("transformer.word_embeddings",),
        blocks=(
            _mlp_block(**_FALCON, dropout=("config.attention_dropout", "hidden_dropout")),
            _mlp_block(**_FALCON, **_FALCON_PARALLEL, mlp_norm="input_layernorm"),
            _mlp_block(**_FALCON, **_FALCON_PARALLEL, attention_norm="ln_attn", mlp_norm="ln_mlp"),
        ),
        layer_norm=True,
        norm_eps="eps",
    ),
    "gptj": Family(
        layers="transformer.h",
        tables=("transformer.wte",),
        blocks=(
            _mlp_block(
                attention="attn",
                attention_norm="ln_1",
                attention_in=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
                attention_out="attn.out_proj",
                mlp_norm="ln_1",
                mlp_in=("mlp.fc_in",),
                mlp_out=("mlp.fc_out",),
                parallel=True,
            ),
        ),
        layer_norm=True,
        norm_eps="eps",
        whole_tables=True,
    ),
    "cohere": _decoder(_mlp_block(mlp_norm="input_layernorm", parallel=True), layer_norm=True),
    # mixture of experts; a layer without experts has Llama's layout
    "mixtral": _decoder(_EXPERTS),
    "qwen2_moe": _decoder(
        _mlp_block(
            mlp_in=(*_EXPERTS_IN, f"{_SHARED}.gate_proj", f"{_SHARED}.up_proj", "mlp.shared_expert_gate"),
            mlp_out=("mlp.experts.down_proj", f"{_SHARED}.down_proj"),
            experts=True,
        ),
        _mlp_block(),
    ),
    "qwen3_moe": _decoder(_EXPERTS, _mlp_block()),
}

_POST_NORM = "it normalises a block's output before adding it, so no rotation passes through"
REFUSED: dict[str, str] = dict.fromkeys(
    ("gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4"), _POST_NORM
)


def find_family(config: Any) -> Family:
    """The row of `config.model_type`; InputError, which says why, where the model can't be sliced."""
    model_type = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"can't slice {model_type!r}: it is an encoder-decoder, only decoders can be sliced")
    if model_type == "sliced":
        raise InputError("can't slice 'sliced': it is sliced already, and can only be evaluated (--mean 0)")
    if model_type in REFUSED:
        raise InputError(f"can't slice {model_type!r}: {REFUSED[model_type]}; choose one of {', '.join(FAMILIES)}")
    if model_type not in FAMILIES:
        raise InputError(
            f"unknown model family {model_type!r}: choose one of {', '.join(FAMILIES)}, or add a row to families.py"
        )
    family = FAMILIES[model_type]
    if reason := family.refuse(config):
        raise InputError(f"can't slice this {model_type!r} model: {reason}")
    return family
