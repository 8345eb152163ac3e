"""Layer redundancy, LR: how alike a decoder layer's output is to its input (the paper's section 3).

Forward hooks on the decoder layers see the stream before the final norm, which `hidden_states[-1]` of a Transformers
model is not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .evaluation import evaluation_mode, first_batch, input_device, windows_at_once
from .families import FAMILIES, InputError
from .modeling import part
from .schedule import normalise


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
        lines = [f"{i:5d}  {cosine:11.6f}  {error:9.6f}  {lr:.4f}" for i, (cosine, error, lr) in enumerate(rows)]
        return "\n".join(["layer  mean cosine  std error      LR", *lines])

    def as_dict(self) -> dict[str, list[float] | None]:
        """The three vectors for JSON; no standard error (of a single window) is None."""
        stderr = self.stderr.tolist()
        return {
            "normalised": self.normalised.tolist(),
            "cosine": self.cosine.tolist(),
            "stderr": None if math.isnan(stderr[0]) else stderr,
        }


@torch.inference_mode()
def layer_redundancy(
    model: PreTrainedModel, windows: torch.Tensor, *, batch_size: int | None = None, progress: bool = False
) -> LayerRedundancy:
    """Measure LR of a causal LM on token windows (N, S).

    Any decoder family is measured, those that can't be sliced too. batch_size: windows run at once; None starts with
    what the device should hold and halves it when memory runs out. Raises InputError where an activation is not finite,
    with the first such layer, and where no decoder layers are found.
    """
    if windows.ndim != 2 or 0 in windows.shape:
        raise InputError(f"windows must have shape (N, S) with N and S above 0, got {tuple(windows.shape)}")
    layers = decoder_layers(model)
    device = input_device(model.get_input_embeddings())
    start = first_batch(batch_size, min(len(windows), windows_at_once(device, windows.shape[1])))
    measure = find_executable_batch_size(_window_cosines, starting_batch_size=start)
    with evaluation_mode(model):
        cosines = measure(model, layers, windows, device, progress).cpu()  # (L, N)
    for index, row in enumerate(cosines):
        if not bool(torch.isfinite(row).all()):
            raise InputError(f"the activations of layer {index} are not finite: use --dtype float32 or bfloat16")
    cosine = cosines.mean(1)
    deviation = cosines.std(1) if len(windows) > 1 else torch.full_like(cosine, math.nan)
    stderr = deviation / len(windows) ** 0.5
    return LayerRedundancy(cosine, stderr, torch.tensor(normalise(cosine.tolist()), dtype=torch.float64))


def _window_cosines(
    batch_size: int,
    model: PreTrainedModel,
    layers: nn.ModuleList,
    windows: torch.Tensor,
    device: torch.device,
    progress: bool,
) -> torch.Tensor:
    """Mean cosine over the tokens of each window: (L, N) fp64 on the device."""
    cosines = torch.empty(len(layers), len(windows), dtype=torch.float32, device=device)
    rows = slice(0, 0)

    def hook(index: int) -> Callable[..., None]:
        def measure(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines[index, rows] = _cosine(before, after).mean(-1).to(cosines.device)

        return measure

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        body = model.get_decoder()
        with tqdm(total=len(windows), desc="LR", unit="window", disable=not progress) as bar:
            for start in range(0, len(windows), batch_size):
                rows = slice(start, start + batch_size)
                body(input_ids=windows[rows].to(device), use_cache=False)
                bar.update(len(windows[rows]))
    finally:
        for handle in handles:
            handle.remove()
    return cosines.double()


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
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    body = model.get_decoder()
    found = [module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise InputError(f"no list of {count} decoder layers in {type(model).__name__}: add a row to families.py")
    return found[0]
