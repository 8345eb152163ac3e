"""Output norms of sliced layers: how large a branch's output is in the model's own basis, told from what it writes.

A branch with an output norm adds g a / rms(a), a = W u (D). Rotated, its writer gives y = E^T diag(g) W u (d), and only
the divisor is missing: one number a token. The best linear guess of n = a / rms(a) from y is A y, with B = diag(g) E,
C = sum n n^T over the calibration tokens, G = B^T C B and A = C B G^+; so rms(a)^2 is taken as |A y|^2 / D times the
constant by which its mean is right, which is exact where diag(g) a lives in the span of E.

A basis may be turned at no cost, so one that a single branch writes in is turned to the eigenvectors of this form: it
is diagonal, d weights w with w y^2. With one basis a layer the MLP's is, and attention keeps the directions that carry
most, |T y|^2 with T (s, d), and the diagonal of the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from slicing.parts import part
from slicing.pca import Basis, Covariance

_CUT = 1e-9  # of the largest eigenvalue of G: what is below is rounding


def magnitude(outputs: torch.Tensor, encoder: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """T (rows, d) and w (d), fp64; outputs: C (D, D), encoder: B (D, d), which has the norm's scale in it."""
    seen = outputs @ encoder
    square = encoder.T @ seen  # G
    values, vectors = torch.linalg.eigh(square)
    kept = values > _CUT * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    white = vectors[:, kept] * values[kept].rsqrt()  # (d, k): y @ white has the covariance 1
    guess = seen @ white
    values, vectors = torch.linalg.eigh(guess.T @ guess)
    values = values.flip(0).clamp_min(0)
    values = values * outputs.diagonal().mean() / values.sum()
    form = (white @ vectors.flip(1)).T * values.sqrt()[:, None]  # (k, d), leading directions first
    rest = form[rows:].square().sum(0)
    seen_of_rest = (rest * square.diagonal()).sum()
    if seen_of_rest > 0:
        rest = rest * values[rows:].sum() / seen_of_rest
    form = form[:rows]
    return nn.functional.pad(form, (0, 0, 0, rows - len(form))), rest


def turned(basis: Basis, outputs: torch.Tensor, scale: torch.Tensor) -> Basis:
    """The basis, turned so that of what a branch with the norm weight `scale` (D) writes in it, T is not needed."""
    form, _ = magnitude(outputs, scale[:, None] * basis.encoder, basis.width)
    turn = torch.linalg.eigh(form.T @ form).eigenvectors
    return basis._replace(decoder=basis.decoder @ turn, encoder=basis.encoder @ turn)


@contextmanager
def unit_outputs(layer: nn.Module, norm: str, device: torch.device) -> Iterator[Covariance | None]:
    """The covariance of n = a / rms(a), a (..., D) being all that a dense layer's output norm is given meanwhile; None
    where the name of the norm is empty."""
    if not norm:
        yield None
        return
    module: Any = part(layer, norm)
    total = Covariance(module.weight.shape[-1], device)

    def note(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        states = args[0].float()
        scale = states.square().mean(-1, keepdim=True).clamp_min(torch.finfo(states.dtype).tiny).rsqrt()
        total.add((states * scale).to(args[0].dtype))

    handle = module.register_forward_pre_hook(note)
    try:
        yield total
    finally:
        handle.remove()
