"""Layer redundancy, LR: how alike a decoder layer's output is to its input (the paper's section 3).

Forward hooks on the decoder layers see the stream before the final norm, which `hidden_states[-1]` of a Transformers
model is not.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slicing.batches import (
    body_of,
    check_token_ids,
    check_weights,
    evaluation_mode,
    in_batches,
    input_device,
    windows_at_once,
)
from slicing.causality import SEEDS, check_causal, trial_tokens
from slicing.families import FAMILIES, InputError
from slicing.parts import part
from slicing.progress import Progress
from slicing.schedule import normalise

_SAME = 1e-3  # relative: what one layer writes and the next one reads


@dataclass(frozen=True)
class LayerRedundancy:
    """Three fp64 vectors of length L, the number of decoder layers.

    cosine: the mean over tokens of cos(input, output) of layer i.
    stderr: its standard error over windows (nan for a single window).
    normalised: LR_i, the cosines min-max normalised over the layers to [0, 1].
    """

    cosine: torch.Tensor
    stderr: torch.Tensor
    normalised: torch.Tensor

    def line(self) -> str:
        """LR in four decimals with spaces between: what --vector-cut takes."""
        return " ".join(f"{value:.4f}" for value in self.normalised.tolist())

    def table(self) -> str:
        """A line a layer: mean cosine, its standard error, LR."""
        rows = zip(self.cosine.tolist(), self.stderr.tolist(), self.normalised.tolist(), strict=True)
        lines = [
            f"{i:5d}  {cosine:11.6f}  {'-' if math.isnan(error) else f'{error:.6f}':>9}  {lr:.4f}"
            for i, (cosine, error, lr) in enumerate(rows)
        ]
        return "\n".join(["layer  mean cosine  std error      LR", *lines])

    def as_dict(self) -> dict[str, list[float] | None]:
        """The three vectors for JSON; no standard error (of a single window) is None."""
        stderr = self.stderr.tolist()
        return {
            "normalised": self.normalised.tolist(),
            "cosine": self.cosine.tolist(),
            "stderr": None if math.isnan(stderr[0]) else stderr,
        }


@torch.no_grad()
def layer_redundancy(
    model: PreTrainedModel, windows: torch.Tensor, *, batch_size: int | None = None, progress: Progress = False
) -> LayerRedundancy:
    """Measure LR of a causal LM on token windows (N, S).

    Any decoder family is measured, those that can't be sliced too. batch_size: windows run at once; None starts with
    what the device should hold and halves it when memory runs out. The standard error takes windows as independent: it
    is too small where they overlap. Raises InputError where an activation is not finite, with the first such layer,
    where no decoder layers are found or they change the stream's width (a sliced model's), and for a batch that does
    not fit.
    """
    if windows.ndim != 2 or 0 in windows.shape:
        raise InputError(f"windows must have shape (N, S) with N and S above 0, got {tuple(windows.shape)}")
    check_token_ids(windows, model.get_input_embeddings().weight.shape[0])
    layers = decoder_layers(model)
    check_weights(model, layers)
    device = input_device(model.get_input_embeddings())
    body = body_of(model)
    check_causal(model)
    with evaluation_mode(model):
        axis = _check_chain(model, layers)
    with evaluation_mode(model), _layer_cosines(layers, device, axis) as last:

        def run(batch: torch.Tensor) -> torch.Tensor:
            body(input_ids=batch.to(device), use_cache=False)
            return torch.stack(last)  # (L, B)

        automatic = windows_at_once(device, windows.shape[1])
        batches = in_batches(run, windows, batch_size=batch_size, automatic=automatic, name="LR", progress=progress)
    cosines = torch.cat(batches, dim=1).cpu().double()  # (L, N)
    for index, row in enumerate(cosines):
        if not bool(torch.isfinite(row).all()):
            raise InputError(f"the activations of layer {index} are not finite: use --dtype float32 or bfloat16")
    cosine = cosines.mean(1)
    deviation = cosines.std(1) if len(windows) > 1 else torch.full_like(cosine, math.nan)
    stderr = deviation / len(windows) ** 0.5
    return LayerRedundancy(cosine, stderr, torch.tensor(normalise(cosine.tolist()), dtype=torch.float64))


def _check_chain(model: PreTrainedModel, layers: nn.ModuleList) -> int:
    """InputError unless each layer runs once, and reads the stream (B, S, D) that the one before it wrote: else these
    are not the decoder layers, or their cosines say nothing. Tried on a few tokens.

    Several streams are (B, S, n, D) or (n, B, S, D); returned is B's axis."""
    ids = trial_tokens(model, SEEDS[0])
    seen: list[tuple[int, Any, Any]] = []

    def hook(index: int) -> Callable[..., None]:
        return lambda layer, args, kwargs, output: seen.append((index, *_states(args, kwargs, output)))

    handles = [layer.register_forward_hook(hook(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        body_of(model)(input_ids=ids, use_cache=False)
    except Exception as error:  # code of any family; a whole forward has passed before
        raise InputError(f"{type(model).__name__} has no layer redundancy: its body alone fails: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    what = f"{type(model).__name__} has no layer redundancy: its {len(layers)} layers ({type(layers[0]).__name__})"
    if [index for index, _, _ in seen] != list(range(len(layers))):
        raise InputError(f"{what} do not run once each, one after the other")
    axis = int(seen[0][1] is not None and seen[0][1].shape[1:3] == ids.shape)
    for index, before, after in seen:
        if before is None or any(
            state.ndim < 3 or state.shape[axis : axis + 2] != ids.shape for state in (before, after)
        ):
            shape = None if before is None else tuple(before.shape)
            raise InputError(f"{what} read no stream of shape (windows, tokens, width), but {shape}")
        if index:
            written = seen[index - 1][2].to(before.device)
            if written.shape == before.shape and bool((written - before).norm() > _SAME * before.norm()):
                raise InputError(f"{what} are no chain: layer {index} does not read what layer {index - 1} writes")
    return axis


def _states(args: Any, kwargs: Any, output: Any) -> tuple[Any, Any]:
    """The stream that a layer was given and that it returns; None where there is none."""
    found = [*args, *kwargs.values()]
    before = kwargs["hidden_states"] if not args and "hidden_states" in kwargs else next(iter(found), None)
    after = output[0] if isinstance(output, tuple | list) else output
    return (before if isinstance(before, torch.Tensor) else None), after


@contextmanager
def _layer_cosines(layers: nn.ModuleList, device: torch.device, axis: int) -> Iterator[list[torch.Tensor]]:
    """While this lasts, a list of the last batch's cosines: a layer's mean over the tokens, (B,), fp32 or fp64, of all
    its streams together where it has several."""
    cosines = [torch.empty(0)] * len(layers)

    def hook(index: int) -> Callable[..., None]:
        def measure(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = _states(args, kwargs, output)
            if before.shape != after.shape:
                raise InputError(
                    f"layer {index} reads {before.shape[-1]} numbers and writes {after.shape[-1]}, so it has no cosine:"
                    " measure LR on the model before it is sliced"
                )
            before, after = (state.movedim((axis, axis + 1), (0, 1)).flatten(2) for state in (before, after))
            cosines[index] = _cosine(before, after).mean(-1).to(device)

        return measure

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield cosines
    finally:
        for handle in handles:
            handle.remove()


def _cosine(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """cos of each token's states, (B, S, D) twice -> (B, S), in fp32 at least; 0 where a state is zero.

    The norms need no fp32 copy of the states.
    """
    after = after.to(before.device)
    dtype = torch.promote_types(before.dtype, torch.float32)
    dot = (before.to(dtype) * after).sum(-1)
    norms = torch.linalg.vector_norm(before, dim=-1, dtype=dtype) * torch.linalg.vector_norm(after, dim=-1, dtype=dtype)
    cosine: torch.Tensor = dot / norms.clamp_min(torch.finfo(dtype).tiny)
    return cosine


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal LM: by the family's row, else the list of modules as long as the config says."""
    config = model.config
    if config.model_type in FAMILIES:
        return part(model, FAMILIES[config.model_type].layers)  # type: ignore[no-any-return]
    text = config.get_text_config(decoder=True)
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers")  # the last: two blocks a layer
    counts = [getattr(text, name, None) for name in names]
    lists = [module for module in body_of(model).modules() if isinstance(module, nn.ModuleList)]
    for count in counts:
        found = next((module for module in lists if len(module) == count), None)
        if found is not None:
            return found
    raise InputError(
        f"{type(model).__name__} has no layer redundancy: no list of {counts[2]} layers, as its config says, is in it"
    )
