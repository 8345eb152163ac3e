"""The MLP's inner width: which neurons stay, and the writer that makes up for the others.

A neuron is what one row of the readers computes and one column of the writer reads. Those with the highest ridge
leverage stay, as in MoDeGPT's MLP step: what the others compute is nearest to a combination of what these do.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from slicing.families import Block, Family, InputError
from slicing.narrow import inner_matrices
from slicing.parts import find_block, matrix, part
from slicing.regression import ridge_solve

_DAMPING = 1e-2  # of the mean of the diagonal, in the leverage
_RIDGE = 1e-4  # of each neuron's own, where its part is taken over


def inner_sizes(model: PreTrainedModel, family: Family) -> list[int]:
    """The inner width of each decoder layer: of its MLP, or of each of its routed experts; 0 where it has none."""
    sizes = []
    for index, layer in enumerate(part(model, family.layers)):
        block = find_block(layer, family)
        if not block.mlp_out:
            sizes.append(0)
            continue
        try:
            found = {width for width, _ in inner_matrices(layer, block).values()}
        except ValueError as error:
            raise InputError(f"the inner width of layer {index} can't be cut: {error}") from error
        beside = _beside(layer, block, found)
        if beside is not None:
            raise InputError(f"the inner width of layer {index} can't be cut: {beside} goes over its neurons too")
        if len(found) != 1:
            raise InputError(f"the MLP of layer {index} has several inner widths, {sorted(found)}: they can't be cut")
        sizes.append(found.pop())
    return sizes


def _beside(layer: nn.Module, block: Block, sizes: set[int]) -> str | None:
    """A parameter of the MLP that is as long as its inner width, and no reader's or writer's own."""
    own = {
        id(parameter) for path in (*block.mlp_in, *block.mlp_out) for parameter in matrix(layer, path)[0].parameters()
    }
    for path in block.mlp:
        for name, parameter in part(layer, path).named_parameters():
            if id(parameter) not in own and sizes & set(parameter.shape):
                return f"{path}.{name}"
    return None


def check_inner_widths(model: PreTrainedModel, family: Family, widths: list[int] | None) -> list[int] | None:
    """Inner widths that cut something; None where they are the model's own. InputError where they don't fit it."""
    if widths is None:
        return None
    sizes = inner_sizes(model, family)
    if len(widths) != len(sizes):
        raise InputError(f"got {len(widths)} inner widths for {len(sizes)} layers: give one a layer")
    for index, (width, size) in enumerate(zip(widths, sizes, strict=True)):
        if size == 0 and width != 0:
            raise InputError(f"the inner width of layer {index} is {width}: it must be 0, since it has no MLP")
        if not min(1, size) <= width <= size:
            raise InputError(
                f"the inner width of layer {index} is {width}: it must lie in [1, {size}], the model's own"
            )
    return list(widths) if list(widths) != sizes else None


def leverage(square: torch.Tensor) -> torch.Tensor:
    """Ridge leverage [C (C + l)^-1]_jj of each of k inputs with C = sum h h^T (k, k), l = 0.01 mean(diag C)."""
    damping = _DAMPING * square.diagonal().mean()
    if damping == 0:
        return torch.zeros_like(square.diagonal())
    damped = square.clone()
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise InputError("the neurons can't be ranked: the activations are not finite, use --dtype float32 or bfloat16")
    del damped
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)  # (C + l)^-1 = L^-T L^-1
    found: torch.Tensor = 1 - damping * inverse.square_().sum(0)
    return found


def kept_neurons(square: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` neurons of the highest leverage, rising."""
    return leverage(square).topk(count).indices.sort().values


def taken_over(square: torch.Tensor, writer: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    """The writer (n, D) of all neurons as one of the kept ones, (k, D): each has its own part and, by least squares,
    its share of what the others wrote, W_S + (C_SS)^-1 C_SR W_R."""
    gone = torch.ones(len(square), dtype=torch.bool, device=square.device)
    gone[neurons] = False
    rows = square[neurons]
    shares = ridge_solve(rows[:, neurons], rows[:, gone] @ writer[gone], _RIDGE)
    return writer[neurons] + shares
