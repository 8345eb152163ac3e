"""Models that one GPU can't hold: they stay on the CPU, are sliced a layer at a time on the GPU, and are spread over
the GPUs that there are to be evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

_HEADROOM = 6 * 2**30  # bytes that slicing needs beside model, sliced model and activations


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def must_offload(model: PreTrainedModel, device: torch.device, calibration_tokens: int) -> bool:
    """Whether the model, a sliced copy and the calibration's activations don't fit into a GPU's memory together."""
    if device.type != "cuda":
        return False
    width = model.config.get_text_config().hidden_size
    activations: int = calibration_tokens * width * model.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * model_bytes(model) + activations + _HEADROOM > free


@contextmanager
def on_devices(model: PreTrainedModel, device: torch.device) -> Iterator[PreTrainedModel]:
    """The model where it can run: on the device if it fits, else spread over GPUs and CPU by accelerate; afterwards
    where it was."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.hooks import remove_hook_from_submodules
    from accelerate.utils import get_max_memory

    home = next(model.parameters()).device
    if home == device:
        yield model
        return
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if device.type != "cuda" or 1.2 * model_bytes(model) < free:
        yield model.to(device)
        model.to(home)
        return
    # room for activations is left on every GPU
    memory = {place: int(room * 0.8) if place != "cpu" else room for place, room in get_max_memory().items()}
    layout = infer_auto_device_map(model, memory, no_split_module_classes=list(model._no_split_modules or ()))
    yield dispatch_model(model, layout)
    remove_hook_from_submodules(model)
    model.to(home)
