"""What the writers of a dense layer read: its branches run with modules in their places that only take notes.

A branch adds to the stream s (W h + b) for each of its writers, h being what the writer reads and s a number a token (a
residual multiplier, the gate of a shared expert), and what routed experts write. h and s are found by running the
branch itself, so every family's own code says what they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slicing.calibration import copy_of
from slicing.families import Block
from slicing.narrow import outputs_of
from slicing.parts import attention_branch, bias_name, input_axis, matrix, mlp_branch, normalised, part

Run = Callable[[nn.Module, Block, torch.Tensor, Any, Any], torch.Tensor]  # layer, its layout, stream, args, kwargs


@dataclass
class Writer:
    """One matrix that writes to the stream, and where its columns are among those of a branch."""

    path: str
    weight: torch.Tensor  # (n, D), fp64, the transpose of W; the bias is its last row
    inputs: int
    biased: bool
    start: int = 0

    @property
    def columns(self) -> slice:
        """Its inputs', and its bias's, among all that is read."""
        return slice(self.start, self.start + len(self.weight))


@dataclass
class Routed:
    """A call of experts: hidden states (T, D), the experts of each token (T, k) and their weights (T, k)."""

    hidden: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


class Branches:
    """Attention, or the MLP, or both of a parallel block, of one dense layer on its device."""

    def __init__(self, layer: nn.Module, block: Block, device: torch.device, *, attention: bool, mlp: bool) -> None:
        self.parts: list[_Branch] = []
        if attention and block.attention_outs():
            self.parts.append(_Branch(layer, block, _attention, block.attention_outs()))
        if mlp and block.mlp_out:
            self.parts.append(_Branch(layer, block, _mlp, block.mlp_out))
        self.writers = [writer for branch in self.parts for writer in branch.writers(device)]
        for before, writer in zip(self.writers, self.writers[1:], strict=False):
            writer.start = before.columns.stop

    def read(self, stream: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        """What the writers read, times s, of a stream (B, S, D): (B S, n); a bias reads s."""
        read = [column for branch in self.parts for column in branch.read(stream, args, kwargs)]
        return torch.cat(read, dim=-1) if read else stream.new_empty(stream.shape[0] * stream.shape[1], 0)

    @property
    def experts(self) -> str | None:
        """The path of the routed experts' writer, where there are any."""
        return next((branch.experts for branch in self.parts if branch.experts), None)

    def written_by_experts(self, stream: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor | None:
        """What routed experts add to a stream (B, S, D): (B S, D); None where there are none."""
        if self.experts is None:
            return None
        return self.parts[-1].resting_output(stream, args, kwargs)

    def routed(self, stream: torch.Tensor, args: Any, kwargs: Any) -> Routed | None:
        """What the experts are called with for a stream (B, S, D); None where that is not token by token."""
        return self.parts[-1].routed(stream, args, kwargs)

    def put_experts(self, module: nn.Module) -> None:
        """Other experts from here on, in what they write."""
        self.parts[-1].put_experts(module)


class _Branch:
    """One branch, and copies of its layer that share weights: `noting`, and `resting`, whose experts alone write."""

    def __init__(self, layer: nn.Module, block: Block, run: Run, paths: tuple[str, ...]) -> None:
        self.run, self.block, self.dense = run, block, layer
        linear = [path for path in paths if getattr(*matrix(layer, path)).ndim == 2]
        self.experts = next((path for path in paths if path not in linear), None)
        width = outputs_of(layer, paths[0])
        self.notes = {path: _Note(width) for path in linear}
        noted: dict[int, Any] = {id(part(layer, path)): note for path, note in self.notes.items()}
        self.nothing = _Nothing()
        if self.experts is not None:
            noted[id(part(layer, self.experts.rpartition(".")[0]))] = self.nothing
            self.resting = copy_of(layer, known={id(part(layer, path)): _Note(width) for path in linear})
        self.noting = copy_of(layer, known=noted)

    def writers(self, device: torch.device) -> list[Writer]:
        found = []
        for path in self.notes:
            owner, name = matrix(self.dense, path)
            weight = getattr(owner, name).detach().to(device).double()
            weight = weight.T if input_axis(owner) == -1 else weight
            bias = getattr(owner, bias_name(name), None)
            inputs = len(weight)
            if bias is not None:
                weight = torch.cat((weight, bias.detach().to(device).double()[None]))
            found.append(Writer(path, weight, inputs, bias is not None))
        return found

    def read(self, stream: torch.Tensor, args: Any, kwargs: Any) -> list[torch.Tensor]:
        columns = []
        for path, note in self.notes.items():
            for other in self.notes.values():
                other.value = float(other is note)
            written = self.run(self.noting, self.block, stream, args, kwargs)  # s in every place
            scale = written[..., :1].reshape(-1, 1)
            assert note.read is not None
            columns.append(note.read.flatten(0, -2) * scale)
            if getattr(part(self.dense, path), "bias", None) is not None:
                columns.append(scale)
        return columns

    def resting_output(self, stream: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        return self.run(self.resting, self.block, stream, args, kwargs).flatten(0, 1)

    def routed(self, stream: torch.Tensor, args: Any, kwargs: Any) -> Routed | None:
        self.run(self.noting, self.block, stream, args, kwargs)
        call = self.nothing.call
        fits = (
            len(call) == 3 and call[0].ndim == 2 and call[1].shape == call[2].shape == (len(call[0]), call[1].shape[-1])
        )
        return Routed(*call) if fits and not call[1].is_floating_point() else None

    def put_experts(self, module: nn.Module) -> None:
        assert self.experts is not None
        owner, _, name = self.experts.rpartition(".")[0].rpartition(".")
        setattr(part(self.resting, owner) if owner else self.resting, name, module)


def _attention(layer: nn.Module, block: Block, stream: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
    return attention_branch(layer, block, normalised(layer, block.attention_norm, stream), args, kwargs)[0]


def _mlp(layer: nn.Module, block: Block, stream: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
    return mlp_branch(layer, block, normalised(layer, block.mlp_norm, stream))


class _Note(nn.Module):
    """In a writer's place: notes what it reads and gives one value for all that it would write."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs, self.value = outputs, 0.0
        self.read: torch.Tensor | None = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.read = states
        return states.new_full((*states.shape[:-1], self.outputs), self.value)


class _Nothing(nn.Module):
    """In the experts' place: notes what they are called with; they write nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.call: tuple[torch.Tensor, ...] = ()

    def forward(self, states: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        self.call = (states, *args, *kwargs.values())
        return torch.zeros_like(states)
