"""The routed experts of a layer on the calibration's tokens: which of their neurons stay, and their writers.

Each expert is solved by itself, on the tokens that are routed to it. What its writer reads is found by running the
family's own experts with unit vectors for a writer.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slicing.branches import Routed
from slicing.calibration import copy_of
from slicing.families import Block
from slicing.inner import kept_neurons, taken_over
from slicing.parts import bias_name, input_axis, matrix, part
from slicing.pca import Basis
from slicing.regression import RIDGE, TOKENS_PER_UNKNOWN, Moments, ridge_solve
from slicing.weights import Solved, keep_neurons


class Experts:
    """The experts of one dense layer with the writer at `path`, and the calls that they get, a batch each."""

    def __init__(self, layer: nn.Module, block: Block, path: str, routed: list[Routed], device: torch.device) -> None:
        self.layer, self.block, self.path, self.routed = copy_of(layer), block, path, routed
        self.device = torch.device("cpu") if device.type == "mps" else device  # no fp64 on mps
        owner, self.name = matrix(self.layer, path)
        self.axis = input_axis(owner)
        weights = getattr(owner, self.name).detach().to(self.device)
        self.writers = [(weight.T if self.axis == -1 else weight).double() for weight in weights]  # (k, D) each
        self.neurons: torch.Tensor | None = None
        self.solved = False

    @property
    def module(self) -> nn.Module:
        """The experts, with the neurons that they have left; they write in the model's basis."""
        found: nn.Module = part(self.layer, self.path.rpartition(".")[0])
        return found

    def cut(self, count: int) -> None:
        """Leave each expert `count` of its neurons: those of the highest leverage on its own tokens."""
        kept = []
        for expert, writer in enumerate(self.writers):
            moments = Moments(len(writer), self.device)
            for _, _, read in self._reads(expert):
                moments.add(read, None)
            square = moments.square()
            kept.append(kept_neurons(square, count))
            enough = self._tokens(expert) >= TOKENS_PER_UNKNOWN * count
            self.writers[expert] = taken_over(square, writer, kept[-1]) if enough else writer[kept[-1]]
        self.neurons = torch.stack(kept)
        keep_neurons(self.layer, self.block, self.path, self.neurons)
        target = getattr(self.module, self.name)
        for weight, writer in zip(target, self.writers, strict=True):
            weight.copy_(writer.T if self.axis == -1 else writer)

    def refit(
        self, dense: list[torch.Tensor], sliced: list[torch.Tensor], target: Basis | None, *, centred: bool
    ) -> None:
        """Solve one writer after the other on what is left of the error of the sliced stream (B, S, d'), which follows.

        An expert with too few tokens keeps its writer. From here on the writers are in the target basis.
        """
        encoder = None if target is None else target.encoder
        self.writers = [writer if encoder is None else writer @ encoder for writer in self.writers]
        for expert, writer in enumerate(self.writers):
            if self._tokens(expert) < TOKENS_PER_UNKNOWN * len(writer):
                continue
            moments = Moments(len(writer), self.device)
            for place, rows, read in self._reads(expert):
                wanted = dense[place].flatten(0, 1)[rows]
                wanted = wanted if encoder is None else wanted @ encoder.to(wanted)
                error = wanted - sliced[place].flatten(0, 1)[rows]
                moments.add(read, error - error.mean(1, keepdim=True) if target is None and centred else error)
            cross = moments.cross()
            assert cross is not None
            change = ridge_solve(moments.square(), cross, RIDGE)
            for place, rows, read in self._reads(expert):
                sliced[place].flatten(0, 1).index_add_(0, rows, read @ change.to(read))
            self.writers[expert] = writer + change
        self.solved = True

    def note(self, target: Basis | None, solved: Solved) -> None:
        """Put what the experts do not have from their rotated weights into `solved`."""
        if self.solved or self.neurons is not None:
            if not self.solved and target is not None:
                self.writers = [writer @ target.encoder for writer in self.writers]
            solved.writers[self.path] = torch.stack(self.writers).mT
        if self.neurons is not None:
            solved.neurons[self.path] = self.neurons

    def _tokens(self, expert: int) -> int:
        return sum(int((batch.experts == expert).sum()) for batch in self.routed)

    def _reads(self, expert: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Batch by batch: its number, the rows of the expert's tokens, and what its writer reads of them, times the
        routing weight (t, k)."""
        units = self._with_unit_writers(expert)
        for place, batch in enumerate(self.routed):
            rows, slots = torch.where(batch.experts == expert)
            if len(rows):
                index, weights = torch.zeros_like(rows)[:, None], batch.weights[rows, slots, None]
                hidden = batch.hidden[rows]
                yield place, rows, torch.cat([unit(hidden, index, weights)[:, :size] for unit, size in units], dim=1)

    def _with_unit_writers(self, expert: int) -> list[tuple[nn.Module, int]]:
        """One expert alone whose writer hands on its neurons, at most as many as the stream is wide; and how many."""
        found = []
        whole = getattr(self.module, self.name)
        inputs, outputs = whole.shape[self.axis], whole.shape[-3 - self.axis]
        for start in range(0, inputs, outputs):
            size = min(outputs, inputs - start)
            writer = whole.new_zeros(outputs, inputs)
            writer[torch.arange(size), torch.arange(start, start + size)] = 1
            unit: Any = copy.copy(self.module)
            unit._parameters = {
                name: nn.Parameter(parameter[expert : expert + 1])
                for name, parameter in self.module.named_parameters(recurse=False)
            }
            bias = unit._parameters.get(bias_name(self.name))
            if bias is not None:
                unit._parameters[bias_name(self.name)] = nn.Parameter(torch.zeros_like(bias))
            unit._parameters[self.name] = nn.Parameter((writer if self.axis == -1 else writer.T.contiguous())[None])
            unit.num_experts = 1
            found.append((unit, size))
        return found
