"""The bases of the layers: one pass of the calibration windows over a dense model, projected where it will be sliced.

The pass runs the model's own layers in its own basis on a stream that is projected, x E E^T, where a sliced layer will
read it: the same numbers, up to rounding, as the sliced layers give. So the PCA of a layer sees the signals of the
sliced layers below it, and each layer runs once.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from slicing.batches import check_weights, evaluation_mode
from slicing.calibration import Stream, attention_step, mlp_step, on_device, parallel_step
from slicing.causality import check_causal
from slicing.families import Family, InputError, find_family
from slicing.metric import Metric, damped, gradient_metric, metric_basis, oblique
from slicing.output_norms import unit_outputs
from slicing.parts import find_block, is_parallel, part
from slicing.pca import Basis, Covariance, leading_eigenvectors
from slicing.progress import Progress, counted

METRICS = ("pca", "gradient")
MIDDLE_WEIGHT = 3.0  # of the covariance between attention and MLP, in the one basis of a layer (rotations=1)


@dataclass
class Bases:
    """All eigenvectors of the dense model's signals: L input bases and L middle ones (the same where a layer has one),
    each (D, D), fp32, on the CPU, leading directions first. With a metric they are decoders, its G beside them."""

    rotations: int
    inputs: list[torch.Tensor] = field(default_factory=list)
    middles: list[torch.Tensor] = field(default_factory=list)
    # of output norms, as in Basis: what attention writes in each layer, and the MLP of the layer before
    attention_outputs: list[torch.Tensor | None] = field(default_factory=list)
    mlp_outputs: list[torch.Tensor | None] = field(default_factory=list)
    metric: Metric | None = None
    centred: bool = False


@dataclass(frozen=True)
class BasisFinder:
    """The bases of a model's layers from the covariances of their signals: PCA, or the best ones in a metric.

    widths: L of them; None gives each basis all D directions. centred: of a LayerNorm family.
    """

    hidden_size: int
    widths: list[int] | None
    centred: bool
    metric: Metric | None

    def narrow(self, index: int) -> bool:
        """Whether a layer has a basis of its own; past the last one there is the model's own."""
        if self.widths is None:
            return True
        return index < len(self.widths) and self.widths[index] < self.hidden_size

    def at_input(self, index: int, covariance: torch.Tensor) -> Basis:
        """E_i, from the covariance (D, D) of the layer's input."""
        return self._find(index, covariance, None if self.metric is None else self.metric.inputs[index])

    def at_middle(self, index: int, covariance: torch.Tensor) -> Basis:
        """M_i, from the covariance (D, D) between attention and MLP."""
        return self._find(index, covariance, None if self.metric is None else self.metric.middles[index])

    def of_layer(self, index: int, incoming: torch.Tensor, between: torch.Tensor) -> Basis:
        """The one basis of a layer, from both covariances."""
        incoming, between = incoming / incoming.diagonal().sum(), between / between.diagonal().sum()
        covariance = incoming + MIDDLE_WEIGHT * between
        return self._find(index, covariance, None if self.metric is None else self.metric.mixed(index, MIDDLE_WEIGHT))

    def _find(self, index: int, covariance: torch.Tensor, gradients: torch.Tensor | None) -> Basis:
        width = self.hidden_size if self.widths is None else self.widths[index]
        if gradients is not None:
            metric = damped(gradients, covariance.device, centred=self.centred)
            return metric_basis(covariance, metric, width, centred=self.centred)
        vectors = leading_eigenvectors(covariance, width, centred=self.centred)
        return Basis(vectors, vectors)


@torch.no_grad()
def dense_bases(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    rotations: int = 2,
    metric: str = "pca",
    batch_size: int | None = None,
    device: torch.device | None = None,
    folder: Path | None = None,
    progress: Progress = False,
) -> Bases:
    """One calibration for every width: the bases of the unsliced model's signals.

    folder: where files hold the bases, 4 D^2 bytes each, mapped into memory; None keeps them in memory. The files have
        no name: they are gone with the bases. The other arguments are as in rotate_and_slice.
    """
    family = find_family(model.config)
    check_causal(model)
    check_weights(model)
    found = Bases(rotations, centred=family.layer_norm)
    with evaluation_mode(model):
        gradients = find_metric(metric, model, family, windows, batch_size, device, progress)
        stream = Stream(model, family, windows, batch_size, device)
        finder = BasisFinder(stream.buffer.shape[-1], None, stream.centred, gradients)
        layers = len(part(model, family.layers))
        pairs = find_bases(stream, model, family, rotations, finder)
        for basis, middle in counted(pairs, progress, "bases", layers, "layer"):
            assert basis is not None
            assert middle is not None
            found.inputs.append(_kept(basis.decoder, folder))
            found.middles.append(found.inputs[-1] if middle is basis else _kept(middle.decoder, folder))
            found.attention_outputs.append(_kept_if_any(middle.attention_outputs, folder))
            found.mlp_outputs.append(_kept_if_any(basis.mlp_outputs, folder))
    if gradients is not None:
        middles = [_kept_if_any(matrix, folder) for matrix in gradients.middles]
        found.metric = Metric([_kept(matrix, folder) for matrix in gradients.inputs], middles)
    return found


def leading(bases: Bases, index: int, width: int, device: torch.device) -> tuple[Basis, Basis]:
    """The bases of `width` of a layer, fp64, on a device."""
    metric = bases.metric
    attended, written = bases.attention_outputs[index], bases.mlp_outputs[index]

    def first(decoder: torch.Tensor, gradients: torch.Tensor | None) -> Basis:
        narrow = decoder[:, :width].to(device).double()
        return (
            Basis(narrow, narrow)
            if gradients is None
            else oblique(narrow, damped(gradients, device, centred=bases.centred))
        )

    if bases.middles[index] is bases.inputs[index]:
        both = first(bases.inputs[index], None if metric is None else metric.mixed(index, MIDDLE_WEIGHT))
        both = both._replace(attention_outputs=attended, mlp_outputs=written)
        return both, both
    middle = first(bases.middles[index], None if metric is None else metric.middles[index])
    basis = first(bases.inputs[index], None if metric is None else metric.inputs[index])
    return basis._replace(mlp_outputs=written), middle._replace(attention_outputs=attended)


def find_metric(
    name: str,
    model: PreTrainedModel,
    family: Family,
    windows: torch.Tensor,
    batch_size: int | None,
    device: torch.device | None,
    progress: Progress,
) -> Metric | None:
    """The metric of that name, "pca" (none) or "gradient"."""
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}: choose one of {', '.join(METRICS)}")
    if name == "pca":
        return None
    return gradient_metric(model, family, windows, batch_size, device, progress=progress)


def _kept(matrix: torch.Tensor, folder: Path | None) -> torch.Tensor:
    if folder is None:
        return matrix.float().cpu()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".basis-") as file:
        mapped = torch.from_file(file.name, shared=True, size=matrix.numel(), dtype=torch.float32)
    return mapped.view(matrix.shape).copy_(matrix)


def _kept_if_any(matrix: torch.Tensor | None, folder: Path | None) -> torch.Tensor | None:
    return None if matrix is None else _kept(matrix, folder)


def find_bases(
    stream: Stream, model: PreTrainedModel, family: Family, rotations: int, finder: BasisFinder
) -> Iterator[tuple[Basis | None, Basis | None]]:
    """Run the stream through the layers and give (E_i, M_i) of each, in order; M_i is E_i in a block with one basis.

    Where the finder has no widths nothing is projected.
    """
    layers = part(model, family.layers)
    last = len(layers) - 1
    dense = finder.widths is None
    narrow = finder.narrow

    def projection(basis: Basis | None) -> torch.Tensor | None:
        if basis is None or dense:
            return None
        return (basis.encoder @ basis.decoder.T).to(device=stream.device, dtype=stream.buffer.dtype)

    incoming = stream.run(0, lambda batch, args, kwargs: batch, measure=narrow(0))
    written: Covariance | None = None  # by the MLP of the layer before, where it has an output norm
    for index in range(last + 1):
        layer = on_device(layers[index], stream.device)
        block = find_block(layer, family)
        basis: Basis | None = None
        middle: Basis | None = None
        attended: Covariance | None = None
        rest = mlp_step
        if is_parallel(layer, block):
            if narrow(index):
                basis = middle = finder.at_input(index, incoming.matrix())
            rest = parallel_step
        elif rotations == 1:
            if narrow(index):
                # the unsliced attention gives the middle; in a dense pass that is the step itself
                with unit_outputs(layer, block.attention_output_norm, stream.device) as attended:
                    between = stream.run(index, attention_step(layer, block, None), measure=True, keep=dense)
                basis = middle = finder.of_layer(index, incoming.matrix(), between.matrix())
            if not dense and (index < last or attended is not None):
                with unit_outputs(layer, block.attention_output_norm, stream.device) as attended:
                    stream.run(index, attention_step(layer, block, projection(basis)), measure=False)
        else:
            if narrow(index):
                basis = finder.at_input(index, incoming.matrix())
            if narrow(index) or index < last:
                with unit_outputs(layer, block.attention_output_norm, stream.device) as attended:
                    between = stream.run(index, attention_step(layer, block, projection(basis)), measure=narrow(index))
            if narrow(index):
                middle = finder.at_middle(index, between.matrix())
        one = middle is basis
        if basis is not None:
            basis = basis._replace(mlp_outputs=_sum_of(written), attention_outputs=_sum_of(attended if one else None))
        if middle is not None:
            middle = basis if one else middle._replace(attention_outputs=_sum_of(attended))
        yield basis, middle
        if index < last:  # the last layer writes in the model's own basis: its output is not needed
            with unit_outputs(layer, block.mlp_output_norm, stream.device) as written:
                incoming = stream.run(index, rest(layer, block, projection(middle)), measure=narrow(index + 1))
        del layer  # a copy on the device, where the model is elsewhere: one at a time


def _sum_of(outputs: Covariance | None) -> torch.Tensor | None:
    return None if outputs is None else outputs.matrix()
