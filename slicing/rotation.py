"""Rotate and slice (SliceGPT, Ashkboos et al. 2024, section 3), with a width a layer.

Layer i reads the stream in the basis E_i (D, d_i), the leading eigenvectors of its input's covariance, and its MLP
reads it in M_i (D, d_i). The bases come from one pass over the layers (bases.py); a layer's weights are rotated once,
as soon as the basis of the next layer is known.
"""

import copy
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel

from slicing.bases import Bases, BasisFinder, find_bases, find_metric, leading
from slicing.batches import check_weights, evaluation_mode
from slicing.calibration import Stream, copy_of
from slicing.causality import check_causal
from slicing.check import check_layers, check_names
from slicing.families import Family, InputError, find_family
from slicing.inner import check_inner_widths
from slicing.modeling import SlicedConfig, SlicedForCausalLM, SlicedLayer, count_parameters, slice_modules
from slicing.own_code import of_transformers
from slicing.parts import find_block, part
from slicing.pca import Basis
from slicing.progress import Progress, counted
from slicing.refit import ClosedForm, check_tokens
from slicing.weights import LayerPlan, LayerWriter, fill, gained_biases

_STD = 0.02  # of random weights: activations stay finite


@torch.no_grad()
def rotate_and_slice(
    model: PreTrainedModel,
    windows: torch.Tensor,
    widths: list[int],
    *,
    rotations: int = 2,
    metric: str = "pca",
    refit: bool = False,
    inner_widths: list[int] | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
    progress: Progress = False,
) -> SlicedForCausalLM:
    """Slice every decoder layer of a causal LM to its width.

    model: of a family in families.py; it is left as it was. What slicing does not change (the head, a tied table, a
        layer that keeps its full width) shares storage with it in the sliced model.
    windows: (N, S) calibration token ids.
    widths: L numbers d_i in [1, D] (schedule.slice_widths).
    rotations: 2, a basis before attention and another before the MLP, or 1, one basis a layer.
    metric: "pca", directions of most variance, or "gradient", those that the loss depends on most (metric.py).
    refit: solve the layers' writers and shortcuts anew, so that the stream follows the dense one (refit.py).
    inner_widths: L numbers, how many neurons each MLP keeps, or each routed expert (inner.py); None keeps all.
    batch_size: windows run at once; None chooses by the device.
    device: where the layers run; other than the model's, a layer at a time is copied there.
    progress: show a bar over the layers on stderr, or tell a function how far it is (progress.py).
    Raises InputError for a family that can't be sliced, a model that is not causal, a layer that does not compute what
        its row says (check.py), activations that are not finite, a model that can't be differentiated and too few
        tokens to solve on. The sliced model's `check_seconds` says how long the check took.
    """
    check_weights(model)
    slicer = _Slicer(model, widths, rotations, device, inner_widths)
    model = slicer.model
    check_tokens(model, slicer.family, windows.numel(), widths, slicer.inner, refit=refit)
    with evaluation_mode(model):
        gradients = find_metric(metric, model, slicer.family, windows, batch_size, slicer.device, progress)
        stream = Stream(model, slicer.family, windows, batch_size, slicer.device)
        finder = BasisFinder(model.config.hidden_size, widths, stream.centred, gradients)
        if refit or slicer.inner is not None:
            plans = ClosedForm(model, slicer.family, stream, finder, rotations, refit, slicer.inner).plans()
        else:
            plans = slicer.with_following(find_bases(stream, model, slicer.family, rotations, finder))
        del stream  # the pass lets go of the buffer
        return slicer.slice(plans, progress)


@torch.no_grad()
def slice_with_bases(
    model: PreTrainedModel,
    bases: Bases,
    widths: list[int],
    *,
    device: torch.device | None = None,
    progress: Progress = False,
) -> SlicedForCausalLM:
    """Slice a model with the bases of `dense_bases`: no calibration, the leading d_i directions of each basis."""
    slicer = _Slicer(model, widths, bases.rotations, device)

    def chosen() -> Iterator[tuple[Basis | None, Basis | None]]:
        for index, width in enumerate(widths):
            full = width == model.config.hidden_size
            yield (None, None) if full else leading(bases, index, width, slicer.writer.device)

    return slicer.slice(slicer.with_following(chosen()), progress)


class _Slicer:
    """Builds the sliced model of a dense one and fills in its weights, given each layer's plan."""

    def __init__(
        self,
        model: PreTrainedModel,
        widths: list[int],
        rotations: int,
        device: torch.device | None,
        inner_widths: list[int] | None = None,
    ) -> None:
        self.family = find_family(model.config)
        check_names(model, self.family)
        _is_tied(model)  # it has a head
        check_causal(model)
        self.device = torch.device(device or next(part(model, self.family.layers).parameters()).device)
        self.writer = LayerWriter(self.family, model.config.hidden_size, self.device)
        self.inner = check_inner_widths(model, self.family, inner_widths)
        self.seconds = check_layers(model, self.family, self.device, rotations)
        self.config = _sliced_config(model, self.family, widths, rotations)
        with torch.device("meta"):
            self.empty = SlicedForCausalLM(self.config)
        self.model = of_transformers(model, self.empty)
        self.layers = part(self.model, self.family.layers)

    def slice(self, plans: Iterator[LayerPlan], progress: Progress) -> SlicedForCausalLM:
        """Fill in each layer as its plan comes."""
        self.sliced = _filled(self.empty, self.model)
        self.sliced.check_seconds = self.seconds
        sliced_layers = part(self.sliced, self.family.layers)
        for index, plan in enumerate(counted(plans, progress, "slice", len(self.layers), "layer")):
            if index == 0:
                self._write_embedding(plan.basis, sliced_layers[0])
            self.writer.write(self.layers[index], sliced_layers[index], plan)
        self.sliced.config.inner_widths = self.inner
        return self.sliced

    def with_following(self, pairs: Iterable[tuple[Basis | None, Basis | None]]) -> Iterator[LayerPlan]:
        """Each layer's bases, turned to suit output norms, together with the next one's; the last layer writes in the
        model's own."""
        before: tuple[Basis | None, Basis | None] | None = None
        for index, pair in enumerate(pairs):
            basis, middle = pair
            if index > 0 and basis is not None:
                basis = self.writer.turned(self.layers[index - 1], "mlp", basis)
            if middle is pair[0]:
                middle = basis
            elif middle is not None:
                middle = self.writer.turned(self.layers[index], "attention", middle)
            if before is not None:
                yield LayerPlan(*before, basis)
            before = basis, middle
        assert before is not None
        yield LayerPlan(*before, None)

    def _write_embedding(self, basis: Basis | None, first: SlicedLayer) -> None:
        if basis is None:
            return
        if first.embedding_projection is not None:
            fill(first.embedding_projection.weight, basis.encoder.T)
            return
        for path in self.family.tables:
            dense, sliced = part(self.model, path).weight, part(self.sliced, path).weight
            for rows, target in zip(torch.split(dense, 16384), torch.split(sliced, 16384), strict=True):
                fill(target, self.writer.fp64(rows) @ basis.encoder)


@torch.no_grad()
def check_sliceable(model: PreTrainedModel, *, rotations: int = 2, device: torch.device | None = None) -> float:
    """Raise InputError where a slicing would refuse the model, whatever the widths; `device` is where it would run. The
    seconds that the check of its layers took."""
    widths = [int(model.config.hidden_size)] * int(model.config.num_hidden_layers)
    return _Slicer(model, widths, rotations, device).seconds


def sliced_parameters(
    model: PreTrainedModel, widths: list[int], rotations: int, inner_widths: list[int] | None = None
) -> int:
    """How many parameters the model has once it is sliced to these widths; nothing is calibrated or allocated."""
    config = _sliced_config(model, find_family(model.config), widths, rotations)
    config.inner_widths = inner_widths
    with torch.device("meta"):
        return count_parameters(SlicedForCausalLM(config))


@torch.no_grad()
def random_sliced(
    model: PreTrainedModel,
    widths: list[int],
    *,
    rotations: int = 2,
    inner_widths: list[int] | None = None,
    seed: int = 0,
) -> SlicedForCausalLM:
    """A model with the shapes, dtype and device of the sliced one, and random weights: how fast it is depends on its
    shapes alone, and it needs no calibration. The global random state is left as it was."""
    config = _sliced_config(model, find_family(model.config), widths, rotations)
    config.inner_widths = inner_widths
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with model.device, torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            sliced = SlicedForCausalLM(config)
            for parameter in sliced.parameters():
                if parameter.ndim > 1:  # norms keep their weights of 1
                    parameter.normal_(std=_STD)
    finally:
        torch.set_default_dtype(before)
    sliced.eval()
    return sliced


def _sliced_config(model: PreTrainedModel, family: Family, widths: list[int], rotations: int) -> SlicedConfig:
    gained = (gained_biases(layer, find_block(layer, family)) for layer in part(model, family.layers))
    return SlicedConfig.of(
        model.config,
        widths=list(widths),
        rotations=rotations,
        gained_biases=list(dict.fromkeys(path for paths in gained for path in paths)),
        tie_word_embeddings=_is_tied(model),
        dtype=next(model.parameters()).dtype,
    )


def _filled(sliced: SlicedForCausalLM, model: PreTrainedModel) -> SlicedForCausalLM:
    """A sliced model that shares the dense one's parameters, with empty weights where slicing changes them."""
    for name, module in copy_of(model, known={id(model.config): sliced.config}).named_children():
        setattr(sliced, name, module)
    slice_modules(sliced, sliced.config)
    sliced.generation_config = copy.deepcopy(model.generation_config)
    sliced.eval()
    return sliced


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no head: load it as a causal LM")
    return head.weight is model.get_input_embeddings().weight
