"""Rotate and slice (SliceGPT, Ashkboos et al. 2024, section 3), with a width a layer.

Layer i reads the stream in the basis E_i (D, d_i), the leading eigenvectors of its input's covariance, and its MLP
reads it in M_i (D, d_i). The bases come from one pass over the layers (bases.py); a layer's weights are rotated once,
as soon as the basis of the next layer is known.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from slicing.bases import Bases, Basis, find_bases
from slicing.batches import evaluation_mode
from slicing.calibration import Stream, copy_of
from slicing.families import Block, Family, InputError, find_family
from slicing.modeling import (
    SlicedConfig,
    SlicedForCausalLM,
    SlicedLayer,
    count_parameters,
    find_block,
    input_axis,
    matrix,
    part,
    slice_modules,
)


@torch.no_grad()
def rotate_and_slice(
    model: PreTrainedModel,
    windows: torch.Tensor,
    widths: list[int],
    *,
    rotations: int = 2,
    batch_size: int | None = None,
    device: torch.device | None = None,
    progress: bool = False,
) -> SlicedForCausalLM:
    """Slice every decoder layer of a causal LM to its width.

    model: of a family in families.py; it is left as it was. What slicing does not change (the head, a tied table, a
        layer that keeps its full width) shares storage with it in the sliced model.
    windows: (N, S) calibration token ids.
    widths: L numbers d_i in [1, D] (schedule.slice_widths).
    rotations: 2, a basis before attention and another before the MLP, or 1, one basis a layer.
    batch_size: windows run at once; None chooses by the device.
    device: where the layers run; other than the model's, a layer at a time is copied there.
    progress: show a bar over the layers on stderr.
    Raises InputError for a family that can't be sliced and for activations that are not finite.
    """
    slicer = _Slicer(model, widths, rotations, device)
    with evaluation_mode(model):
        stream = Stream(model, slicer.family, windows, batch_size, slicer.device)
        return slicer.slice(find_bases(stream, model, slicer.family, rotations, widths), progress)


@torch.no_grad()
def slice_with_bases(
    model: PreTrainedModel,
    bases: Bases,
    widths: list[int],
    *,
    device: torch.device | None = None,
    progress: bool = False,
) -> SlicedForCausalLM:
    """Slice a model with the bases of `dense_bases`: no calibration, the leading d_i directions of each basis."""
    slicer = _Slicer(model, widths, bases.rotations, device)
    hidden_size = model.config.hidden_size

    def leading(basis: torch.Tensor, width: int) -> Basis:
        if width == hidden_size:
            return None
        return basis[:, :width].to(slicer.work_device).double()

    def chosen() -> Iterator[tuple[Basis, Basis]]:
        for basis, middle, width in zip(bases.inputs, bases.middles, widths, strict=True):
            narrow = leading(basis, width)
            yield narrow, narrow if middle is basis else leading(middle, width)

    return slicer.slice(chosen(), progress)


class _Slicer:
    """Builds the sliced model of a dense one and fills in its weights, given the bases."""

    def __init__(self, model: PreTrainedModel, widths: list[int], rotations: int, device: torch.device | None) -> None:
        self.family = find_family(model.config)
        self.model = model
        self.rotations = rotations
        self.layers = part(model, self.family.layers)
        self.hidden_size: int = model.config.hidden_size
        self.device = torch.device(device or next(self.layers.parameters()).device)
        self.work_device = torch.device("cpu") if self.device.type == "mps" else self.device  # no fp64 on mps
        self.sliced = _skeleton(model, self.family, widths, rotations)

    def slice(self, bases: Iterator[tuple[Basis, Basis]], progress: bool) -> SlicedForCausalLM:
        """Fill in each layer as soon as the basis of the next one is known."""
        sliced_layers = part(self.sliced.model, self.family.layers)
        previous: tuple[Basis, Basis] | None = None
        for index, pair in enumerate(tqdm(bases, total=len(self.layers), desc="slice", disable=not progress)):
            if previous is None:
                self._write_embedding(pair[0], sliced_layers[0])
            else:
                self._write_layer(index - 1, sliced_layers[index - 1], *previous, pair[0])
            previous = pair
        assert previous is not None
        self._write_layer(len(self.layers) - 1, sliced_layers[-1], *previous, None)
        return self.sliced

    def _write_embedding(self, basis: Basis, first: SlicedLayer) -> None:
        if basis is None:
            return
        if first.embedding_projection is not None:
            _fill(first.embedding_projection.weight, basis.T)
            return
        for path in self.family.tables:
            dense, sliced = part(self.model, path).weight, part(self.sliced.model, path).weight
            for rows, target in zip(torch.split(dense, 16384), torch.split(sliced, 16384), strict=True):
                _fill(target, self._fp64(rows) @ basis)

    def _write_layer(self, index: int, sliced: SlicedLayer, basis: Basis, middle: Basis, following: Basis) -> None:
        dense, block = self.layers[index], sliced.block
        mlp_basis = basis if sliced.parallel else middle
        self._write_readers(dense, sliced, block.attention_norm, block.attention_in, basis, 0)
        self._write_readers(dense, sliced, block.mlp_norm, block.mlp_in, mlp_basis, sliced.mlp_width)
        self._write_writer(dense, sliced, block.attention_out, following if sliced.parallel else middle, 0)
        for path in block.mlp_out:
            self._write_writer(dense, sliced, path, following, sliced.mlp_width if block.experts else 0)
        if sliced.attn_shortcut is not None and basis is not None and middle is not None:
            _fill(sliced.attn_shortcut.weight, middle.T @ basis)
        if sliced.mlp_shortcut is not None:
            _fill(sliced.mlp_shortcut.weight, _shortcut(mlp_basis, following))

    def _write_readers(
        self, dense: nn.Module, sliced: nn.Module, norm_path: str, paths: tuple[str, ...], basis: Basis, width: int
    ) -> None:
        """W diag(norm weight) E sqrt(D / d): the norm's scale, the rotation and the sliced norm's constant."""
        if basis is None:
            return
        norm: Any = part(dense, norm_path)
        rotation = basis * math.sqrt(self.hidden_size / basis.shape[1])
        if getattr(norm, "weight", None) is not None:
            rotation = rotation * (self._fp64(norm.weight) + self.family.norm_offset)[:, None]
        rotation = _padded(rotation, width)
        shift = getattr(norm, "bias", None)
        for path in paths:
            owner, name = matrix(dense, path)
            target, _ = matrix(sliced, path)
            axis = input_axis(owner)
            for weight, filled in _matrices(getattr(owner, name), getattr(target, name)):
                wide = self._fp64(weight)
                _fill(filled, wide @ rotation if axis == -1 else rotation.T @ wide)
                if getattr(target, "bias", None) is not None:
                    bias = torch.zeros_like(rotation[0, 0]) if owner.bias is None else self._fp64(owner.bias)
                    if shift is not None:
                        bias = bias + (wide @ self._fp64(shift) if axis == -1 else self._fp64(shift) @ wide)
                    _fill(target.bias, bias)

    def _write_writer(self, dense: nn.Module, sliced: nn.Module, path: str, basis: Basis, width: int) -> None:
        """E^T W, and E^T b where there is a bias."""
        if basis is None:
            return
        basis = _padded(basis, width)
        owner, name = matrix(dense, path)
        target, _ = matrix(sliced, path)
        for weight, filled in _matrices(getattr(owner, name), getattr(target, name)):
            wide = self._fp64(weight)
            _fill(filled, basis.T @ wide if input_axis(owner) == -1 else wide @ basis)
        if getattr(owner, "bias", None) is not None:
            _fill(target.bias, basis.T @ self._fp64(owner.bias))

    def _fp64(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().to(self.work_device).double()


def _fill(target: torch.Tensor, value: torch.Tensor) -> None:
    """Cast before the copy: on another device fp64 numbers would take four times as long to get there."""
    target.copy_(value.to(target.dtype))


def _shortcut(source: Basis, target: Basis) -> torch.Tensor:
    """E^T F as a linear layer's weight (d of F, d of E); None is the identity."""
    if source is None or target is None:
        basis = target.T if source is None and target is not None else source
        assert basis is not None
        return basis
    return target.T @ source


def _padded(basis: torch.Tensor, width: int) -> torch.Tensor:
    return nn.functional.pad(basis, (0, width - basis.shape[1])) if width > basis.shape[1] else basis


def _matrices(dense: torch.Tensor, sliced: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The matrix pairs of a weight: one, or one an expert."""
    return iter([(dense, sliced)] if dense.ndim == 2 else zip(dense, sliced, strict=True))


def sliced_parameters(model: PreTrainedModel, widths: list[int], rotations: int) -> int:
    """How many parameters the model has once it is sliced to these widths; nothing is calibrated or allocated."""
    with torch.device("meta"):
        return count_parameters(SlicedForCausalLM(_sliced_config(model, find_family(model.config), widths, rotations)))


def _sliced_config(model: PreTrainedModel, family: Family, widths: list[int], rotations: int) -> SlicedConfig:
    text_config = copy.deepcopy(model.config)
    text_config.tie_word_embeddings = _is_tied(model)
    first = part(model, family.layers)[0]
    config = SlicedConfig(
        text_config=text_config,
        widths=list(widths),
        rotations=rotations,
        gained_biases=_gained_biases(first, find_block(first, family)),
        dtype=next(model.parameters()).dtype,
    )
    for choice in ("_attn_implementation", "_experts_implementation"):  # a new outer config resets them
        setattr(text_config, choice, getattr(model.config, choice))
    return config


def _skeleton(model: PreTrainedModel, family: Family, widths: list[int], rotations: int) -> SlicedForCausalLM:
    """A sliced model that shares the dense one's parameters, with empty weights where slicing changes them."""
    config = _sliced_config(model, family, widths, rotations)
    with torch.device("meta"):
        sliced = SlicedForCausalLM(config)
    sliced.model = copy_of(model, known={id(model.config): config.text_config})
    slice_modules(sliced.model, config)
    sliced.generation_config = copy.deepcopy(model.generation_config)
    sliced.eval()
    return sliced


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no head: load it as a causal LM")
    return head.weight is model.get_input_embeddings().weight


def _gained_biases(layer: nn.Module, block: Block) -> list[str]:
    """The linear layers without a bias that read a norm with one."""
    gained: list[str] = []
    for norm, paths in ((block.attention_norm, block.attention_in), (block.mlp_norm, block.mlp_in)):
        if getattr(part(layer, norm), "bias", None) is not None:
            gained += [path for path in paths if part(layer, path).bias is None]
    return gained
