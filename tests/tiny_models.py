"""Tiny random models of every family that can be sliced, with what makes slicing hard: random norm weights and biases,
means that are not 0, grouped queries, tied and untied tables."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slicing.families import FAMILIES, Family
from slicing.parts import bias_name, find_block, has, input_axis, matrix, part

HIDDEN, LAYERS, HEADS, GROUPS, INNER, VOCAB = 48, 3, 4, 2, 64, 96
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = _TOKENS | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
_PLAIN = _SIZES | {"intermediate_size": INNER}
_LLAMA = _PLAIN | {"num_key_value_heads": GROUPS}
_GPT = _TOKENS | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCAB}
_MOE = _LLAMA | {
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],  # a layer without experts between two with them
}
_MULTIPLIERS = {
    "residual_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.5,
}
_STABLELM = _LLAMA | {"partial_rotary_factor": 0.5}

# case -> (model_type, config); a family has a case for each of its layouts
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 8}),
    "qwen2": ("qwen2", _LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 16}),
    "phi3": ("phi3", _LLAMA),
    "gemma": ("gemma", _LLAMA | {"head_dim": 16}),
    "granite": ("granite", _LLAMA | _MULTIPLIERS),
    "smollm3": ("smollm3", _LLAMA | {"no_rope_layer_interval": 2}),
    "opt": ("opt", _SIZES | {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN}),
    "gpt2": ("gpt2", _GPT),
    "starcoder2": ("starcoder2", _LLAMA | {"use_bias": True, "sliding_window": None}),
    "stablelm": ("stablelm", _STABLELM | {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", _STABLELM | {"use_parallel_residual": True, "use_qkv_bias": True}),
    "olmo": ("olmo", _LLAMA),
    "gpt_neox": ("gpt_neox", _PLAIN),
    "gpt_neox-sequential": ("gpt_neox", _PLAIN | {"use_parallel_residual": False}),
    "phi": ("phi", _LLAMA),
    "falcon": ("falcon", _SIZES | {"multi_query": True}),
    "falcon-sequential": ("falcon", _SIZES | {"parallel_attn": False, "bias": True, "alibi": True}),
    "falcon-two-norms": ("falcon", _SIZES | {"new_decoder_architecture": True, "num_kv_heads": GROUPS}),
    "falcon-one-norm": (
        "falcon",
        _SIZES | {"new_decoder_architecture": True, "num_kv_heads": GROUPS, "num_ln_in_parallel_attn": 1},
    ),
    "gptj": ("gptj", _GPT | {"rotary_dim": 4}),
    "cohere": ("cohere", _LLAMA | {"logit_scale": 0.3}),
    "mixtral": ("mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", _MOE | {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", _MOE | {"head_dim": 16}),
    "gemma3_text": ("gemma3_text", _LLAMA | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "olmo2": ("olmo2", _LLAMA),
}

_DENSE_EXPERTS = {  # layer 0 has no experts
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = _SIZES | {
    "intermediate_size": INNER,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_DELTA = _LLAMA | {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_SMALL_EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_SMALL_EARS = _SMALL_EYES | {"num_blocks": 1, "ext_pw_out_channel": 16, "nemo_conv_channels": 16}
_ROPES = {name: {"rope_type": "default", "rope_theta": 1e4} for name in ("full_attention", "sliding_attention")}
_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
_DELTA_SIZES = {"linear_head_dim": 8, "linear_num_heads": 2, "head_dim": 16}
_GRANITE_MOE = _LLAMA | _MULTIPLIERS | {"num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_MAMBA_LAYERS = {"layer_types": ["mamba", "attention", "mamba"]}
_MAMBA = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "state_size": 8}
_XGLM = {
    "d_model": HIDDEN,
    "num_layers": LAYERS,
    "attention_heads": HEADS,
    "ffn_dim": INNER,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
_XLSTM = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_blocks": LAYERS,
    "num_heads": HEADS,
    "vocab_size": VOCAB,
    "chunk_size": 8,
}
_DOTS3 = {
    "head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "shared_experts_intermediate_size": 24,
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    "sliding_window": 8,
    **{
        f"swa_{name}": size
        for name, size in {
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "head_dim": 16,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        }.items()
    },
}
_NEMOTRON_H = {
    "hybrid_override_pattern": "M*E-",
    "num_hidden_layers": 4,
    "head_dim": 12,
    "mamba_num_heads": 4,
    "mamba_head_dim": 24,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 32,
}
_CONVOLUTION = {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}

# The other families: their layers are checked, sliced and found lossless; what every slicing does is tested on CASES.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, _LLAMA)
        for name in (
            *("apertus", "apertus1p5_text", "arcee", "bitnet", "cohere2", "cwm", "diffllama", "ernie4_5", "exaone"),
            *("granite_swa", "internlm3", "iquestcoder", "jais2", "ministral3", "nanochat", "nemotron", "persimmon"),
            "seed_oss",
        )
    },
    **{
        name: (name, _LLAMA | {"head_dim": 12})
        for name in ("glm", "helium", "hunyuan_v1_dense", "ministral", "vaultgemma")
    },
    "moshi": ("moshi", _LLAMA | {"ffn_dim": INNER, "head_dim": 12}),
    "phi4_multimodal": ("phi4_multimodal", _LLAMA | {"vision_config": _SMALL_EYES, "audio_config": _SMALL_EARS}),
    "biogpt": ("biogpt", _PLAIN),
    "gpt_neo": ("gpt_neo", _PLAIN | {"num_layers": LAYERS, "attention_types": [[["global", "local", "global"], 1]]}),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "xglm": ("xglm", _TOKENS | _XGLM),
    "bloom": ("bloom", _SIZES | {"n_head": HEADS, "n_layer": LAYERS}),
    "mpt": (
        "mpt",
        _TOKENS | {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "vocab_size": VOCAB, "max_seq_len": 64},
    ),
    "codegen": ("codegen", _GPT | {"rotary_dim": 4}),
    "cohere_compass_text": (
        "cohere_compass_text",
        _LLAMA | {"rope_parameters": {name: rope | {"mrope_section": [2, 2, 2]} for name, rope in _ROPES.items()}},
    ),
    # output norms
    "gemma2": ("gemma2", _LLAMA | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    **{name: (name, _LLAMA | {"head_dim": 12}) for name in ("olmo3", "exaone4", "glm4")},
    "kolibri1": ("kolibri1", _MOE | {"head_dim": 12, "shared_expert_intermediate_size": 32}),
    "flex_olmo": ("flex_olmo", _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "afmoe": (
        "afmoe",
        _MOE
        | {"head_dim": 12, "num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 8, "mup_enabled": True},
    ),
    "olmo_hybrid": ("olmo_hybrid", _DELTA),
    "hyperclovax": ("hyperclovax", _LLAMA | _MULTIPLIERS),
    "hyperclovax-plain": ("hyperclovax", _LLAMA | _MULTIPLIERS | {"use_post_norm": False}),
    "lfm3": ("lfm3", _LLAMA | _CONVOLUTION | {"head_dim": 12}),
    "lfm3-plain": (
        "lfm3",
        _LLAMA | _CONVOLUTION | {"head_dim": 12, "use_sandwich_norm": False, "use_attention_gate": False},
    ),
    # mixture of experts
    **{name: (name, _MOE) for name in ("olmoe", "mellum")},
    "minimax_m2": ("minimax_m2", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "flint": ("flint", _MOE | {"shared_expert_intermediate_size": 32}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", _LLAMA | {"num_experts": 4, "moe_topk": 2, "head_dim": 12}),
    "mimo_v2_flash": ("mimo_v2_flash", _LLAMA | _DENSE_EXPERTS),
    "minimax_m3_vl_text": (
        "minimax_m3_vl_text",
        _LLAMA
        | _DENSE_EXPERTS
        | {"num_local_experts": 4, "shared_intermediate_size": 24, "dense_intermediate_size": 40},
    ),
    **{
        name: (name, _LLAMA | _DENSE_EXPERTS)
        for name in ("dots1", "exaone_moe", "glm4_moe", "hy_v3", "laguna", "sarvam_moe", "solar_open")
    },
    "gpt_oss": ("gpt_oss", _LLAMA | {"head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "aria_text": ("aria_text", _LLAMA | {"head_dim": 12, "moe_num_experts": 4, "moe_topk": 2}),
    "llama4_text": (
        "llama4_text",
        _LLAMA | {"head_dim": 12, "num_local_experts": 4, "intermediate_size_mlp": 40, "moe_layers": [0, 2]},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        _LLAMA | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
    ),
    "ernie4_5_moe-routed": (
        "ernie4_5_moe",
        _LLAMA | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 0},
    ),
    **{name: (name, _GRANITE_MOE) for name in ("granitemoe", "granitemoe_swa")},
    "granitemoeshared": ("granitemoeshared", _GRANITE_MOE | {"shared_intermediate_size": 40}),
    "granitemoeshared-routed": ("granitemoeshared", _GRANITE_MOE | {"shared_intermediate_size": 0}),
    "cohere2_moe": (
        "cohere2_moe",
        _LLAMA
        | _DENSE_EXPERTS
        | {"num_local_experts": 4, "head_dim": 12, "prefix_dense_intermediate_size": 40, "logit_scale": 0.3},
    ),
    "cohere2_moe-routed": ("cohere2_moe", _LLAMA | _DENSE_EXPERTS | {"head_dim": 12, "num_shared_experts": 0}),
    "phimoe": ("phimoe", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # multi-head latent attention
    **{name: (name, _LATENT) for name in ("minicpm3", "youtu")},
    "glm_moe_dsa": ("glm_moe_dsa", _LATENT | _DENSE_EXPERTS | {"index_n_heads": 2, "index_head_dim": 16}),
    **{
        name: (name, _LATENT | _DENSE_EXPERTS) for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "sarvam_mla")
    },
    **{
        f"{name}-query": (name, _LATENT | _DENSE_EXPERTS | {"q_lora_rank": None})
        for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "sarvam_mla")
    },
    "deepseek_v32": ("deepseek_v32", _LATENT | _DENSE_EXPERTS | {"index_n_heads": 2, "index_head_dim": 16}),
    # hybrids
    "qwen3_5_text": ("qwen3_5_text", _DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", _DELTA | _DENSE_EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_next": ("qwen3_next", _DELTA | _MOE | {"shared_expert_intermediate_size": 32}),
    "lara_mini": ("lara_mini", _DELTA | _MOE | {"shared_expert_intermediate_size": 32}),
    **{
        name + end: (name, _LATENT | _DENSE_EXPERTS | {"layer_types": _HYBRID} | _DELTA_SIZES | query)
        for name in ("kimi_linear", "bailing_hybrid")
        for end, query in {"": {}, "-query": {"q_lora_rank": None}}.items()
    },
    "jamba": (
        "jamba",
        _LLAMA
        | {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 3,
            "expert_layer_offset": 0,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "dots3_note_text": ("dots3_note_text", _LATENT | _DENSE_EXPERTS | _DOTS3),
    "recurrent_gemma": (
        "recurrent_gemma",
        _LLAMA | {"lru_width": HIDDEN, "head_dim": 12, "block_types": ["recurrent", "attention"]},
    ),
    "xlstm": ("xlstm", _TOKENS | _XLSTM),
    "falcon_h1": (
        "falcon_h1",
        _LLAMA
        | _MAMBA2
        | {"mamba_d_ssm": 96, "attention_in_multiplier": 0.7, "attention_out_multiplier": 1.4}
        | {"ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.6, "key_multiplier": 0.8, "mlp_multipliers": [1.3, 0.7]}
        | {"embedding_multiplier": 3.0, "lm_head_multiplier": 0.4},
    ),
    "bamba": ("bamba", _LLAMA | _MAMBA2 | {"attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "granitemoehybrid",
        _GRANITE_MOE | _MAMBA2 | _MAMBA_LAYERS | {"shared_intermediate_size": 40},
    ),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        _GRANITE_MOE | _MAMBA2 | _MAMBA_LAYERS | {"shared_intermediate_size": 40, "num_local_experts": 0},
    ),
    "lfm2": ("lfm2", _LLAMA | _CONVOLUTION),
    "lfm2_moe": ("lfm2_moe", _LLAMA | _DENSE_EXPERTS | _CONVOLUTION | {"num_dense_layers": 1}),
    # one branch a layer
    "nemotron_h": ("nemotron_h", _LLAMA | _NEMOTRON_H),
    **{name: (name, _TOKENS | _MAMBA) for name in ("mamba", "falcon_mamba")},
    "mamba2": ("mamba2", _TOKENS | _MAMBA | {"num_heads": 4, "head_dim": 24, "n_groups": 1, "chunk_size": 8}),
}
ALL = CASES | OTHERS

# The largest relative error of logits that rounding explains, by dtype; Transformers computes some things in fp32
# whatever the model's dtype is: every RMSNorm, and the norms or the attention of the families named here.
TOLERANCE = {
    "fp64": 1e-9,
    "fp64, parts in fp32": 1e-5,
    "fp32": 1e-4,
    "fp32 bases": 1e-5,
    "batches": 1e-4,
    "bf16": 5e-2,
}
_PARTS_IN_FP32 = ("olmo", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "gptj", "codegen", "gpt_neo")


def tolerance(case: str, dtype: torch.dtype = torch.float64) -> float:
    """The bound on the relative error of a case's logits."""
    if dtype == torch.bfloat16:
        return TOLERANCE["bf16"]
    if dtype == torch.float32:
        return TOLERANCE["fp32"]
    exact = layer_norm(case) and ALL[case][0] not in _PARTS_IN_FP32
    return TOLERANCE["fp64" if exact else "fp64, parts in fp32"]


def family_of(case: str) -> Family:
    """The row of a case's family."""
    return FAMILIES[ALL[case][0]]


def output_norms(case: str) -> bool:
    """Whether the case's family norms what a branch writes."""
    return any(block.output_norms() for block in family_of(case).blocks)


def layer_norm(case: str) -> bool:
    """Whether the case's family has LayerNorm."""
    return family_of(case).layer_norm


def random_model(
    case: str, *, tied: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A model in evaluation mode whose every parameter is random and has a mean that is not 0; norm weights are about 1
    (Gemma's, to which it adds 1, about 0). `settings` go into the config."""
    model_type, defaults = ALL[case]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(defaults | {"tie_word_embeddings": tied} | settings))
    # the default, one grouped product of all experts, has no fp64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    family = FAMILIES[model_type]
    tables = {id(part(model, path).weight) for path in family.tables}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.double()
            if id(parameter) in tables:
                parameter.normal_(0.2, 1.0)
            elif parameter.ndim > 1:
                parameter.normal_(0.02, 0.7 / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.1, 0.2)
            else:
                parameter.normal_(1.0 - family.norm_offset, 0.3)
            parameter.data = parameter.data.to(dtype)  # not model.to(dtype): rotary frequencies stay fp32
    model.config.dtype = dtype
    return model


def live_in(model: PreTrainedModel, subspace: torch.Tensor) -> None:
    """Make the residual stream live in a subspace (D, r): project everything that writes to it, in place."""
    family = FAMILIES[model.config.model_type]
    projection = subspace @ subspace.T  # (D, D)

    def project(parameter: torch.Tensor, axis: int, scale: torch.Tensor | float = 1.0) -> None:
        wide = parameter.data.double()  # scale: what is behind an output norm's weight lives in the subspace
        narrow = (wide.mT if axis == -2 else wide) * scale @ projection / scale
        parameter.data = (narrow.mT if axis == -2 else narrow).to(parameter.dtype)

    for path in family.tables:
        project(part(model, path).weight, -1)
    if has(model, "transformer.word_embeddings_layernorm"):  # Bloom's norm of the embedding keeps a centred subspace so
        norm = model.transformer.word_embeddings_layernorm
        norm.weight.data.fill_(1.0)
        norm.bias.data.zero_()
    if has(model, "model.embed_positions.weights"):  # XGLM's sines
        project(model.model.embed_positions.weights, -1)
    for layer in part(model, family.layers):
        block = find_block(layer, family)
        for path in block.writers():
            owner, name = matrix(layer, path)
            norm = block.output_norm(path)
            scale = part(layer, norm).weight.data.double() + family.norm_offset if norm else 1.0
            project(getattr(owner, name), output_axis(owner), scale)
            if getattr(owner, bias_name(name), None) is not None:
                project(getattr(owner, bias_name(name)), -1, scale)


def output_axis(owner: torch.nn.Module) -> int:
    """The axis of a matrix that runs over its outputs: the other one of the last two."""
    return -3 - input_axis(owner)


def subspace(rank: int, *, centred: bool, seed: int = 1) -> torch.Tensor:
    """A random orthonormal basis (D, rank), fp64; orthogonal to the ones vector where centred."""
    directions = torch.randn(HIDDEN, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if centred:
        directions -= directions.mean(0)
    return torch.linalg.qr(directions).Q


def windows(count: int = 6, length: int = 16, seed: int = 2) -> torch.Tensor:
    """Random token ids (count, length)."""
    return torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    """The logits (B, S, V) of a model, without a cache."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, Frobenius, in fp64."""
    difference = found.double() - wanted.double()
    return (difference.norm() / wanted.double().norm()).item()
