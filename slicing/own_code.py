"""Models with classes of their own: what is saved of them loads as Transformers' own, which must compute the same."""

import logging
import math

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from slicing.causality import SEEDS, trial_logits, trial_tokens
from slicing.families import InputError
from slicing.modeling import SlicedForCausalLM
from slicing.narrow import OutputRMSNorm

TOKENS = 64
_TOLERANCE = 1e-3  # relative, of logits; or some roundings of the dtype
_ROUNDINGS = 4

log = logging.getLogger(__name__)


@torch.no_grad()
def of_transformers(model: PreTrainedModel, rebuilt: SlicedForCausalLM) -> PreTrainedModel:
    """The model; where it has other classes than what Transformers builds of its config, one of these that shares its
    weights.

    rebuilt: that model, its layers sliced. Raises InputError where those classes take other weights or give other
    logits: what is saved would load as another model.
    """
    found = _first_difference(model, rebuilt)
    if found is None:
        return model
    place, own, stock = found
    twin = _twin(model, rebuilt)
    why = "takes other weights"
    if twin is not None:
        error = _error(model, twin)
        if error <= max(_TOLERANCE, _ROUNDINGS * torch.finfo(model.dtype).eps):
            log.warning("its %s is %s, sliced as Transformers' own %s, which computes the same", place, own, stock)
            return twin
        why = f"gives other logits (relative error {error:.2g})"
    raise InputError(
        f"can't slice this {model.config.model_type!r} model: its {place} is {own}, Transformers' own {stock} {why}:"
        " what is saved would load as another model"
    )


def _first_difference(model: PreTrainedModel, rebuilt: SlicedForCausalLM) -> tuple[str, str, str] | None:
    """The first module whose class is not what Transformers builds there, its class, and Transformers' own."""
    built = dict(rebuilt.named_modules())
    for name, module in model.named_modules():
        other = built.get(name)
        stock = getattr(other, "dense_class", type(other))
        if stock is not type(module) and not isinstance(other, nn.RMSNorm | OutputRMSNorm):  # sliced norms
            return name or "class", type(module).__name__, stock.__name__
    return None


def _twin(model: PreTrainedModel, rebuilt: SlicedForCausalLM) -> PreTrainedModel | None:
    """Transformers' own model with this one's weights, in the same memory; None where it has others."""
    with init_empty_weights(include_buffers=False):
        twin: PreTrainedModel = rebuilt.dense_class(rebuilt.config.dense())
    weights = model.state_dict()
    shapes = {name: weight.shape for name, weight in weights.items()}
    if shapes != {name: weight.shape for name, weight in twin.state_dict().items()}:
        return None
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    return twin.to(model.device).eval()


def _error(model: PreTrainedModel, twin: PreTrainedModel) -> float:
    """The relative error of logits, the smaller one of two texts: a token may lie on the border of two experts."""
    errors = []
    for seed in SEEDS:
        ids = trial_tokens(model, seed, TOKENS)
        wanted = trial_logits(model, ids)
        errors.append(float((trial_logits(twin, ids) - wanted).norm() / wanted.norm()))
    return min(math.inf if math.isnan(error) else error for error in errors)
