"""The writers of one layer and its shortcut as a linear map, and the least squares that solves it anew.

What is added to the stream is linear in r = (z, s h, s): the sliced stream z (d), what the writers read and their
biases. `decoded` (n, D) is the map of the rotated weights into the model's basis: r -> Q z + sum of s (W h + b).
"""

import torch

from slicing.branches import Branches
from slicing.inner import kept_neurons, taken_over
from slicing.pca import Basis
from slicing.regression import RIDGE, Moments, product, ridge_solve
from slicing.weights import Solved


class Fit:
    """Sums over the calibration's tokens, and what they give."""

    def __init__(self, branches: Branches, source: Basis | None, hidden_size: int, device: torch.device) -> None:
        work = torch.device("cpu") if device.type == "mps" else device  # no fp64 on mps
        eye = torch.eye(hidden_size, dtype=torch.float64, device=work)
        self.width = hidden_size if source is None else source.width
        self.decoded = torch.cat([eye if source is None else source.decoder.T, *(w.weight for w in branches.writers)])
        self.writers = branches.writers
        self.rows = [slice(self.width + w.columns.start, self.width + w.columns.stop) for w in branches.writers]
        self.kept: torch.Tensor | None = None  # columns of what the branches read, where fewer stay
        self.neurons: dict[str, torch.Tensor] = {}
        self._moments = Moments(len(self.decoded), work)
        self._fixed_cross, self._fixed_square = torch.zeros_like(self.decoded), torch.zeros_like(eye)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor | None, fixed: torch.Tensor | None) -> None:
        """Add tokens: inputs r (T, n), the dense stream behind the layer (T, D), what experts add meanwhile (T, D)."""
        self._moments.add(inputs, targets)
        if fixed is not None:
            self._fixed_cross += product(inputs, fixed).to(self._fixed_cross.device)
            self._fixed_square += product(fixed, fixed).to(self._fixed_square.device)

    def end(self) -> None:
        """All tokens are in."""
        self.square, self.cross = self._moments.square(), self._moments.cross()
        del self._moments

    def cut(self, path: str, count: int) -> None:
        """Leave a writer `count` of its inputs."""
        place = [writer.path for writer in self.writers].index(path)
        start, inputs = self.rows[place].start, self.writers[place].inputs
        stop = start + inputs
        neurons = kept_neurons(self.square[start:stop, start:stop], count)
        self.neurons[path] = neurons
        whole = torch.arange(len(self.decoded), device=neurons.device)
        kept = torch.cat((whole[:start], start + neurons, whole[stop:]))
        taken = taken_over(self.square[start:stop, start:stop], self.decoded[start:stop], neurons)
        self.decoded = torch.cat((self.decoded[:start], taken, self.decoded[stop:]))
        self.square = self.square[kept][:, kept]
        self.cross = None if self.cross is None else self.cross[kept]
        self._fixed_cross = self._fixed_cross[kept]
        self.kept = kept[self.width :] - self.width
        gone = inputs - count
        self.rows[place] = slice(start, self.rows[place].stop - gone)
        self.rows[place + 1 :] = [slice(rows.start - gone, rows.stop - gone) for rows in self.rows[place + 1 :]]

    def covariance(self) -> torch.Tensor:
        """Sum of x x^T (D, D) of the working stream x behind the layer, in the model's basis."""
        across = self._fixed_cross.T @ self.decoded
        return self.decoded.T @ self.square @ self.decoded + across + across.T + self._fixed_square

    def solve(self, target: Basis | None, *, shortcut: bool, refit: bool, centred: bool) -> torch.Tensor:
        """The map (n, d') into the target basis: the rotated weights, with `refit` changed so that the result comes
        nearest to the dense stream. shortcut: its part for z is free, else it is the identity. centred: of a LayerNorm
        family, whose mean over D nothing reads."""
        found = self.decoded.clone() if target is None else self.decoded @ target.encoder
        if not shortcut:
            found[: self.width] = torch.eye(self.width, dtype=found.dtype, device=found.device)
        if not refit:
            return found
        assert self.cross is not None
        wanted = self.cross - self._fixed_cross
        error = (wanted if target is None else wanted @ target.encoder) - self.square @ found
        if target is None and centred:
            error -= error.mean(1, keepdim=True)
        free = slice(0 if shortcut else self.width, None)
        if len(error[free]):
            found[free] += ridge_solve(self.square[free, free].clone(), error[free], RIDGE)
        return found

    def note(self, found: torch.Tensor, solved: Solved, shortcut: str | None, *, refit: bool) -> None:
        """Put what a layer does not have from its rotated weights into `solved`."""
        for writer, rows in zip(self.writers, self.rows, strict=True):
            if refit or writer.path in self.neurons:
                solved.writers[writer.path] = found[rows.start : rows.stop - writer.biased].T
                if writer.biased:
                    solved.biases[writer.path] = found[rows.stop - 1]
        solved.neurons |= self.neurons
        if refit and shortcut is not None:
            solved.shortcuts[shortcut] = found[: self.width].T
