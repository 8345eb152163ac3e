"""PCA of a stream of activations: its uncentred covariance, summed in fp64 in effect, and the leading eigenvectors."""

from typing import NamedTuple

import torch

from slicing.families import InputError

_TOKENS = 4096  # of a block whose products are summed in fp32; the sum of the blocks is fp64
_FP64_TOKENS = 16384
_COLUMNS = {"cuda": 512}  # of a block of the lower triangle: wide enough to fill the device
_CPU_COLUMNS = 128
_DAMPING = 0.01  # of the mean of the diagonal


class Basis(NamedTuple):
    """A narrow basis of the stream: x (D) -> z = E^T x (d) -> Q z, with E^T Q = 1. Of PCA both are the same tensor."""

    decoder: torch.Tensor  # Q (D, d), fp64, orthonormal columns: readers get W Q, and |z| is |Q z|
    encoder: torch.Tensor  # E (D, d), fp64: writers get E^T W
    # sum of n n^T (D, D), n = a / rms(a), of the attention and the MLP that write a here by way of an output norm
    attention_outputs: torch.Tensor | None = None
    mlp_outputs: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """d"""
        return self.decoder.shape[1]


class Covariance:
    """Sum of x x^T over the tokens of a stream of width D.

    `centred` takes each token's mean over D off first: C x with C = I - 11^T / D, the part that a LayerNorm reads.
    """

    def __init__(self, size: int, device: torch.device, *, centred: bool = False) -> None:
        self.centred = centred
        # no fp64 on mps
        self._sum = torch.zeros(size, size, dtype=torch.float64, device="cpu" if device.type == "mps" else device)

    def add(self, states: torch.Tensor) -> None:
        """Add tokens (..., D). bf16 and fp16 products are exact in fp32 and are summed there over blocks of at most
        4,096 tokens; fp32 and fp64 ones are fp64 products, of the lower triangle only."""
        states = states.reshape(-1, states.shape[-1]).to(self._sum.device)
        if states.dtype in (torch.bfloat16, torch.float16):
            for block in torch.split(states, _TOKENS):
                self._add_low_precision(block)
        else:
            for block in torch.split(states, _FP64_TOKENS):
                self._add_lower_triangle(block.double())

    def _add_low_precision(self, block: torch.Tensor) -> None:
        if block.is_cuda:
            self._sum += torch.mm(block.T, block, out_dtype=torch.float32)
        else:
            block = block.float()
            self._sum += block.T @ block

    def _add_lower_triangle(self, block: torch.Tensor) -> None:
        size = self._sum.shape[0]
        step = _COLUMNS.get(self._sum.device.type, _CPU_COLUMNS)
        for start in range(0, size, step):
            columns = block[:, start : start + step]
            self._sum[start:, start : start + step].addmm_(block[:, start:].T, columns)

    def matrix(self) -> torch.Tensor:
        """The sum (D, D), fp64, symmetric; with `centred` C S C."""
        matrix = self._sum.tril() + self._sum.tril(-1).T
        return _centre(_centre(matrix).T) if self.centred else matrix

    def normalised(self) -> torch.Tensor:
        """The sum (D, D) over its trace, fp64."""
        matrix = self.matrix()
        return matrix / matrix.diagonal().sum()


def leading_eigenvectors(covariance: torch.Tensor, count: int, *, centred: bool = False) -> torch.Tensor:
    """The `count` leading eigenvectors of a covariance (D, D), fp64, as the columns of a basis (D, count), fp64.

    With `centred` the covariance is taken as C S C and the basis is orthogonal to the ones vector (for count < D): the
    damping leaves that direction at 0, so it comes last even where the activations span less than the space.
    Raises InputError where the covariance is not finite.
    """
    if not bool(torch.isfinite(covariance).all()):
        raise InputError("the activations are not finite: use --dtype float32 or bfloat16")
    size = covariance.shape[0]
    damping = _DAMPING * covariance.diagonal().mean()
    identity = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    if centred:
        covariance = _centre(_centre(covariance).T)
        identity -= 1 / size
    vectors = torch.linalg.eigh(covariance + damping * identity).eigenvectors
    basis = vectors.flip(1)[:, :count]
    return _centre(basis) if centred else basis


def _centre(matrix: torch.Tensor) -> torch.Tensor:
    return matrix - matrix.mean(0)
