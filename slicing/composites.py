"""Models of text and pictures (or video, or sound): their text model as a causal LM by itself."""

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Text models that have no causal LM of their own -> the family that computes the same from text, and what of its config
# is fixed in them. Of a token's three positions (time, height, width) a text has one, so they rotate as plain ones do.
_SAME_ON_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "glm4v_text": ("glm4", {}),
    "emu3_text_model": ("llama", {}),
}
_WHOLE = ("emu3", "fuyu")  # the class that is called their causal LM is the composite's
_OF_PICTURES = ("mrope_section", "mrope_interleaved")  # among the rope parameters


def text_model(config: "PretrainedConfig") -> "PretrainedConfig | None":
    """The configuration of the causal LM that a composite's text model is; None for a model that is no composite, or
    one whose text model can't be a causal LM by itself."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    text = config.get_text_config(decoder=True)
    if text is config:
        return None
    family, fixed = _SAME_ON_TEXT.get(text.model_type, (text.model_type, {}))
    own, by_itself = CLASSES.get(config.model_type), CLASSES.get(family)
    whole = own is None or own.endswith("ForConditionalGeneration") or config.model_type in _WHOLE
    if by_itself is None or not (whole or own == by_itself):
        return None
    fields = text.to_dict() | fixed
    if family != text.model_type:
        rope = fields.get("rope_parameters") or {}
        fields["rope_parameters"] = {name: value for name, value in rope.items() if name not in _OF_PICTURES}
    fields["model_type"] = family
    if hasattr(config, "tie_word_embeddings"):  # the head is the composite's
        fields["tie_word_embeddings"] = config.tie_word_embeddings
    fields["dtype"] = text.dtype or config.dtype
    found: PretrainedConfig = CONFIG_MAPPING[family].from_dict(fields)
    found.name_or_path = config.name_or_path
    found._attn_implementation = config._attn_implementation
    return found


def text_names(text: "PretrainedConfig") -> dict[str, str]:
    """How a composite's checkpoint names what is in its text model: patterns, and the causal LM's names."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        body = next(iter(AutoModelForCausalLM.from_config(copy.deepcopy(text)).named_children()))[0]
    inner = r"^(?:model\.)?(?:language_model|text_model)\."
    return {rf"{inner}lm_head\.": "lm_head.", rf"{inner}(?:{body}\.)?(?!lm_head\.)": f"{body}."}
