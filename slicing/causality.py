"""Whether a model is causal: a perplexity, and a slicing calibrated on one, mean nothing where it sees the future."""

import math
import weakref

import torch
from transformers import PreTrainedModel

from slicing.batches import evaluation_mode, input_device
from slicing.families import InputError

TOKENS = 16
SEEDS = (0, 1)  # a token on the border between two experts may go either way: a causal model passes with one of them
_TOLERANCE = 1e-5  # of the largest logit; 0 is what most causal models have
_ROUNDINGS = 8  # of the dtype: what products that are grouped in another way may move

_causal: "weakref.WeakKeyDictionary[PreTrainedModel, str]" = weakref.WeakKeyDictionary()  # with the config that passed


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raise InputError unless the logits of a text's first half stay as they are where its second half changes.

    Measured, not read off the config: it has many names for this, and a default that says nothing. Sixteen random
    tokens run two or three times; a model that has passed is not tried again.
    """
    config = model.config.to_json_string(use_diff=False)
    if _causal.get(model) == config:
        return
    with evaluation_mode(model):
        causal = any(_stays(model, seed) for seed in SEEDS)
    if not causal:
        raise InputError(
            f"{type(model).__name__} is not causal: later tokens move the logits of those before them; perplexity,"
            " redundancy and slicing are for causal language models (see is_causal, is_decoder and"
            " use_bidirectional_attention in its config.json)"
        )
    _causal[model] = config


def trial_tokens(model: PreTrainedModel, seed: int, length: int = TOKENS) -> torch.Tensor:
    """Random token ids (1, length) on the device of the embedding, none with a meaning of its own: a padding token
    would change the mask."""
    table = model.get_input_embeddings()
    config = model.config.to_dict() | model.config.get_text_config(decoder=True).to_dict()
    vocabulary = min(table.weight.shape[0], config.get("vocab_size") or table.weight.shape[0])
    special = [value for name, value in config.items() if name.endswith("token_id") and value is not None]
    special = [index for value in special for index in (value if isinstance(value, list) else [value])]
    drawn = torch.randint(vocabulary, (4 * length,), generator=torch.Generator().manual_seed(seed))
    plain = drawn[~torch.isin(drawn, torch.tensor(special, dtype=torch.long))]
    return torch.cat([plain, drawn])[None, :length].to(input_device(table))


def trial_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits (S, V) of token ids (1, S), fp64. Raises InputError where the model's forward fails."""
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits[0].double()
    except torch.OutOfMemoryError as error:
        raise InputError(f"out of memory with {ids.shape[1]} tokens: use a smaller model or a larger device") from error
    except Exception as error:  # code of any family
        why = " ".join(str(error).split())[:300]
        raise InputError(f"{type(model).__name__} can't be run on text alone: {type(error).__name__}: {why}") from error
    return logits


def _stays(model: PreTrainedModel, seed: int) -> bool:
    """Whether the logits of the first half stay within rounding where the second half changes."""
    ids, other = trial_tokens(model, seed), trial_tokens(model, seed + len(SEEDS))
    half = TOKENS // 2
    other[:, :half] = ids[:, :half]
    first = trial_logits(model, ids)[:half]
    moved = (first - trial_logits(model, other)[:half]).abs().max().item()
    scale = first.abs().max().item()
    if math.isnan(moved) or moved <= _TOLERANCE * scale:  # weights that are not finite are told elsewhere
        return True
    if moved > _ROUNDINGS * torch.finfo(model.dtype).eps * scale:
        return False
    # In between lies rounding where the other tokens' experts, or no two runs, are grouped alike.
    names = [f"{name} {type(module).__name__}".lower() for name, module in model.named_modules()]
    mixture = any("expert" in name or "moe" in name for name in names)
    return mixture or not torch.equal(first, trial_logits(model, ids)[:half])
