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
from tqdm import tqdm
from transformers import PreTrainedModel

from slicing.batches import check_weights, evaluation_mode
from slicing.calibration import Stream, attention_step, mlp_step, on_device, parallel_step
from slicing.families import Family, find_family
from slicing.modeling import find_block, is_parallel, part
from slicing.pca import leading_eigenvectors

MIDDLE_WEIGHT = 3.0  # of the covariance between attention and MLP, in the one basis of a layer (rotations=1)

Basis = torch.Tensor | None  # (D, d) fp64 with orthonormal columns; None is the model's own basis, of full width


@dataclass
class Bases:
    """All eigenvectors of the dense model's signals: L input bases and L middle ones (the same where a layer has one),
    each (D, D), fp32, on the CPU, leading directions first."""

    rotations: int
    inputs: list[torch.Tensor] = field(default_factory=list)
    middles: list[torch.Tensor] = field(default_factory=list)


@torch.no_grad()
def dense_bases(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    rotations: int = 2,
    batch_size: int | None = None,
    device: torch.device | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> Bases:
    """One calibration for every width: the bases of the unsliced model's signals.

    folder: where files hold the bases, 4 D^2 bytes each, mapped into memory; None keeps them in memory. The files have
        no name: they are gone with the bases. The other arguments are as in rotate_and_slice.
    """
    family = find_family(model.config)
    check_weights(model)
    found = Bases(rotations)
    with evaluation_mode(model):
        stream = Stream(model, family, windows, batch_size, device)
        pairs = find_bases(stream, model, family, rotations, None)
        layers = len(part(model, family.layers))
        for basis, middle in tqdm(pairs, total=layers, desc="bases", disable=not progress):
            found.inputs.append(_kept(basis, folder))
            found.middles.append(found.inputs[-1] if middle is basis else _kept(middle, folder))
    return found


def _kept(basis: Basis, folder: Path | None) -> torch.Tensor:
    assert basis is not None
    if folder is None:
        return basis.float().cpu()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".basis-") as file:
        mapped = torch.from_file(file.name, shared=True, size=basis.numel(), dtype=torch.float32)
    return mapped.view(basis.shape).copy_(basis)


def find_bases(
    stream: Stream, model: PreTrainedModel, family: Family, rotations: int, widths: list[int] | None
) -> Iterator[tuple[Basis, Basis]]:
    """Run the stream through the layers and give (E_i, M_i) of each, in order; M_i is E_i in a block with one basis.

    widths None: nothing is projected, and each basis has all D directions.
    """
    layers = part(model, family.layers)
    hidden_size, centred = stream.buffer.shape[-1], stream.centred
    last = len(layers) - 1
    dense = widths is None

    def narrow(index: int) -> bool:
        return index <= last and (widths is None or widths[index] < hidden_size)

    def find(covariance: torch.Tensor, index: int) -> torch.Tensor:
        return leading_eigenvectors(covariance, hidden_size if widths is None else widths[index], centred=centred)

    def projection(basis: Basis) -> torch.Tensor | None:
        if basis is None or dense:
            return None
        return (basis @ basis.T).to(device=stream.device, dtype=stream.buffer.dtype)

    incoming = stream.run(0, lambda batch, args, kwargs: batch, measure=narrow(0))
    for index in range(last + 1):
        layer = on_device(layers[index], stream.device)
        block = find_block(layer, family)
        basis: Basis = None
        middle: Basis = None
        if is_parallel(layer, block):
            if narrow(index):
                basis = middle = find(incoming.matrix(), index)
            yield basis, middle
            rest = parallel_step
        elif rotations == 1:
            if narrow(index):
                # the unsliced attention gives the middle; in a dense pass that is the step itself
                between = stream.run(index, attention_step(layer, block, None), measure=True, keep=dense)
                basis = middle = find(incoming.normalised() + MIDDLE_WEIGHT * between.normalised(), index)
            yield basis, middle
            if index < last and not dense:
                stream.run(index, attention_step(layer, block, projection(basis)), measure=False)
            rest = mlp_step
        else:
            if narrow(index):
                basis = find(incoming.matrix(), index)
            if narrow(index) or index < last:
                between = stream.run(index, attention_step(layer, block, projection(basis)), measure=narrow(index))
            if narrow(index):
                middle = find(between.matrix(), index)
            yield basis, middle
            rest = mlp_step
        if index < last:  # the last layer writes in the model's own basis: its output is not needed
            incoming = stream.run(index, rest(layer, block, projection(middle)), measure=narrow(index + 1))
        del layer  # a copy on the device, where the model is elsewhere: one at a time
