"""A sliced layer's weights, from the dense layer's and the bases of the stream (SliceGPT, section 3)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from slicing.families import Block, Family
from slicing.modeling import SlicedLayer
from slicing.narrow import inner_matrices, outputs_of, resize_inner
from slicing.output_norms import magnitude, turned
from slicing.parts import bias_name, find_block, input_axis, matrix, part
from slicing.pca import Basis


@dataclass
class Solved:
    """What a layer has in place of its rotated weights, fp64, by path: the writers (outputs, inputs), of experts
    (experts, outputs, inputs), their biases, the shortcuts, and which neurons of a writer's inputs stay, (k) or
    (experts, k)."""

    writers: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    shortcuts: dict[str, torch.Tensor] = field(default_factory=dict)
    neurons: dict[str, torch.Tensor] = field(default_factory=dict)


class LayerPlan(NamedTuple):
    """What a sliced layer is made of: the bases in which it and its MLP read the stream, the one in which it writes
    (None is the model's own), and what was solved."""

    basis: Basis | None
    middle: Basis | None
    following: Basis | None
    solved: Solved | None = None


class LayerWriter:
    """Rotates the weights of a family's layers in fp64, on a device (the CPU where that has no fp64)."""

    def __init__(self, family: Family, hidden_size: int, device: torch.device) -> None:
        self.family = family
        self.hidden_size = hidden_size
        self.device = torch.device("cpu") if device.type == "mps" else device

    def write(self, dense: nn.Module, sliced: SlicedLayer, plan: LayerPlan) -> None:
        """Fill in a sliced layer; one that will have fewer neurons has its whole inner width until now."""
        block = sliced.block
        basis, middle, following, _ = plan
        solved = plan.solved or Solved()
        mlp_basis = basis if sliced.parallel else middle
        self._readers(dense, sliced, block.attention_norm, block.attention_in, basis, 0)
        self._readers(dense, sliced, block.mlp_norm, block.mlp_in, mlp_basis, sliced.mlp_width)
        for path, neurons in solved.neurons.items():
            keep_neurons(sliced, block, path, neurons)
        for path in block.writers():
            attention = path in block.attention_outs() and not sliced.parallel
            padded = sliced.mlp_width if block.experts and path in block.mlp_out else 0
            target = self._scaled(dense, block.output_norm(path), middle if attention else following)
            self._writer(dense, sliced, path, target, padded, solved)
        if middle is not None:
            self._output_norm(dense, sliced, block.attention_output_norm, middle, middle.attention_outputs)
        if following is not None:
            self._output_norm(dense, sliced, block.mlp_output_norm, following, following.mlp_outputs)
        if sliced.attn_shortcut is not None and basis is not None and middle is not None:
            shortcut = solved.shortcuts.get("attn_shortcut")
            fill(sliced.attn_shortcut.weight, middle.encoder.T @ basis.decoder if shortcut is None else shortcut)
        if sliced.mlp_shortcut is not None:
            shortcut = solved.shortcuts.get("mlp_shortcut")
            fill(sliced.mlp_shortcut.weight, _shortcut(mlp_basis, following) if shortcut is None else shortcut)

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
        norm: Any = part(dense, norm_path) if norm_path else None
        rotation = basis.decoder * (math.sqrt(self.hidden_size / basis.width) if norm_path else 1.0)
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

    def turned(self, dense: nn.Module, branch: str, basis: Basis) -> Basis:
        """A basis, turned to suit the output norm of the branch ("attention" or "mlp") of a dense layer that writes in
        it, where there is one."""
        outputs: torch.Tensor | None = getattr(basis, f"{branch}_outputs")
        if outputs is None:
            return basis
        norm = getattr(find_block(dense, self.family), f"{branch}_output_norm")
        return turned(basis, self.fp64(outputs), self._scale(dense, norm))

    def _scale(self, dense: nn.Module, norm_path: str) -> torch.Tensor:
        weight: torch.Tensor = part(dense, norm_path).weight
        return self.fp64(weight) + self.family.norm_offset

    def _scaled(self, dense: nn.Module, norm_path: str, basis: Basis | None) -> Basis | None:
        """The basis with diag(norm weight) E for an encoder, where there is an output norm."""
        if basis is None or not norm_path:
            return basis
        return basis._replace(encoder=self._scale(dense, norm_path)[:, None] * basis.encoder)

    def _output_norm(
        self, dense: nn.Module, sliced: nn.Module, norm_path: str, basis: Basis, outputs: torch.Tensor | None
    ) -> None:
        if not norm_path:
            return
        assert outputs is not None
        target = part(sliced, norm_path)
        rows = 0 if target.magnitude is None else target.magnitude.out_features
        encoder = self._scale(dense, norm_path)[:, None] * basis.encoder
        form, rest = magnitude(self.fp64(outputs), encoder, rows)
        if rows:
            fill(target.magnitude.weight, form)
        fill(target.weight, rest)

    def _writer(
        self, dense: nn.Module, sliced: nn.Module, path: str, basis: Basis | None, width: int, solved: Solved
    ) -> None:
        """E^T W, and E^T b where there is a bias; or what was solved in their place."""
        owner, name = matrix(dense, path)
        target, _ = matrix(sliced, path)
        if path in solved.writers:
            value = _padded(solved.writers[path].mT, width)  # (inputs, outputs)
            _replace(target, name, value.mT if input_axis(owner) == -1 else value)
        if path in solved.biases:
            _replace(target, bias_name(name), _padded(solved.biases[path], width))
        if basis is None:
            return
        encoder = _padded(basis.encoder, width)
        if path not in solved.writers:
            for weight, filled in _matrices(getattr(owner, name), getattr(target, name)):
                wide = self.fp64(weight)
                fill(filled, encoder.T @ wide if input_axis(owner) == -1 else wide @ encoder)
        bias = getattr(owner, bias_name(name), None)
        if bias is not None and path not in solved.biases:
            fill(getattr(target, bias_name(name)), self.fp64(bias) @ encoder)

    def fp64(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight in fp64, where the products run."""
        return weight.detach().to(self.device).double()


def keep_neurons(layer: nn.Module, block: Block, writer: str, neurons: torch.Tensor) -> None:
    """Leave an MLP only these neurons, (k) or (experts, k): its readers lose rows, its writer is left empty."""
    width, readers = inner_matrices(layer, block)[writer]
    whole = {reader: (outputs_of(layer, reader), *_weight_and_bias(layer, reader)) for reader in readers}
    resize_inner(layer, block, neurons.shape[-1])
    for reader, (outputs, weight, bias) in whole.items():
        owner, _ = matrix(layer, reader)
        rows = rows_of(neurons, width, outputs, bool(getattr(owner, "is_concatenated", True))).to(weight.device)
        target, target_bias = _weight_and_bias(layer, reader)
        outer = -3 - input_axis(owner)
        target.copy_(weight.gather(outer, rows.unsqueeze(input_axis(owner)).expand(target.shape)))
        if bias is not None and target_bias is not None:
            target_bias.copy_(bias.gather(-1, rows))


def _weight_and_bias(layer: nn.Module, path: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    owner, name = matrix(layer, path)
    return getattr(owner, name), getattr(owner, bias_name(name), None)


def rows_of(neurons: torch.Tensor, width: int, outputs: int, concatenated: bool) -> torch.Tensor:
    """The rows of a reader that compute these neurons (..., k) of `width`: of one that holds gate and up, both halves,
    or pairs where these alternate."""
    if outputs == width:
        return neurons
    if concatenated:
        return torch.cat((neurons, neurons + width), dim=-1)
    return torch.stack((2 * neurons, 2 * neurons + 1), dim=-1).flatten(-2)


def _replace(owner: nn.Module, name: str, value: torch.Tensor) -> None:
    """A new parameter: that of a layer of full width is the dense model's own."""
    like = getattr(owner, name)
    setattr(owner, name, nn.Parameter(value.to(like.dtype).to(like.device).contiguous()))


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
    return nn.functional.pad(basis, (0, width - basis.shape[-1])) if width > basis.shape[-1] else basis


def _matrices(dense: torch.Tensor, sliced: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The matrix pairs of a weight: one, or one an expert."""
    return iter([(dense, sliced)] if dense.ndim == 2 else zip(dense, sliced, strict=True))


def gained_biases(layer: nn.Module, block: Block) -> list[str]:
    """The linear layers without a bias that read a norm with one."""
    gained: list[str] = []
    mlp_in = () if block.constant else block.mlp_in
    for norm, paths in ((block.attention_norm, block.attention_in), (block.mlp_norm, mlp_in)):
        if norm and getattr(part(layer, norm), "bias", None) is not None:
            gained += [path for path in paths if part(layer, path).bias is None]
    return gained
