"""Bases in the gradient metric: directions of the stream count by what they change in the loss, not by their variance.

G = sum over tokens of g g^T with g = d loss / d x, the dense model's next-token loss. The best rank-d projection in the
metric M = G / mean(diag G) + 0.1 is oblique, x -> Q E^T x. Its decoder Q is made orthonormal, so that the norm of a
sliced stream stays the norm of what it stands for, and the encoder E carries the metric. With M = 1 it is PCA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from slicing.calibration import Head, Stream, head_of, on_device, steps_of
from slicing.families import Family, InputError
from slicing.parts import find_block, is_parallel, part
from slicing.pca import Basis, Covariance, leading_eigenvectors
from slicing.progress import Progress, counted

GRADIENT_WINDOWS = 32  # as good as all of 128 to 1 %, and the inputs of all layers are kept meanwhile
_DAMPING = 0.1  # of the mean of the diagonal


@dataclass
class Metric:
    """G at the input of each of L layers and between its attention and its MLP (None in a parallel block), over its
    trace: (D, D), fp32, where the model is."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    middles: list[torch.Tensor | None] = field(default_factory=list)

    def mixed(self, index: int, weight: float) -> torch.Tensor:
        """Of the one basis of a layer: the input's and `weight` times the middle's."""
        middle = self.middles[index]
        return self.inputs[index] if middle is None else self.inputs[index] + weight * middle


def damped(gradients: torch.Tensor, device: torch.device, *, centred: bool = False) -> torch.Tensor:
    """M = G / mean(diag G) + 0.1 (D, D), fp64. centred: as exactly as G is orthogonal to the ones vector."""
    metric = gradients.to(device).double()
    if centred:
        metric = metric - metric.mean(0)
        metric = metric - metric.mean(1, keepdim=True)
    metric = metric / metric.diagonal().mean()
    metric.diagonal().add_(_DAMPING)
    return metric


def metric_basis(covariance: torch.Tensor, metric: torch.Tensor, count: int, *, centred: bool = False) -> Basis:
    """The basis of rank `count` that loses least of the covariance (D, D) in the metric M (D, D).

    With M = L L^T: V the leading eigenvectors of L^T C L, and the columns of L^-T V span the decoder. centred: both
    matrices are of centred states, and decoder and encoder are orthogonal to the ones vector.
    """
    lower = torch.linalg.cholesky(metric)
    scaled = lower.T @ covariance @ lower
    if centred:  # L^-1 1 carries nothing: below 0 it comes last, also where the states span less than the space
        ones = torch.linalg.solve_triangular(lower, torch.ones_like(lower[:, :1]), upper=False)
        scaled -= scaled.diagonal().mean() / ones.square().sum() * ones @ ones.T
    vectors = leading_eigenvectors(scaled, count)
    decoder = torch.linalg.qr(torch.linalg.solve_triangular(lower.T, vectors, upper=True)).Q
    if centred:
        decoder = decoder - decoder.mean(0)
    return oblique(decoder, metric) if count < len(metric) else Basis(decoder, decoder)


def oblique(decoder: torch.Tensor, metric: torch.Tensor) -> Basis:
    """The basis with this decoder Q whose projection is orthogonal in the metric: E = M Q (Q^T M Q)^-1."""
    weighted = metric @ decoder
    return Basis(decoder, torch.linalg.solve(decoder.T @ weighted, weighted.T).T)


@torch.no_grad()
def gradient_metric(
    model: PreTrainedModel,
    family: Family,
    windows: torch.Tensor,
    batch_size: int | None,
    device: torch.device | None,
    *,
    progress: Progress = False,
) -> Metric:
    """The metric of a dense model, from GRADIENT_WINDOWS of the windows (N, S), evenly chosen.

    The inputs of all layers are kept where the model is; then the loss goes back through one layer at a time, which is
    run again for that. Raises InputError where a layer can't be differentiated or its gradients are not finite.
    """
    count = min(len(windows), GRADIENT_WINDOWS)
    windows = windows[torch.arange(count) * len(windows) // count]
    layers = part(model, family.layers)
    home = next(layers.parameters()).device
    device = torch.device(device or home)
    stream = Stream(model, family, windows, batch_size, device)
    inputs: list[torch.Tensor] = []
    for index, module in enumerate(layers):
        inputs.append(stream.buffer.to(home, copy=True))
        layer = on_device(module, device)
        for step in steps_of(layer, find_block(layer, family)):
            stream.run(index, step, measure=False)
        del layer
    _loss_gradients(head_of(model, family, device), stream.buffer, windows)

    found = Metric()
    for index in counted(range(len(layers) - 1, -1, -1), progress, "gradients", len(layers), "layer"):
        layer = on_device(layers[index], device)
        of_input, of_middle = _through_layer(stream, index, layer, family, inputs.pop())
        del layer
        found.inputs.insert(0, of_input.normalised().float().to(home))
        found.middles.insert(0, None if of_middle is None else of_middle.normalised().float().to(home))
        if not bool(found.inputs[0].isfinite().all()):
            raise InputError(
                f"the loss gradients at layer {index} are 0 or not finite with {model.dtype}: "
                'use the metric "pca", or float32 or bfloat16'
            )
    return found


def _loss_gradients(head: Head, states: torch.Tensor, windows: torch.Tensor) -> None:
    """Put d loss / d x in the place of the last layer's outputs x (N, S, D), one window at a time."""
    for row, ids in zip(states, windows.to(states.device), strict=True):
        hidden = row[None].clone().requires_grad_()
        with _differentiable("the head"):
            logits = head(ids[None], hidden)[0, :-1]
            loss = nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, hidden)
        row.copy_(gradient[0])


def _through_layer(
    stream: Stream, index: int, layer: nn.Module, family: Family, inputs: torch.Tensor
) -> tuple[Covariance, Covariance | None]:
    """Take the gradients in the stream's buffer from a layer's outputs to its inputs (N, S, D): their sums G there and
    in the middle."""
    block = find_block(layer, family)
    steps = steps_of(layer, block)
    sums = [Covariance(inputs.shape[-1], stream.device, centred=stream.centred) for _ in steps]
    batches = zip(torch.split(inputs, stream.batch_size), torch.split(stream.buffer, stream.batch_size), strict=True)
    for states, gradients in batches:
        args, kwargs = stream.calls[len(states)][index]
        points = [states.to(stream.device).requires_grad_()]
        with _differentiable(f"layer {index}"):
            for step in steps:
                points.append(step(points[-1], args, kwargs))
            found = torch.autograd.grad(points.pop(), points, gradients)
        for total, gradient in zip(sums, found, strict=True):
            total.add(gradient)
        gradients.copy_(found[0])
    return sums[0], None if is_parallel(layer, block) else sums[1]


@contextmanager
def _differentiable(what: str) -> Iterator[None]:
    """Gradients are on; what has none ends as an InputError."""
    try:
        with torch.enable_grad():
            yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"the gradient metric needs a model that can be differentiated, and {what} can't be: {str(error)[:200]}; "
            'use the metric "pca"'
        ) from error
