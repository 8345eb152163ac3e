"""The residual stream of the calibration windows, and the parts of a dense layer that run on it."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from slicing.batches import first_batch, windows_at_once
from slicing.families import Block, Family, InputError
from slicing.parts import attention_branch, is_parallel, mlp_branch, normalised, part, returns_tuple
from slicing.pca import Covariance

Module = TypeVar("Module", bound=nn.Module)
Step = Callable[[torch.Tensor, Any, Any], torch.Tensor]  # stream (B, S, D), a layer's args and kwargs -> stream
Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids (B, S), the last layer's outputs (B, S, D) -> logits


class Stream:
    """The residual stream of all windows, (N, S, D) in the model's basis and dtype, and what each layer is called with.

    Batches run through in place, so this buffer and what one batch needs is all the memory that activations take.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        windows: torch.Tensor,
        batch_size: int | None,
        device: torch.device | None,
    ) -> None:
        device = torch.device(device or next(model.parameters()).device)
        if windows.ndim != 2 or 0 in windows.shape:
            raise InputError(f"calibration windows must have shape (N, S) with N and S above 0, got {windows.shape}")
        self.batch_size = first_batch(batch_size, windows_at_once(device, windows.shape[1]))
        self.centred = family.layer_norm
        self.device = device
        path, _, name = family.layers.rpartition(".")
        body = _with_recorders(part(model, path), name, device)
        recorders = getattr(body, name)
        self.calls: dict[int, list[tuple[Any, Any]]] = {}  # batch size -> (args, kwargs) of every layer
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            body(input_ids=batch.to(device), use_cache=False)
            hidden = recorders[0].hidden  # (B, S, D), after positions, multipliers and dropout
            if start == 0:
                self.buffer: torch.Tensor = hidden.new_empty(len(windows), *hidden.shape[1:])
            self.buffer[start : start + len(batch)] = hidden
            self.calls.setdefault(len(batch), [recorder.call for recorder in recorders])

    def run(
        self,
        index: int,
        step: Step,
        *,
        measure: bool,
        keep: bool = True,
    ) -> Covariance:
        """Run `step` of layer `index` on every batch; keep what it returns in the buffer, measure its covariance."""
        covariance = Covariance(self.buffer.shape[-1], self.device, centred=self.centred)
        for batch in torch.split(self.buffer, self.batch_size):
            args, kwargs = self.calls[len(batch)][index]
            states = step(batch, args, kwargs)
            if measure:
                covariance.add(states)
            if keep and states is not batch:
                batch.copy_(states)
        return covariance


class _Recorder(nn.Module):
    """Stands in a decoder layer's place: notes what it is called with and lets the stream through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
        self.__dict__.update(plain)  # some bodies read attributes of their layers
        self.returns_tuple = returns_tuple(layer)
        self.hidden: torch.Tensor | None = None
        self.output: torch.Tensor | None = None  # in place of the stream
        self.call: tuple[Any, Any] = ((), {})

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden_states, (args, kwargs)
        output = hidden_states if self.output is None else self.output
        return (output, None) if self.returns_tuple else output


def _with_recorders(body: nn.Module, name: str, device: torch.device) -> nn.Module:
    """A copy of a body that shares its modules, with recorders for layers; the body itself is not touched."""
    return on_device(_replaced(body, name, nn.ModuleList(_Recorder(layer) for layer in getattr(body, name))), device)


def _replaced(module: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """A copy of a module that shares all its parts but the one at a path."""
    name, _, rest = path.partition(".")
    shallow = copy.copy(module)
    part_there = _replaced(getattr(module, name), rest, replacement) if rest else replacement
    shallow._modules = {**module._modules, name: part_there}
    return shallow


def head_of(model: PreTrainedModel, family: Family, device: torch.device) -> Head:
    """What a causal LM does after its last layer, as it does it: its own forward, with the outputs handed in."""
    recorders = nn.ModuleList(_Recorder(layer) for layer in part(model, family.layers))
    whole = on_device(_replaced(model, family.layers, recorders), device)
    last = part(whole, family.layers)[-1]

    def head(ids: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        last.output = outputs
        logits: torch.Tensor = whole(input_ids=ids, use_cache=False).logits
        return logits

    return head


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """The module itself if it is there, else a copy of it on the device."""
    return module if next(module.parameters()).device == device else copy_of(module, device)


def copy_of(module: Module, device: torch.device | None = None, known: dict[int, Any] | None = None) -> Module:
    """A deep copy, on a device; parameters and buffers that are there (all, with None) share storage. Tied stay tied.

    known: objects that the copy has in place of the module's, by the id of these.
    """
    memo = dict(known or {})
    for parameter in module.parameters():
        moved = parameter.detach().to(device=device)
        memo[id(parameter)] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
    memo |= {id(buffer): buffer.detach().to(device=device) for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def attention_step(layer: nn.Module, block: Block, projection: torch.Tensor | None) -> Step:
    def step(stream: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        stream = _project(stream, projection)
        return stream + attention_branch(layer, block, normalised(layer, block.attention_norm, stream), args, kwargs)[0]

    return step


def mlp_step(layer: nn.Module, block: Block, projection: torch.Tensor | None) -> Step:
    def step(stream: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        stream = _project(stream, projection)
        return stream + mlp_branch(layer, block, normalised(layer, block.mlp_norm, stream))

    return step


def parallel_step(layer: nn.Module, block: Block, projection: torch.Tensor | None) -> Step:
    def step(stream: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        stream = _project(stream, projection)
        attention, _ = attention_branch(layer, block, normalised(layer, block.attention_norm, stream), args, kwargs)
        return stream + attention + mlp_branch(layer, block, normalised(layer, block.mlp_norm, stream))

    return step


def steps_of(layer: nn.Module, block: Block) -> list[Step]:
    """A whole layer: attention, then the MLP, or both at once."""
    if is_parallel(layer, block):
        return [parallel_step(layer, block, None)]
    return [attention_step(layer, block, None), mlp_step(layer, block, None)]


def _project(stream: torch.Tensor, projection: torch.Tensor | None) -> torch.Tensor:
    return stream if projection is None else stream @ projection
