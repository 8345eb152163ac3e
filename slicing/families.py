"""Where each model family keeps the parts that slicing reads or writes: a table, keyed by `config.model_type`.

The decoder block of every family here is x + A(norm(x)), then h + M(norm(h)) on the result (sequential), or
x + A(norm(x)) + M(norm(x)) at once (parallel); in some, norms stand behind A and M too, or only there. A row names the
modules (layouts.py says how); no forward is written for a family, and before a model is sliced its layers are checked
against their row (check.py).

Imports nothing but layouts.py, since a saved sliced model carries copies of both.
"""

from typing import Any

from .layouts import (
    ATTENTION,
    MLA,
    MLA_PLAIN_QUERY,
    MLP,
    Block,
    Family,
    Names,
    decoder,
    experts,
    layer,
    one_branch,
    reads,
)

__all__ = ["FAMILIES", "REFUSED", "Block", "Family", "InputError", "find_family"]


class InputError(ValueError):
    """Something the user gave can't be used; the message says what was got, the limit and what to do."""


def _refuse_opt(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "it normalises after the residual addition (do_layer_norm_before is false, as in OPT-350m)"
    if config.word_embed_proj_dim != config.hidden_size:
        return f"it projects embeddings of {config.word_embed_proj_dim} to {config.hidden_size} (as OPT-350m)"
    if getattr(config, "_remove_final_layer_norm", False):
        return "it has no final norm (_remove_final_layer_norm)"
    return None


def _refuse_cross_attention(config: Any) -> str | None:
    return "it has cross-attention (add_cross_attention)" if config.add_cross_attention else None


def _refuse_bloom(config: Any) -> str | None:
    if config.apply_residual_connection_post_layernorm:
        return "its residual is the normalised stream (apply_residual_connection_post_layernorm)"
    return None


def _refuse_cohere2_moe(config: Any) -> str | None:
    return "it has RMSNorm (rms_norm_eps), the row is of the LayerNorm" if config.rms_norm_eps is not None else None


_ONE_NORM: Names = {"mlp_norm": "input_layernorm", "parallel": True}
_UP_ONLY: Names = {"mlp_in": ("mlp.up_proj",)}
_GATE_UP: Names = {"mlp_in": ("mlp.gate_up_proj",)}
_GPT_NORMS: Names = {"attention": "attn", "attention_norm": "ln_1", "mlp_norm": "ln_2"}
_GPT_MLP: Names = {"mlp_in": ("mlp.c_fc",), "mlp_out": ("mlp.c_proj",)}
_FC_MLP: Names = {"mlp_in": ("mlp.fc1",), "mlp_out": ("mlp.fc2",)}
_FOUR_H_MLP: Names = {"mlp_in": ("mlp.dense_h_to_4h",), "mlp_out": ("mlp.dense_4h_to_h",)}
_LAYER_NORM: Names = {"layer_norm": True, "norm_eps": "eps"}
_GEMMA_NORM: Names = {"norm_eps": "eps", "norm_offset": 1.0}
_PHI3: Names = _GATE_UP | {
    "attention_in": ("self_attn.qkv_proj",),
    "dropout": ("resid_attn_dropout", "resid_mlp_dropout"),
}
_TWO_OUTPUT_NORMS: Names = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_RAW_READERS: Names = _TWO_OUTPUT_NORMS | {"attention_norm": "", "mlp_norm": ""}
_FOUR_NORMS: Names = _TWO_OUTPUT_NORMS | {"mlp_norm": "pre_feedforward_layernorm"}
_FOUR_NORMS_GLM: Names = {
    "attention_output_norm": "post_self_attn_layernorm",
    "mlp_output_norm": "post_mlp_layernorm",
}
_AFMOE: Names = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_mlp_layernorm",
    "mlp_output_norm": "post_mlp_layernorm",
}
_APERTUS: Names = _UP_ONLY | {"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"}
_OPT: Names = {
    "attention_norm": "self_attn_layer_norm",
    "attention_out": "self_attn.out_proj",
    "mlp": ("fc1", "activation_fn", "fc2"),
    "mlp_norm": "final_layer_norm",
    "mlp_in": ("fc1",),
    "mlp_out": ("fc2",),
    "dropout": ("dropout", "dropout"),
}
_FALCON: Names = _FOUR_H_MLP | {
    "attention": "self_attention",
    "attention_in": ("self_attention.query_key_value",),
    "attention_out": "self_attention.dense",
}
_FALCON_PARALLEL: Names = _FALCON | {"parallel": True, "dropout": ("hidden_dropout", "hidden_dropout")}
_SHARED = (experts(shared="shared_experts"), MLP)  # a layer without experts has Llama's MLP
_QWEN_SHARED = experts(shared="shared_expert", also="shared_expert_gate")
_INDEXED = reads(MLA, "self_attn.indexer.wk", "self_attn.indexer.weights_proj")
_KIMI_READERS = ("self_attn.forget_gate.f_a_proj", "self_attn.b_proj", "self_attn.g_a_proj")
_BAILING_READERS = ("self_attn.forget_gate.f_proj", "self_attn.b_proj", "self_attn.g_proj")


def _mixer(module: str, *readers: str) -> Names:
    """A mixer in attention's place."""
    names = tuple(f"{module}.{reader}" for reader in readers)
    return ATTENTION | {"attention": module, "attention_in": names, "attention_out": f"{module}.out_proj"}


_DELTA_NET = (_mixer("linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), ATTENTION)
_JAMBA_MLP: Names = {
    "mlp": ("feed_forward",),
    "mlp_in": ("feed_forward.gate_proj", "feed_forward.up_proj"),
    "mlp_out": ("feed_forward.down_proj",),
}
_LFM2 = (_mixer("conv", "in_proj"), ATTENTION | {"attention_out": "self_attn.out_proj"})
_LFM3 = (
    _mixer("conv", "in_proj"),
    reads(ATTENTION, "self_attn.g_proj"),
    ATTENTION,
)
_LFM3_NORMS: Names = {"attention_output_norm": "post_operator_norm", "mlp_output_norm": "post_ffn_norm"}
_HYPERCLOVAX: Names = {"attention_output_norm": "post_norm1", "mlp_output_norm": "post_norm2"}
_OLMO_READERS = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj")
_LFM2_NORMS: Names = {"attention_norm": "operator_norm", "mlp_norm": "ffn_norm"}
_LFM2_MLP: Names = {
    "mlp": ("feed_forward",),
    "mlp_in": ("feed_forward.w1", "feed_forward.w3"),
    "mlp_out": ("feed_forward.w2",),
}

_NO_ROUTED: Names = {
    "mlp": ("shared_mlp",),
    "mlp_in": ("shared_mlp.input_linear",),
    "mlp_out": ("shared_mlp.output_linear",),
}
_GRANITE_EXPERTS = experts("router", module="block_sparse_moe")
_GRANITE_BOTH = _GRANITE_EXPERTS | {
    "beside": ("shared_mlp",),
    "mlp_in": (*_GRANITE_EXPERTS["mlp_in"], *_NO_ROUTED["mlp_in"]),
    "mlp_out": (*_GRANITE_EXPERTS["mlp_out"], *_NO_ROUTED["mlp_out"]),
}
_GRANITE_SCALE: Names = {"scale": "residual_multiplier"}
_MAMBA = _mixer("mamba", "in_proj")
_ONE_MIXER = one_branch("norm") | {
    "attention": "mixer",
    "attention_in": ("mixer.in_proj",),
    "attention_out": "mixer.out_proj",
}
_NEMOTRON_H = (
    layer(**_ONE_MIXER),
    layer(
        **_ONE_MIXER
        | {"attention_in": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), "attention_out": "mixer.o_proj"}
    ),
    layer(**one_branch("norm", **experts(shared="shared_experts", module="mixer", gated=False))),
    layer(**one_branch("norm", mlp=("mixer",), mlp_in=("mixer.up_proj",), mlp_out=("mixer.down_proj",))),
)

_LLAMA_BROTHERS = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "bitnet", "cwm", "diffllama", "ernie4_5", "exaone", "helium"),
    *("hunyuan_v1_dense", "internlm3", "iquestcoder", "ministral", "ministral3", "seed_oss"),
)

FAMILIES: dict[str, Family] = {
    # sequential, RMSNorm
    **dict.fromkeys(_LLAMA_BROTHERS, decoder()),
    **dict.fromkeys(("phi3", "phi4_multimodal"), decoder(names=_PHI3)),
    **dict.fromkeys(("apertus", "apertus1p5_text"), decoder(names=_APERTUS)),
    **dict.fromkeys(("granite", "granite_swa"), decoder(names=_GRANITE_SCALE)),
    "arcee": decoder(names=_UP_ONLY),
    "gemma": decoder(**_GEMMA_NORM),
    "vaultgemma": decoder(names={"mlp_norm": "pre_feedforward_layernorm"}, **_GEMMA_NORM),
    "glm": decoder(names=_GATE_UP),
    "nanochat": decoder(names=_FC_MLP, norm_eps="eps", whole_tables=True),  # its body normalises the embedding
    "moshi": decoder(
        names=_FC_MLP
        | {
            "attention_in": ("self_attn.q_proj.linear", "self_attn.k_proj.linear", "self_attn.v_proj.linear"),
            "attention_out": "self_attn.o_proj.linear",
        },
        norm_eps="eps",
    ),
    # sequential, RMSNorm of what a branch writes
    **dict.fromkeys(("gemma2", "gemma3_text"), decoder(names=_FOUR_NORMS, **_GEMMA_NORM)),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), decoder(names=_RAW_READERS)),
    "glm4": decoder(names=_GATE_UP | _FOUR_NORMS_GLM),
    "kolibri1": decoder(mlps=(experts(shared="shared_experts"),), names=_FOUR_NORMS_GLM),
    "flex_olmo": decoder(mlps=(experts(),), names=_RAW_READERS),
    "afmoe": decoder(
        reads(ATTENTION, "self_attn.gate_proj"),
        mlps=(experts("router.gate", shared="shared_experts"), MLP),
        names=_AFMOE,
    ),
    "olmo_hybrid": decoder(
        blocks=(
            layer(**_RAW_READERS),
            layer(**_mixer("linear_attn", *_OLMO_READERS) | {"attention_out": "linear_attn.o_proj"}),
        )
    ),
    "hyperclovax": decoder(
        blocks=(layer(**_GRANITE_SCALE, **_HYPERCLOVAX), layer(**_GRANITE_SCALE)),
    ),
    "lfm3": decoder(
        blocks=tuple(layer(**mixer | _LFM2_MLP | _LFM2_NORMS | norms) for norms in (_LFM3_NORMS, {}) for mixer in _LFM3)
    ),
    # sequential, LayerNorm
    "opt": decoder(
        names=_OPT,
        layers="model.decoder.layers",
        tables=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        **_LAYER_NORM,
        refuse=_refuse_opt,
    ),
    "biogpt": decoder(
        names=_OPT,
        layers="biogpt.layers",
        tables=("biogpt.embed_tokens", "biogpt.embed_positions"),
        **_LAYER_NORM,
    ),
    "gpt2": decoder(
        names=_GPT_NORMS | _GPT_MLP | {"attention_in": ("attn.c_attn",), "attention_out": "attn.c_proj"},
        layers="transformer.h",
        tables=("transformer.wte", "transformer.wpe"),
        whole_tables=True,
        **_LAYER_NORM,
        refuse=_refuse_cross_attention,
    ),
    "gpt_bigcode": decoder(
        names=_GPT_NORMS | _GPT_MLP | {"attention_in": ("attn.c_attn",), "attention_out": "attn.c_proj"},
        layers="transformer.h",
        tables=("transformer.wte", "transformer.wpe"),
        whole_tables=True,
        **_LAYER_NORM,
        refuse=_refuse_cross_attention,
    ),
    "gpt_neo": decoder(
        names=_GPT_NORMS
        | _GPT_MLP
        | {
            "attention_in": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            "attention_out": "attn.attention.out_proj",
        },
        layers="transformer.h",
        tables=("transformer.wte", "transformer.wpe"),
        whole_tables=True,
        **_LAYER_NORM,
    ),
    "xglm": decoder(names=_OPT, whole_tables=True, **_LAYER_NORM, refuse=_refuse_cross_attention),
    "bloom": decoder(
        names=_FALCON | {"residual": ("self_attention", "mlp")},
        layers="transformer.h",
        tables=("transformer.word_embeddings",),
        whole_tables=True,
        **_LAYER_NORM,
        refuse=_refuse_bloom,
    ),
    "mpt": decoder(
        names={
            "attention": "attn",
            "attention_norm": "norm_1",
            "attention_in": ("attn.Wqkv",),
            "attention_out": "attn.out_proj",
            "mlp": ("ffn",),
            "mlp_norm": "norm_2",
            "mlp_in": ("ffn.up_proj",),
            "mlp_out": ("ffn.down_proj",),
            "residual": ("ffn",),
            "dropout": ("resid_attn_dropout", None),
        },
        layers="transformer.blocks",
        tables=("transformer.wte",),
        **_LAYER_NORM,
    ),
    "starcoder2": decoder(names=_GPT_MLP, **_LAYER_NORM),
    "jais2": decoder(names=_UP_ONLY, **_LAYER_NORM),
    "nemotron": decoder(names=_UP_ONLY, norm_offset=1.0, **_LAYER_NORM),
    "persimmon": decoder(
        names=_FOUR_H_MLP
        | {
            "attention_in": ("self_attn.query_key_value",),
            "attention_out": "self_attn.dense",
            "dropout": (None, "dropout"),
        },
        **_LAYER_NORM,
    ),
    "stablelm": decoder(
        blocks=(layer(dropout=(None, "dropout")), layer(**_ONE_NORM, dropout=(None, "dropout"))), **_LAYER_NORM
    ),
    "olmo": decoder(layer_norm=True, norm_eps=1e-5),
    # parallel
    "gpt_neox": decoder(
        names=_FOUR_H_MLP
        | {
            "attention": "attention",
            "attention_in": ("attention.query_key_value",),
            "attention_out": "attention.dense",
            "parallel": "use_parallel_residual",
            "dropout": ("post_attention_dropout", "post_mlp_dropout"),
        },
        layers="gpt_neox.layers",
        tables=("gpt_neox.embed_in",),
        **_LAYER_NORM,
    ),
    "phi": decoder(
        names=_ONE_NORM | _FC_MLP | {"attention_out": "self_attn.dense", "dropout": ("resid_dropout", "resid_dropout")},
        **_LAYER_NORM,
    ),
    "falcon": decoder(
        blocks=(
            layer(**_FALCON, dropout=("config.attention_dropout", "hidden_dropout")),
            layer(**_FALCON_PARALLEL, mlp_norm="input_layernorm"),
            layer(**_FALCON_PARALLEL, attention_norm="ln_attn", mlp_norm="ln_mlp"),
        ),
        layers="transformer.h",
        tables=("transformer.word_embeddings",),
        **_LAYER_NORM,
    ),
    **{
        name: decoder(
            names=_GPT_NORMS
            | {
                "attention_in": readers,
                "attention_out": "attn.out_proj",
                "mlp_norm": "ln_1",
                "mlp_in": ("mlp.fc_in",),
                "mlp_out": ("mlp.fc_out",),
                "parallel": True,
            },
            layers="transformer.h",
            tables=("transformer.wte",),
            whole_tables=True,
            **_LAYER_NORM,
        )
        for name, readers in {
            "gptj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            "codegen": ("attn.qkv_proj",),
        }.items()
    },
    **dict.fromkeys(("cohere", "cohere2", "cohere_compass_text"), decoder(names=_ONE_NORM, layer_norm=True)),
    # mixture of experts
    **dict.fromkeys(("mixtral", "olmoe", "mellum", "minimax_m2"), decoder(mlps=(experts(),))),
    **dict.fromkeys(("qwen3_moe", "mimo_v2_flash"), decoder(mlps=(experts(), MLP))),
    **dict.fromkeys(("dots1", "exaone_moe", "glm4_moe", "hy_v3", "sarvam_moe"), decoder(mlps=_SHARED)),
    "solar_open": decoder(mlps=(experts(shared="shared_experts"),)),
    "laguna": decoder(reads(ATTENTION, "self_attn.g_proj"), mlps=_SHARED),
    "qwen2_moe": decoder(mlps=(_QWEN_SHARED, MLP)),
    "flint": decoder(mlps=(experts(shared="shared_expert"), MLP)),
    "hunyuan_v1_moe": decoder(mlps=(experts("gate.wg", shared="shared_mlp"),)),
    "minimax_m3_vl_text": decoder(
        mlps=(experts(shared="shared_experts", gate_up="gate_up_proj"), _GATE_UP), **_GEMMA_NORM
    ),
    **dict.fromkeys(("granitemoe", "granitemoe_swa"), decoder(mlps=(_GRANITE_EXPERTS,), names=_GRANITE_SCALE)),
    "granitemoeshared": decoder(mlps=(_GRANITE_BOTH, _GRANITE_EXPERTS), names=_GRANITE_SCALE),
    "ernie4_5_moe": decoder(mlps=(experts(shared="shared_experts"), experts(), MLP)),
    "gpt_oss": decoder(mlps=(experts("router"),)),
    "aria_text": decoder(mlps=(experts("router", shared="shared_experts"),)),
    "llama4_text": decoder(
        mlps=(experts("router", shared="shared_expert", module="feed_forward"), _JAMBA_MLP), norm_eps="eps"
    ),
    "cohere2_moe": decoder(
        mlps=(experts(shared="shared_experts"), experts(), MLP),
        names=_ONE_NORM,
        layer_norm=True,
        refuse=_refuse_cohere2_moe,
    ),
    "phimoe": decoder(mlps=(experts("router") | {"constant": True},), **_LAYER_NORM),
    # multi-head latent attention
    "minicpm3": decoder(MLA, names={"scale": "residual_scale"}),
    "youtu": decoder(MLA),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "sarvam_mla"), decoder(MLA, MLA_PLAIN_QUERY, mlps=_SHARED)
    ),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), decoder(_INDEXED, mlps=_SHARED)),
    "dots3_note_text": decoder(reads(_INDEXED, "self_attn.g_proj"), reads(MLA, "self_attn.g_proj"), mlps=_SHARED),
    # hybrids: another mixer in some layers
    "qwen3_5_text": decoder(*_DELTA_NET, **_GEMMA_NORM),
    "qwen3_5_moe_text": decoder(*_DELTA_NET, mlps=(_QWEN_SHARED,), **_GEMMA_NORM),
    "qwen3_next": decoder(
        _mixer("linear_attn", "in_proj_qkvz", "in_proj_ba"), ATTENTION, mlps=(_QWEN_SHARED, MLP), **_GEMMA_NORM
    ),
    "lara_mini": decoder(*_DELTA_NET, mlps=(experts(shared="shared_expert"),)),
    "kimi_linear": decoder(reads(ATTENTION, *_KIMI_READERS), MLA, MLA_PLAIN_QUERY, mlps=_SHARED),
    "bailing_hybrid": decoder(
        reads(ATTENTION, *_BAILING_READERS),
        reads(MLA, "self_attn.g_proj"),
        reads(MLA_PLAIN_QUERY, "self_attn.g_proj"),
        mlps=_SHARED,
    ),
    "jamba": decoder(
        _MAMBA,
        ATTENTION,
        mlps=(experts("router", module="feed_forward"), _JAMBA_MLP),
        names={"mlp_norm": "pre_ff_layernorm"},
    ),
    "bamba": decoder(_MAMBA, ATTENTION, mlps=(_JAMBA_MLP,), names={"mlp_norm": "pre_ff_layernorm"}),
    "falcon_h1": decoder(
        reads(ATTENTION, "mamba.in_proj")
        | {
            "second": "mamba",
            "second_out": "mamba.out_proj",
            "multipliers": ("attention_in_multiplier", "attn_out_multiplier", "ssm_out_multiplier"),
        },
        mlps=(_JAMBA_MLP,),
        names={"mlp_norm": "pre_ff_layernorm"},
    ),
    "granitemoehybrid": decoder(_MAMBA, ATTENTION, mlps=(_GRANITE_BOTH, _NO_ROUTED), names=_GRANITE_SCALE),
    "recurrent_gemma": decoder(
        _mixer("temporal_block", "linear_x", "linear_y") | {"attention_out": "temporal_block.linear_out"},
        {
            "attention": "temporal_block",
            "attention_in": ("temporal_block.q_proj", "temporal_block.k_proj", "temporal_block.v_proj"),
            "attention_out": "temporal_block.o_proj",
        },
        names={
            "attention_norm": "temporal_pre_norm",
            "mlp": ("mlp_block",),
            "mlp_norm": "channel_pre_norm",
            "mlp_in": ("mlp_block.gate_proj", "mlp_block.up_proj"),
            "mlp_out": ("mlp_block.down_proj",),
        },
        **_GEMMA_NORM,
    ),
    "xlstm": decoder(
        _mixer("mlstm_layer", "q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact"),
        names={
            "attention_norm": "norm_mlstm",
            "mlp": ("ffn",),
            "mlp_norm": "norm_ffn",
            "mlp_in": ("ffn.proj_up_gate", "ffn.proj_up"),
            "mlp_out": ("ffn.proj_down",),
        },
        layers="backbone.blocks",
        tables=("backbone.embeddings",),
        norm_eps="eps",
    ),
    "lfm2": decoder(*_LFM2, mlps=(_LFM2_MLP,), names=_LFM2_NORMS),
    "lfm2_moe": decoder(*_LFM2, mlps=(experts(module="feed_forward"), _LFM2_MLP), names=_LFM2_NORMS),
    # one branch a layer
    "nemotron_h": decoder(blocks=_NEMOTRON_H, tables=("model.embeddings",)),
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba"),
        decoder(_ONE_MIXER, mlps=({},), layers="backbone.layers", tables=("backbone.embeddings",)),
    ),
}

_THIRD_BRANCH = "its layers have a third branch that reads the token and share keys, which slicing does not handle yet"
_NORM_OF_SUM = "it normalises the sum of stream and branch, so its stream has no basis of its own"
_ENCODER = "it is an encoder: a token sees those after it, or its layers normalise the sum of stream and branch"
_COMPOSITE = "it is a model of text and other inputs: load its text model by itself, as load_model does where it can"
_STREAMS = "its stream is several ones, which its layers mix"
_AXES = "it works on single axes of the stream, which a rotation mixes"
_STATES = "its layers read more than the stream of the layer before"
_VECTOR = "it scales the stream by a vector between layers, which slicing does not handle yet"
_NAMES = "its layers hold norms, branches and sums in modules of their own, which slicing does not handle yet"
REFUSED: dict[str, str] = {
    name: reason
    for reason, names in {
        _THIRD_BRANCH: "gemma4 gemma4_text gemma4_unified gemma4_unified_text",
        _NORM_OF_SUM: "openai-gpt xlnet git trocr",
        _ENCODER: "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta"
        " roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod",
        _STREAMS: "deepseek_v4 hy_v4 gemma3n gemma3n_text qwen4_exp qwen4_exp_text",
        _AXES: "axk2 inkling_text rwkv",
        _STATES: "blt gemma4_assistant gemma4_unified_assistant inkling2_text inkling2_loop_text reformer zamba zamba2",
        _VECTOR: "doge zaya",
        _NAMES: "cpmant ctrl dbrx gpt_neox_japanese longcat_flash",
        "its residual is the normalised stream": "minimax dory",
        "its layers run in loops": "hrm_text",
        "its experts norm what they write themselves, which slicing does not handle yet": "axk1",
        "its text model has layers that read pictures by cross-attention": "mllama",
        "it scales stream and branch by the layer's index, which slicing does not handle yet": "beam",
        "its attention has experts, which slicing does not handle yet": "jetmoe",
        "its first layer reads the stream without a norm, which slicing does not handle yet": "modernbert-decoder",
    }.items()
    for name in names.split()
}
_TEXT_ALONE = ("dots3_note", "llama4", "qwen3_5", "qwen3_5_moe")  # composites that load as their text model


def find_family(config: Any) -> Family:
    """The row of `config.model_type`; InputError, which says why, where the model can't be sliced."""
    model_type = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"can't slice {model_type!r}: it is an encoder-decoder, only decoders can be sliced")
    if model_type == "sliced":
        raise InputError("can't slice 'sliced': it is sliced already, and can only be evaluated (--mean 0)")
    if model_type in _TEXT_ALONE:
        return find_family(config.get_text_config(decoder=True))
    if model_type in REFUSED:
        raise InputError(f"can't slice {model_type!r}: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        composite = hasattr(config, "get_text_config") and config.get_text_config(decoder=True) is not config
        known = f"it is none of the {len(FAMILIES)} model types in families.py; if it computes what one of them does,"
        why = _COMPOSITE if composite else f"{known} convert it to that type"
        raise InputError(f"can't slice {model_type!r}: {why}")
    family = FAMILIES[model_type]
    if reason := family.refuse(config):
        raise InputError(f"can't slice this {model_type!r} model: {reason}")
    return family
