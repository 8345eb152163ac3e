"""Windows of tokens in batches: how many run at once, what memory allows, and the checks that every pass needs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from slicing.families import InputError
from slicing.progress import Progress, piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def in_batches(
    run: Callable[[torch.Tensor], torch.Tensor],
    windows: torch.Tensor,
    *,
    batch_size: int | None,
    automatic: int,
    name: str,
    progress: Progress,
) -> list[torch.Tensor]:
    """What `run` returns for each batch of windows (N, S), in order, left on its device: the loop never waits for it.

    batch_size: windows a batch; None starts with `automatic` and halves when memory runs out. name: of the bar.
    Raises InputError for a batch that does not fit.
    """
    count, length = windows.shape
    size = first_batch(batch_size, automatic)
    done: list[torch.Tensor] = []
    start = 0
    with piece(progress, name, count, "window") as at:
        while start < count:
            batch = windows[start : start + size]
            try:
                done.append(run(batch))
            except RuntimeError as error:
                size = smaller_batch(error, len(batch), batch_size, f"windows of {length} tokens")
                continue
            start += len(batch)
            at(start)
    return done


def check_token_ids(windows: torch.Tensor, vocabulary: int) -> None:
    """InputError where token ids (N, S) are not in [0, vocabulary)."""
    low, high = windows.min().item(), windows.max().item()
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"token ids go from {low} to {high}, the model's vocabulary from 0 to {vocabulary - 1}: "
            "use the tokenizer that belongs to the model"
        )


def broken_weight(model: torch.nn.Module) -> str | None:
    """The name of the first parameter that holds NaN or an infinity; None where all are finite.

    The activations alone do not tell: attention kernels of some CPUs swallow NaN in queries and keys. Weights that are
    on no device (accelerate keeps them on the disk) or in a quantiser's own kind of tensor are passed over.
    """
    names, extremes = [], []
    for name, parameter in model.named_parameters():
        if (
            type(parameter.data) is torch.Tensor
            and parameter.dtype.itemsize > 1
            and parameter.is_floating_point()
            and parameter.numel()
            and not parameter.is_meta
        ):
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(parameter.detach())).float())  # the fastest test: NaN passes on
    finite = torch.stack([pair.cpu() for pair in extremes]).isfinite().all(1).tolist() if names else []
    return next((name for name, good in zip(names, finite, strict=True) if not good), None)


def check_weights(model: torch.nn.Module, layers: Iterable[torch.nn.Module] = ()) -> None:
    """InputError where a parameter is not finite; it says which of `layers` holds it."""
    name = broken_weight(model)
    if name is None:
        return
    remedy = "use --dtype float32 or bfloat16, or another copy of the model"
    for index, layer in enumerate(layers):
        if any(parameter is model.get_parameter(name) for parameter in layer.parameters()):
            raise InputError(
                f"the activations of layer {index} are not finite: {remedy}, for its weights {name} are not"
            )
    raise InputError(f"the weights {name} are not finite: {remedy}")


def body_of(model: "PreTrainedModel") -> torch.nn.Module:
    """The part of a causal LM below its head: `get_decoder()`, but not where this is a head of that name."""
    body: torch.nn.Module = model.get_decoder()
    if any(isinstance(module, torch.nn.ModuleList) for module in body.modules()):
        return body
    return model.base_model  # type: ignore[no-any-return]


def input_device(table: torch.nn.Module) -> torch.device:
    """Device of the embedding, also where accelerate keeps its weight elsewhere between calls."""
    device = getattr(getattr(table, "_hf_hook", None), "execution_device", None)
    if device is None:
        return next(table.parameters()).device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own training flag again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def windows_at_once(device: torch.device, length: int) -> int:
    """How many windows of `length` tokens a pass over the decoder layers, without a head, runs at once."""
    return max(1, (16_384 if is_gpu(device) else 4_096) // length)


def first_batch(given: int | None, automatic: int) -> int:
    if given is not None and given < 1:
        raise InputError(f"the batch size is {given}: it must be at least 1")
    return given or automatic


def smaller_batch(error: RuntimeError, size: int, given: int | None, what: str) -> int:
    """Half of `size` after an out-of-memory error. Raises InputError where the size was given or can't be halved.

    Nothing is freed here: PyTorch gives its cached memory back itself before it reports that there is none.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    if not should_reduce_batch_size(error):
        raise error
    if given is not None or size == 1:
        remedy = "a smaller batch size" if size > 1 else "shorter windows, a smaller model or a larger device"
        raise InputError(f"out of memory with a batch of {size} {what}: use {remedy}") from error
    return size // 2


def is_gpu(device: torch.device) -> bool:
    return device.type not in ("cpu", "mps")
