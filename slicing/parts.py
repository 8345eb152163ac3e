"""A decoder layer by the names in families.py: its modules and matrices, and what each of its branches adds.

A saved folder carries a copy, so this imports nothing else of this project.
"""

import ast
from functools import cache, reduce
from inspect import Parameter, getsource, signature, unwrap
from textwrap import dedent
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import Block, Family, InputError


def in_model(model: PreTrainedModel, path: str) -> Any:
    """What a path of families.py, which starts at the causal LM, leads to in that or in another model of the family."""
    if has(model, path):
        return part(model, path)
    return part(model.base_model, path.partition(".")[2])


def part(layer: nn.Module, path: str) -> Any:
    """The module or parameter at a dotted path."""
    return reduce(getattr, path.split("."), layer)


def matrix(layer: nn.Module, path: str) -> tuple[Any, str]:
    """The module that holds the matrix at a path, and the parameter's name: of a linear layer, a router, or the
    experts, whose parameters (experts, outputs, inputs) have no module of their own."""
    found = part(layer, path)
    if isinstance(found, nn.Parameter):
        owner, _, name = path.rpartition(".")
        return part(layer, owner), name
    return found, "weight"


def input_axis(owner: nn.Module) -> int:
    """The axis of a matrix that runs over its inputs; the outputs' is the other of the last two."""
    transposed = isinstance(owner, Conv1D) or type(owner).__name__ == "Llama4TextExperts"
    return -2 if transposed or getattr(owner, "is_transposed", False) else -1


def bias_name(name: str) -> str:
    """The name of the bias that belongs to a matrix: (outputs) or, of experts, (experts, outputs)."""
    return "bias" if name == "weight" else f"{name}_bias"


def find_block(layer: nn.Module, family: Family) -> Block:
    """The first layout whose every name the layer has, its output norms not as identities; InputError that names what
    the last one misses."""
    missing: list[str] = []
    for block in family.blocks:
        missing = [path for path in block.paths() if not has(layer, path)]
        missing = missing or [path for path in block.output_norms() if isinstance(part(layer, path), nn.Identity)]
        if not missing:
            return block
    raise InputError(f"{type(layer).__name__} has no {', '.join(missing)}, which the row in families.py names")


def has(layer: Any, path: str) -> bool:
    """Whether there is something at a dotted path."""
    return reduce(lambda found, name: getattr(found, name, None), path.split("."), layer) is not None


def is_parallel(layer: nn.Module, block: Block) -> bool:
    """Whether attention and MLP read the same stream."""
    return bool(getattr(layer, block.parallel)) if isinstance(block.parallel, str) else block.parallel


def returns_tuple(layer: nn.Module) -> bool:
    """Whether the family's body takes a layer's first output out of a tuple: what the layer's code returns last."""
    return _returns_tuple(_dense_class(layer))


@cache
def _returns_tuple(dense: Any) -> bool:
    try:
        source = ast.parse(dedent(getsource(unwrap(dense.forward))))
    except (OSError, TypeError):  # no source at hand: such layers mostly still take `output_attentions`
        return "output_attentions" in signature(dense.forward).parameters
    last = [node.value for node in ast.walk(source) if isinstance(node, ast.Return)][-1]
    return isinstance(last, ast.Tuple) or (isinstance(last, ast.Name) and last.id == "outputs")


def _dense_class(layer: nn.Module) -> Any:
    return getattr(layer, "dense_class", None) or type(layer)


Arguments = tuple[tuple[str, ...], tuple[str, ...] | None, str | None]
_CACHES = (
    "cache",
    "past_key_values",
    "past_key_value",
    "layer_past",
    "cache_params",
)  # names that Transformers gave it


def arguments_of(layer: nn.Module, mixer: str) -> Arguments:
    """How a layer's arguments reach its attention or another mixer: the names of the positional ones beyond the stream,
    the names that the mixer takes (None for any), and the mixer's name of the cache."""
    attention: Any = type(part(layer, mixer)) if mixer else None
    return _arguments(_dense_class(layer), attention)


@cache
def _arguments(dense: Any, attention: Any) -> Arguments:
    given = signature(dense.forward).parameters.values()
    positional = tuple(each.name for each in given if each.kind is Parameter.POSITIONAL_OR_KEYWORD)[2:]
    if attention is None:
        return positional, None, None
    taken = signature(attention.forward).parameters
    any_name = any(each.kind is Parameter.VAR_KEYWORD for each in taken.values())
    return positional, None if any_name else tuple(taken), next((name for name in _CACHES if name in taken), None)


def normalised(layer: nn.Module, norm: str, stream: torch.Tensor) -> torch.Tensor:
    """What a branch reads of the stream (B, S, d): by its norm, or the stream itself where it has none."""
    normed: torch.Tensor = part(layer, norm)(stream) if norm else stream
    return normed


def attention_branch(
    layer: nn.Module, block: Block, normed: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, Any]:
    """What attention adds to the stream (B, S, d), from the normalised stream, and what else it gives: the last of a
    tuple, mostly its weights. The layer's arguments are handed on by name."""
    if not block.attention:
        return normed.new_zeros(()), None
    arguments = getattr(layer, "arguments", None) or arguments_of(layer, block.attention)
    named = dict(zip(arguments[0], args, strict=False)) | kwargs
    mask = named.pop("mamba_attention_mask", None)
    reads, writes, second_writes = [getattr(layer, name) for name in block.multipliers] or [1.0] * 3
    taken = _taken(named, arguments)
    if block.attention in block.residual:
        taken["residual"] = normed.new_zeros(())
    output = part(layer, block.attention)(normed if reads == 1.0 else normed * reads, **taken)
    hidden, rest = (output[0], output[-1]) if isinstance(output, tuple) else (output, None)
    if block.second:
        taken = _taken(named | {"attention_mask": mask}, arguments_of(layer, block.second))
        hidden = hidden * writes + _first(part(layer, block.second)(normed, **taken)) * second_writes
    return _added(layer, block, hidden, block.attention_output_norm, block.dropout[0]), rest


def _taken(named: dict[str, Any], arguments: Arguments) -> dict[str, Any]:
    """A layer's arguments as its attention or other mixer takes them."""
    _, taken, cache_name = arguments
    found = dict(named)
    for name in _CACHES:
        if name in found and name != cache_name and cache_name is not None:
            found[cache_name] = found.pop(name)
    return found if taken is None else {name: value for name, value in found.items() if name in taken}


def mlp_branch(layer: nn.Module, block: Block, normed: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """What the MLP adds to the stream (B, S, d), from the normalised stream; of experts the first `width` numbers."""
    if not block.mlp:
        return normed.new_zeros(())
    hidden = normed
    for path in block.mlp:
        zero = {"residual": normed.new_zeros(())} if path in block.residual else {}
        hidden = _first(part(layer, path)(hidden, **zero))
    hidden = hidden.reshape(*normed.shape[:-1], hidden.shape[-1])  # some experts give (B * S, d)
    for path in block.beside:
        hidden = hidden + _first(part(layer, path)(normed))
    return _added(layer, block, hidden[..., :width], block.mlp_output_norm, block.dropout[1])


def _first(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _added(layer: nn.Module, block: Block, hidden: torch.Tensor, norm: str, dropout: str | None) -> torch.Tensor:
    hidden = normalised(layer, norm, hidden)
    if dropout is not None and layer.training:
        chance = part(layer, dropout)
        hidden = chance(hidden) if isinstance(chance, nn.Module) else nn.functional.dropout(hidden, chance)
    return hidden * getattr(layer, block.scale) if block.scale else hidden
