"""New widths for a decoder layer's matrices and norms, whose weights are left empty.

A saved folder carries a copy, so this imports nothing else of this project.
"""

import math

import torch
from torch import nn

from .families import Block, Family
from .parts import bias_name, input_axis, matrix, part


def resize(layer: nn.Module, path: str, width: int, writes: bool = False) -> None:
    """Give a matrix an empty weight that reads (or writes) `width` numbers of the stream, and its module the attributes
    to match."""
    _reshape(layer, path, width, writes)
    owner, _ = matrix(layer, path)
    if hasattr(owner, "hidden_dim"):
        owner.hidden_dim = width


def _reshape(layer: nn.Module, path: str, width: int, writes: bool) -> None:
    owner, name = matrix(layer, path)
    weight = getattr(owner, name)
    shape = list(weight.shape)
    axis = input_axis(owner)
    shape[-3 - axis if writes else axis] = width
    setattr(owner, name, nn.Parameter(weight.new_empty(shape)))
    owner._is_hf_initialized = False  # a model made without a checkpoint still has to fill it
    bias = getattr(owner, bias_name(name), None)
    if writes and bias is not None:
        setattr(owner, bias_name(name), nn.Parameter(bias.new_empty(*bias.shape[:-1], width)))
    for attribute in ("out_features", "nf") if writes else ("in_features", "nx"):
        if hasattr(owner, attribute):
            setattr(owner, attribute, width)


def set_widths(layer: nn.Module, block: Block, hidden_size: int, width: int) -> None:
    """Give the modules around experts, which shape by attributes, the width in D's place."""
    for path in (*block.mlp, *block.mlp_in, *block.mlp_out):
        found = part(layer, path)
        module = matrix(layer, path)[0] if isinstance(found, nn.Parameter) else found
        for attribute in ("hidden_dim", "hidden_size", "input_size"):
            if vars(module).get(attribute) == hidden_size:
                setattr(module, attribute, width)


def inner_matrices(layer: nn.Module, block: Block) -> dict[str, tuple[int, list[str]]]:
    """The matrices by which an MLP writes, each with its inner width k and the readers that compute what it reads.

    Of a mixture of experts those of the routed ones: a shared expert keeps its width. A reader has k outputs, or 2 k
    where it holds gate and up. Raises ValueError where no reader of that kind is beside the writer.
    """
    found: dict[str, tuple[int, list[str]]] = {}
    for path in block.mlp_out:
        owner, name = matrix(layer, path)
        if block.experts and getattr(owner, name).ndim < 3:
            continue
        width = getattr(owner, name).shape[input_axis(owner)]
        beside = path.rpartition(".")[0]
        readers = [
            reader
            for reader in block.mlp_in
            if reader.rpartition(".")[0] == beside and outputs_of(layer, reader) in (width, 2 * width)
        ]
        if not readers:
            raise ValueError(f"{type(layer).__name__}: nothing beside {path} has its inner width {width} as outputs")
        found[path] = width, readers
    return found


def outputs_of(layer: nn.Module, path: str) -> int:
    """How many numbers a matrix writes."""
    owner, name = matrix(layer, path)
    size: int = getattr(owner, name).shape[-3 - input_axis(owner)]
    return size


def resize_inner(layer: nn.Module, block: Block, width: int) -> None:
    """Give the MLP's writers `width` inputs and their readers the outputs to match, with empty weights; nothing changes
    where they have it."""
    for path, (own, readers) in inner_matrices(layer, block).items():
        if own == width:
            continue
        for reader in readers:
            _reshape(layer, reader, outputs_of(layer, reader) // own * width, writes=True)
        _reshape(layer, path, width, writes=False)
        owner = part(layer, path.rpartition(".")[0]) if "." in path else layer
        for attribute in ("intermediate_size", "intermediate_dim"):
            if getattr(owner, attribute, None) == own:
                setattr(owner, attribute, width)


def narrow_norm(layer: nn.Module, path: str, family: Family, width: int, hidden_size: int) -> None:
    """Put an RMSNorm of `width` with weight 1 in a norm's place.

    The norm of a sliced stream divides by the original D: the mean of z^2 over d, plus eps D / d, is D / d times what
    it should be, and the constant sqrt(D / d) is in the matrices that read it.
    """
    norm = part(layer, path)
    eps = norm_eps(norm, family) * hidden_size / width
    like = next(layer.parameters())
    if family.layer_norm:
        _put(layer, path, nn.RMSNorm(width, eps=eps, dtype=like.dtype, device=like.device))
    else:
        if getattr(norm, "weight", None) is not None:
            norm.weight = nn.Parameter(like.new_full((width,), 1.0 - family.norm_offset))
        setattr(norm, str(family.norm_eps), eps)


class OutputRMSNorm(nn.Module):
    """An output norm of a branch that writes in a basis: y (..., d) -> y / sqrt(w y^2 + |T y|^2 + eps).

    The dense branch writes a and adds g a / rms(a). Here g and the basis are in the matrix that writes y, and what
    rms(a) is, one number a token, is told by weights w (d). Where the basis is another branch's choice a matrix T
    (rows, d) tells most of it (output_norms.py).
    """

    def __init__(self, width: int, rows: int, eps: float, like: torch.Tensor) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(like.new_empty(width))
        self.magnitude = nn.Linear(width, rows, bias=False, dtype=like.dtype, device=like.device) if rows else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., d) -> (..., d)"""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        square = (hidden.to(dtype).square() * self.weight.to(dtype).clamp_min(0)).sum(-1, keepdim=True)
        if self.magnitude is not None:
            square = square + self.magnitude(hidden).to(dtype).square().sum(-1, keepdim=True)
        return (hidden * torch.rsqrt(square + self.eps)).to(hidden.dtype)


def magnitude_rows(width: int) -> int:
    """Of T, for a width: from a sixteenth on there is nothing to be gained, but in small models."""
    return min(width, max(64, 8 * math.ceil(width / 16 / 8)))


def narrow_output_norm(layer: nn.Module, path: str, family: Family, width: int, rows: int) -> None:
    """Put an `OutputRMSNorm`, whose numbers are empty, in an output norm's place; nothing where the name is empty."""
    if path:
        _put(layer, path, OutputRMSNorm(width, rows, norm_eps(part(layer, path), family), next(layer.parameters())))


def norm_eps(norm: nn.Module, family: Family) -> float:
    """The eps of a dense norm."""
    return float(getattr(norm, family.norm_eps)) if isinstance(family.norm_eps, str) else family.norm_eps


def _put(layer: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(part(layer, owner) if owner else layer, name, module)
