"""Try every model type of Transformers' causal-LM mapping on tiny random models, and write what was found.

    PYTHONPATH=. python tests/census.py --write docs/families.md --oldest "5.17.0 108 178"
    PYTHONPATH=. python tests/census.py gpt_oss jamba

A type that slices is measured in fp64: its stream is made to live in a subspace, it is sliced to that width and wider,
and the logits are compared with the dense model's; greedy generation with the cache is compared with full forwards; the
saved folder is loaded again. A type without a row is asked for its reason. LR and perplexity are measured of all types
that can be built small. It ends with exit code 1 where a type is sliced wrongly, ends in a traceback, or fewer slice
than should.
"""

import argparse
import sys
import tempfile
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch
import transformers
from test_composites import COMPOSITES
from tiny_models import (
    ALL,
    layer_norm,
    live_in,
    logits,
    random_model,
    relative_error,
    subspace,
    windows,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slicing import layer_redundancy, perplexity
from slicing.check import check_names
from slicing.composites import text_model
from slicing.families import FAMILIES, InputError, find_family
from slicing.modeling import SlicedForCausalLM
from slicing.parts import find_block, is_parallel, part
from slicing.rotation import rotate_and_slice

LOSSLESS = 1e-4  # above it a type does not count as sliced: rounding is at 1e-15 to 1e-6, a wrong row at 1e-2 and more
CACHE = 1e-4
LEAST = {"5.24": 110}  # how many types have to slice, by release
BIGGEST = 3_000_000  # parameters; what no general setting makes smaller is not built

# what makes most models small, and what some want besides
SMALL: dict[str, Any] = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "vocab_size": 96,
    "head_dim": 12,
    "is_decoder": True,
}
SMALLER: dict[str, dict[str, Any]] = {
    "axk1": {"qk_head_dim": 16, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "axk2": {"qk_head_dim": 16, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "cpmant": {"dim_head": 12, "dim_ff": 64, "prompt_length": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 3,
        "intermediate_size": [64] * 3,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "global_head_dim": 16,
    },
    "longcat_flash": {
        "head_dim": 8,
        "expert_ffn_hidden_size": 24,
        "ffn_hidden_size": 64,
        "num_key_value_heads": 4,
        "num_layers": 2,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * 3, "feed_forward_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}

PAGE = """\
# Model families

Made by `make families`, which runs `tests/census.py` with Transformers {version}:
every type of its causal-LM mapping, tried on tiny random models with two or three layouts of layer, most of them with
three layers of width 48. {slicing} of {count} types slice; the others are refused with the reason below, exit code 2,
before weights are read. With the oldest release that is supported, {oldest}, {slicing_oldest} of its
{count_oldest} types slice.

- **lossless**: the relative error of the logits after slicing to the subspace that the stream lives in (some parts of
  most families compute in fp32, so 1e-7 is rounding).
- **cache**: the relative error of the scores of greedy generation with the cache against full forwards; `-` where the
  tiny dense model can't generate with one.
- **reload**: the saved folder, loaded again, gives the same bits, or the relative error.

Before any slicing the layers of the model at hand are checked in the same way against the family's own code
(`slicing/check.py`).

| model type | layers | lossless | cache | reload |
|---|---|---|---|---|
{rows}

Refused:

LR and perplexity are measured for any causal decoder, and were for those of them that could be built small; `-` where
one could not, or where the type is an encoder-decoder, which is refused.

| model type | reason | LR and perplexity |
|---|---|---|
{refused}

Of models of text and pictures (or video, or sound) `load_model` and both commands load the text model as a causal LM,
and a line on stderr says what is left out. Others than these load in the same way, or are refused in one line where
their checkpoint names its text model in another way; with these `tests/test_composites.py` does so, and the logits of a
text are those of the whole model, bit for bit:
{composites}.

Experts return the width that they read, so the narrower of the two is filled up with zeros: an expert layer between the
widths d and d' has the parameters of max(d, d'), and in the last layer those of D. Where a family's body needs its
embeddings' width (GPT-2, Bloom) an untied table keeps it and is projected.

[CONTRIBUTING.md](../CONTRIBUTING.md) says how a family is added.
"""


def measure(case: str) -> dict[str, Any]:
    """What slicing does to a tiny model: kind of layers, the two errors, whether the bits are the same."""
    dtype = torch.float32 if case == "xglm" else torch.float64  # its attention has no fp64
    model = random_model(case, dtype=dtype)
    live_in(model, subspace(20, centred=layer_norm(case)))
    wanted = logits(model, windows(2))
    widths = ([20, 32] * 3)[: model.config.num_hidden_layers]
    sliced = rotate_and_slice(model, windows(), widths)
    return {
        "layers": _kind(model, find_family(model.config)),
        "lossless": relative_error(logits(sliced, windows(2)), wanted),
        "cache": cache_error(sliced),
        "dense cache": cache_error(model),
        "reload": reload_error(rotate_and_slice(random_model(case, dtype=torch.float32), windows(2), widths)),
    }


def reload_error(sliced: PreTrainedModel) -> float:
    """Of what is saved and loaded again, in fp32: in fp64 the tests' models have some tables in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        sliced.save_pretrained(folder)
        loaded = SlicedForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    return relative_error(logits(loaded, windows(2)), logits(sliced, windows(2)))


def cache_error(model: PreTrainedModel) -> float:
    """Of the scores of six new tokens, with the cache against full forwards; inf where there is no generation."""
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    try:
        found, wanted = (
            torch.stack(model.generate(windows(2, 8), use_cache=cached, **settings).logits) for cached in (True, False)
        )
    except RuntimeError:  # xLSTM's cache wants a width that is a multiple of 64
        return torch.inf
    return relative_error(found, wanted)


def _kind(model: PreTrainedModel, family: Any) -> str:
    layers = list(part(model, family.layers))
    blocks = [find_block(layer, family) for layer in layers]
    kinds = []
    if any(not block.attention or not block.mlp for block in blocks):
        kinds.append("one branch a layer")
    elif any(is_parallel(layer, block) for layer, block in zip(layers, blocks, strict=True)):
        kinds.append("parallel")
    else:
        kinds.append("attention, then MLP")
    if len({(block.attention, block.attention_in) for block in blocks}) > 1:
        kinds.append("two mixers")
    if any(block.second for block in blocks):
        kinds.append("a mixer beside attention")
    if any(block.experts for block in blocks):
        kinds.append("experts")
    if any(block.output_norms() for block in blocks):
        kinds.append("norms behind both")
    return ", ".join(kinds)


def slices(model_type: str) -> list[str]:
    """The cases of a type that this release of Transformers has."""
    return [case for case, (name, _) in ALL.items() if name == model_type]


def tried(model_type: str) -> tuple[str, str]:
    """What came of a type, "slices", "refused" or "wrong", and its row: a traceback is wrong too."""
    try:
        slices, text = row(model_type)
    except Exception as error:
        return "wrong", f"| `{model_type}` | **wrong**: {type(error).__name__}: {error} |"
    return "wrong" if "**wrong**" in text else "slices" if slices else "refused", text


def measured(model_type: str) -> str:
    """Whether LR and perplexity of a tiny model are measured, or why not."""
    model = small_model(model_type)
    if model is None:
        return "-"
    found = []
    for measure in (perplexity, layer_redundancy):
        try:
            measure(model, windows(3))
            found.append("yes")
        except InputError as error:
            found.append(" ".join(str(error).split()).partition(";")[0])
        except Exception as error:
            found.append(f"**wrong**: {type(error).__name__}: {error}")
    if found == ["yes", "yes"]:
        return "yes"
    return found[0] if found[0] != "yes" else f"perplexity; {found[1]}"


def small_model(model_type: str) -> PreTrainedModel | None:
    """A tiny model of a type without a row; None where there is no causal one, or it can't be made small."""
    if slices(model_type):
        return random_model(slices(model_type)[0], dtype=torch.float32)
    try:
        known = CONFIG_MAPPING[model_type]()
        fields = known.to_dict().keys() | known.attribute_map.keys()
        settings = {name: value for name, value in (SMALL | SMALLER.get(model_type, {})).items() if name in fields}
        config = AutoConfig.for_model(model_type, **settings)
        if config.is_encoder_decoder:
            return None
        with torch.device("meta"):
            size = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() if size < BIGGEST else None
    except Exception:  # a config's demands are its own
        return None


def row(model_type: str) -> tuple[bool, str]:
    """Whether a type slices, and its row: | type | layers | lossless | cache | reload |, or | type | reason | LR |."""
    try:
        config = AutoConfig.for_model(model_type)
    except Exception as error:  # a config of its own kind can want arguments: its row needs none
        config = _Named(model_type, error)
    else:
        config = text_model(config) or config
    try:
        family = find_family(config)
    except InputError as error:
        return False, f"| `{model_type}` | {str(error).partition(': ')[2]} | {measured(model_type)} |"
    own = model_type in FAMILIES
    base = model_type if own else next(name for name in FAMILIES if FAMILIES[name] is family and _text(config, name))
    try:
        for case in slices(base):
            check_names(random_model(case, dtype=torch.float32), family)
    except InputError as error:  # this release has other layers than the row
        return False, f"| `{model_type}` | {str(error).partition(': ')[2]} | {measured(model_type)} |"
    found = [measure(case) for case in slices(base)]
    own_measures = measured(base)
    worst: dict[str, Any] = {
        name: max((each[name] for each in found), key=_nan_first)
        for name in ("lossless", "cache", "dense cache", "reload")
    }
    if not max(worst["lossless"], worst["reload"], key=_nan_first) <= LOSSLESS or own_measures != "yes":
        worst["LR and perplexity"] = own_measures
        return False, f"| `{model_type}` | **wrong**: {worst} |"
    cache = f"{worst['cache']:.0e}"
    if worst["cache"] > CACHE:
        cache = f"{cache} (dense: {worst['dense cache']:.0e})".replace("inf (dense: inf)", "-")
    layers = "; ".join(dict.fromkeys(each["layers"] for each in found)) if own else f"as `{base}`"
    return (
        True,
        f"| `{model_type}` | {layers} | {worst['lossless']:.0e} | {cache} | {_reload(worst)} |",
    )


def _nan_first(error: float) -> float:
    return inf if isnan(error) else error


def _reload(worst: dict[str, float]) -> str:
    return "same bits" if worst["reload"] == 0 else f"{worst['reload']:.0e}"


def _text(config: Any, name: str) -> bool:
    return bool(config.get_text_config(decoder=True).model_type == name)


class _Named:
    """A config that can't be made without arguments."""

    def __init__(self, model_type: str, error: Exception) -> None:
        self.model_type, self.error = model_type, error


def main(argv: list[str] | None = None) -> int:
    """Print the rows of some types, or write the page of all; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--count", action="store_true", help="print what --oldest takes; the rows go to stderr")
    parser.add_argument("--oldest", default="- - -", help="a release and how many of how many types slice with it")
    arguments = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    rows: dict[str, list[str]] = {"slices": [], "refused": [], "wrong": []}
    for model_type in arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if model_type in CONFIG_MAPPING:
            kind, text = tried(model_type)
            rows[kind].append(text)
            print(text, flush=True, file=sys.stderr if arguments.count else sys.stdout)
    count = sum(len(texts) for texts in rows.values())
    version = transformers.__version__
    if arguments.count:
        print(version, len(rows["slices"]), count)
    if arguments.write:
        oldest, slicing_oldest, count_oldest = arguments.oldest.split()
        page = PAGE.format(
            version=version,
            slicing=len(rows["slices"]),
            count=count,
            oldest=oldest,
            slicing_oldest=slicing_oldest,
            count_oldest=count_oldest,
            rows="\n".join(rows["slices"]),
            refused="\n".join(rows["refused"] + rows["wrong"]),
            composites=", ".join(f"`{name}` (`{text}`)" for name, (text, _, _) in COMPOSITES.items()),
        )
        arguments.write.write_text(page, encoding="utf-8")
    least = 0 if arguments.types else next((least for end, least in LEAST.items() if version.startswith(end)), 100)
    return int(bool(rows["wrong"]) or len(rows["slices"]) < least)


if __name__ == "__main__":
    sys.exit(main())
