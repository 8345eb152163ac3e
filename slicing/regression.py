"""Least squares over a stream of tokens: sums of products, in fp64 in effect, and the ridge regression on them."""

import torch

from slicing.families import InputError

TOKENS_PER_UNKNOWN = 3  # at the least; results go on improving far beyond
RIDGE = 1e-3  # of each input's own second moment, in the change of a writer
_TOKENS = 4096  # of a block whose products are summed in fp32, as of a covariance
_FP64_TOKENS = 16384
_BLOCKS = 8  # of columns, where only the lower triangle of a large product is made


class Moments:
    """Sums over tokens of r r^T (n, n) and, of a target y (D), of r y^T (n, D), fp64."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.device = device
        self._square = torch.zeros(inputs, inputs, dtype=torch.float64, device=self.device)
        self._cross: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor, targets: torch.Tensor | None) -> None:
        """Add tokens: inputs (T, n), targets (T, D). bf16 and fp16 products are exact in fp32 and are summed there over
        blocks of at most 4,096 tokens; those of fp32 and fp64 are fp64 products."""
        low = inputs.dtype in (torch.bfloat16, torch.float16)
        for block in torch.split(inputs.to(self.device), _TOKENS if low else _FP64_TOKENS):
            self._add_square(block if low else block.double())
        if targets is None:
            return
        if self._cross is None:
            self._cross = self._square.new_zeros(inputs.shape[1], targets.shape[1])
        pairs = zip(*(torch.split(part.to(self.device), _TOKENS) for part in (inputs, targets)), strict=True)
        for block, target in pairs:
            self._cross += product(block, target)

    def _add_square(self, block: torch.Tensor) -> None:
        size = len(self._square)
        step = -(-size // _BLOCKS)
        for start in range(0, size, step):
            columns = slice(start, start + step)
            self._square[start:, columns] += product(block[:, start:], block[:, columns])

    def square(self) -> torch.Tensor:
        """Sum of r r^T, the memory that it was summed in."""
        size = len(self._square)
        step = -(-size // _BLOCKS)
        for start in range(step, size, step):
            columns = slice(start - step, start)
            self._square[columns, start:] = self._square[start:, columns].T
        return self._square

    def cross(self) -> torch.Tensor | None:
        """Sum of r y^T; None without targets."""
        return self._cross


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of l r^T: (T, n), (T, m) -> (n, m), fp32 where both are of 16 bits, else fp64."""
    if left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16):
        if left.is_cuda:
            return torch.mm(left.T, right, out_dtype=torch.float32)
        return left.float().T @ right.float()
    return left.double().T @ right.double()


def ridge_solve(square: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """(A + ridge diag A)^-1 B of A (n, n) and B (n, m), fp64. The ridge goes by each input's own size: one by the mean
    would wipe out small directions beside the few huge ones that a stream has. A is overwritten."""
    scale = square.diagonal().clamp_min(1e-12 * square.diagonal().max()).rsqrt()
    scale = scale.nan_to_num(posinf=0.0)  # all inputs are 0
    square *= scale
    square *= scale[:, None]
    square.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(square)
    if bool(failed):
        raise InputError("the writers can't be solved: the activations are not finite, use --dtype float32 or bfloat16")
    return torch.cholesky_solve(cross * scale[:, None], lower) * scale[:, None]
