"""A sliced layer's weights, from the dense layer's and the bases of the stream (SliceGPT, section 3)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slicing.families import Block, Family
from slicing.modeling import SlicedLayer, bias_name, input_axis, matrix, part
from slicing.pca import Basis


class LayerWriter:
    """Rotates the weights of a family's layers in fp64, on a device (the CPU where that has no fp64)."""

    def __init__(self, family: Family, hidden_size: int, device: torch.device) -> None:
        self.family = family
        self.hidden_size = hidden_size
        self.device = torch.device("cpu") if device.type == "mps" else device

    def write(
        self,
        dense: nn.Module,
        sliced: SlicedLayer,
        basis: Basis | None,
        middle: Basis | None,
        following: Basis | None,
    ) -> None:
        """Fill in a sliced layer that reads the stream in `basis`, its MLP in `middle`, and writes in `following`."""
        block = sliced.block
        mlp_basis = basis if sliced.parallel else middle
        self._readers(dense, sliced, block.attention_norm, block.attention_in, basis, 0)
        self._readers(dense, sliced, block.mlp_norm, block.mlp_in, mlp_basis, sliced.mlp_width)
        if block.attention_out:
            self._writer(dense, sliced, block.attention_out, following if sliced.parallel else middle, 0)
        for path in block.mlp_out:
            self._writer(dense, sliced, path, following, sliced.mlp_width if block.experts else 0)
        if sliced.attn_shortcut is not None and basis is not None and middle is not None:
            fill(sliced.attn_shortcut.weight, middle.encoder.T @ basis.decoder)
        if sliced.mlp_shortcut is not None:
            fill(sliced.mlp_shortcut.weight, _shortcut(mlp_basis, following))

    def _readers(
        self,
        dense: nn.Module,
        sliced: SlicedLayer,
        norm_path: str,
        paths: tuple[str, ...],
        basis: Basis | None,
        width: int,
    ) -> None:
        """W diag(norm weight) Q sqrt(D / d): the norm's scale, the rotation and the sliced norm's constant."""
        if basis is None:
            return
        norm: Any = part(dense, norm_path)
        rotation = basis.decoder * math.sqrt(self.hidden_size / basis.width)
        if getattr(norm, "weight", None) is not None:
            rotation = rotation * (self.fp64(norm.weight) + self.family.norm_offset)[:, None]
        shift = getattr(norm, "bias", None)
        if shift is not None and sliced.block.constant and width:
            rotation, shift = torch.cat([rotation, self.fp64(shift)[:, None]], 1), None
        rotation = _padded(rotation, width)
        for path in paths:
            owner, name = matrix(dense, path)
            target, _ = matrix(sliced, path)
            axis = input_axis(owner)
            for weight, filled in _matrices(getattr(owner, name), getattr(target, name)):
                wide = self.fp64(weight)
                fill(filled, wide @ rotation if axis == -1 else rotation.T @ wide)
                if name == "weight" and getattr(target, "bias", None) is not None:
                    bias = torch.zeros_like(rotation[0, 0]) if owner.bias is None else self.fp64(owner.bias)
                    if shift is not None:
                        bias = bias + (wide @ self.fp64(shift) if axis == -1 else self.fp64(shift) @ wide)
                    fill(target.bias, bias)

    def _writer(self, dense: nn.Module, sliced: nn.Module, path: str, basis: Basis | None, width: int) -> None:
        """E^T W, and E^T b where there is a bias."""
        if basis is None:
            return
        encoder = _padded(basis.encoder, width)
        owner, name = matrix(dense, path)
        target, _ = matrix(sliced, path)
        for weight, filled in _matrices(getattr(owner, name), getattr(target, name)):
            wide = self.fp64(weight)
            fill(filled, encoder.T @ wide if input_axis(owner) == -1 else wide @ encoder)
        bias = getattr(owner, bias_name(name), None)
        if bias is not None:
            fill(getattr(target, bias_name(name)), self.fp64(bias) @ encoder)

    def fp64(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight in fp64, where the products run."""
        return weight.detach().to(self.device).double()


def fill(target: torch.Tensor, value: torch.Tensor) -> None:
    """Cast before the copy: on another device fp64 numbers would take four times as long to get there."""
    target.copy_(value.to(target.dtype))


def _shortcut(source: Basis | None, target: Basis | None) -> torch.Tensor:
    """From one basis to another, as a linear layer's weight (d of the target, d of the source); None is the model's."""
    if source is None:
        assert target is not None
        return target.encoder.T
    return source.decoder if target is None else target.encoder.T @ source.decoder


def _padded(basis: torch.Tensor, width: int) -> torch.Tensor:
    return nn.functional.pad(basis, (0, width - basis.shape[1])) if width > basis.shape[1] else basis


def _matrices(dense: torch.Tensor, sliced: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The matrix pairs of a weight: one, or one an expert."""
    return iter([(dense, sliced)] if dense.ndim == 2 else zip(dense, sliced, strict=True))


def gained_biases(layer: nn.Module, block: Block) -> list[str]:
    """The linear layers without a bias that read a norm with one."""
    gained: list[str] = []
    mlp_in = () if block.constant else block.mlp_in
    for norm, paths in ((block.attention_norm, block.attention_in), (block.mlp_norm, mlp_in)):
        if getattr(part(layer, norm), "bias", None) is not None:
            gained += [path for path in paths if part(layer, path).bias is None]
    return gained
