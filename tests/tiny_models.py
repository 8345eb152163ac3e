"""Tiny random models of every family that can be sliced, with what makes slicing hard: norm weights, biases, means."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slicing.families import FAMILIES
from slicing.modeling import find_block, input_axis, matrix, part

HIDDEN, LAYERS, VOCAB = 48, 3, 96
_LLAMA = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
_MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
_GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
_FALCON = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "intermediate_size")}

# case -> (model_type, config); a family has a case a layout
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 8}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 16}),
    "phi3": ("phi3", _LLAMA | {"pad_token_id": 0}),
    "gemma": ("gemma", _LLAMA | {"head_dim": 16}),
    "granite": (
        "granite",
        _LLAMA
        | {
            "residual_multiplier": 0.4,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.5,
        },
    ),
    "smollm3": ("smollm3", _LLAMA | {"no_rope_layer_interval": 2, "pad_token_id": 0}),
    "opt": (
        "opt",
        {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "intermediate_size")}
        | {"ffn_dim": 64, "word_embed_proj_dim": HIDDEN},
    ),
    "gpt2": ("gpt2", _GPT),
    "starcoder2": ("starcoder2", _LLAMA | {"use_bias": True, "sliding_window": None}),
    "stablelm": ("stablelm", _LLAMA | {"use_parallel_residual": False, "partial_rotary_factor": 0.5}),
    "stablelm-parallel": (
        "stablelm",
        _LLAMA | {"use_parallel_residual": True, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    ),
    "olmo": ("olmo", _LLAMA),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "gpt_neox-sequential": (
        "gpt_neox",
        {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"} | {"use_parallel_residual": False},
    ),
    "phi": ("phi", _LLAMA),
    "falcon": ("falcon", _FALCON | {"multi_query": True}),
    "falcon-sequential": ("falcon", _FALCON | {"parallel_attn": False, "bias": True, "alibi": True}),
    "falcon-new": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gptj": ("gptj", _GPT | {"rotary_dim": 4}),
    "cohere": ("cohere", _LLAMA | {"logit_scale": 0.3}),
    "mixtral": ("mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", _LLAMA | _MOE | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", _LLAMA | _MOE | {"head_dim": 16, "mlp_only_layers": [1]}),
}


def layer_norm(case: str) -> bool:
    """Whether the case's family has LayerNorm."""
    return FAMILIES[CASES[case][0]].layer_norm


def random_model(
    case: str, *, tied: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """A model whose every parameter is random: norm weights about 1 (Gemma's about 0), biases, means that are not 0."""
    model_type, settings = CASES[case]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings, tie_word_embeddings=tied)
    experts = {"experts_implementation": "eager"} if "moe" in model_type or model_type == "mixtral" else {}
    model = AutoModelForCausalLM.from_config(config, **experts).to(torch.float64).eval()
    offset = 1.0 - FAMILIES[model_type].norm_offset
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.02, 0.7 / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.1, 0.2)
            else:
                parameter.normal_(offset, 0.3)
    for table in FAMILIES[model_type].tables:
        weight = part(model, table).weight
        weight.data.normal_(0.2, 1.0)
    for name, buffer in model.named_buffers():  # as from_pretrained does: rotary frequencies stay fp32
        if "inv_freq" in name:
            buffer.data = buffer.data.float()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def live_in(model: PreTrainedModel, subspace: torch.Tensor) -> None:
    """Make the residual stream live in a subspace (D, r): project all that writes to it."""
    family = FAMILIES[model.config.model_type]
    projection = subspace @ subspace.T  # (D, D)

    def project(weight: torch.Tensor, axis: int) -> None:
        wide = weight.data.double()
        weight.data = (projection @ wide if axis == -2 else wide @ projection).to(weight.dtype)

    seen: set[int] = set()
    for path in family.tables:
        weight = part(model, path).weight
        project(weight, -1)
        seen.add(id(weight))
    for layer in part(model, family.layers):
        block = find_block(layer, family)
        for path in (block.attention_out, *block.mlp_out):
            owner, name = matrix(layer, path)
            project(getattr(owner, name), -3 - input_axis(owner))
            if getattr(owner, "bias", None) is not None:
                project(owner.bias, -1)


def subspace(rank: int, *, centred: bool, seed: int = 1) -> torch.Tensor:
    """A random basis (D, rank), fp64; orthogonal to the ones vector where centred."""
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
        return model(input_ids=ids, use_cache=False).logits
