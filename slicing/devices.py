"""Models that one GPU can't hold: they stay on the CPU, are sliced a layer at a time on the GPU, and are spread over
the GPUs that there are to be evaluated. How much memory a GPU or the machine still has for this process."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

_HEADROOM = 6 * 2**30  # bytes that slicing needs beside models and activations
_ROOM = 0.8  # of each GPU's memory for weights, where a model is spread: activations need the rest


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still have on a GPU, its own limit (set_per_process_memory_fraction) included."""
    free, total = torch.cuda.mem_get_info(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    allocated = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - allocated  # PyTorch's own, to be used again
    return min(free + cached, limit - allocated)


def free_memory(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of the machine's memory that this process can still have, the limits of its container or batch job
    included, of which /proc/meminfo knows nothing.

    groups, mounted: where Linux says to which control groups the process belongs, and where these are.
    """
    free = [psutil.virtual_memory().available]
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:  # no Linux
        return int(free[0])
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            base, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.strip("/")
        for folder in [group, *group.parents]:  # a limit above counts too; inside a container the path may not be there
            if folder == base.parent:
                break
            free += _room(folder, *names)
    return int(max(0, min(free)))


def _room(folder: Path, limit: str, usage: str, cache: str) -> list[int]:
    """What a control group leaves: its limit less its usage, without the file cache that it can drop."""
    try:
        allowed, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [allowed - used + int(stat.get(cache, 0))]
    except (OSError, ValueError):  # no such file, or "max"
        return []


def must_offload(model: PreTrainedModel, device: torch.device, calibration_tokens: int, more: int = 0) -> bool:
    """Whether a model on the CPU, a sliced copy and the calibration's activations don't fit into a GPU together.

    calibration_tokens 0: nothing is sliced, so there is no copy. more: bytes that slicing needs besides.
    """
    if device.type != "cuda":
        return False
    width = model.config.get_text_config().hidden_size
    activations: int = calibration_tokens * width * model.dtype.itemsize
    copies = 2 if calibration_tokens else 1
    return copies * model_bytes(model) + activations + more + _HEADROOM > free_bytes(device)


@contextmanager
def on_devices(model: PreTrainedModel, device: torch.device) -> Iterator[PreTrainedModel]:
    """The model where it can run: on the device if it fits, else spread over GPUs and CPU by accelerate; afterwards
    where it was."""
    home = next(model.parameters()).device
    if home == device:
        yield model
    elif device.type != "cuda" or model_bytes(model) < _ROOM * free_bytes(device):
        try:
            yield model.to(device)
        finally:
            model.to(home)
    else:
        with _spread(model, [device.index] if dist.is_initialized() else range(torch.cuda.device_count())):
            yield model


@contextmanager
def _spread(model: PreTrainedModel, gpus: Iterable[int]) -> Iterator[None]:
    """The model on these GPUs and the CPU; several ranks of a run have a GPU each."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.hooks import remove_hook_from_submodules
    from accelerate.utils import find_tied_parameters, retie_parameters

    memory: dict[int | str, int] = {gpu: int(_ROOM * free_bytes(torch.device("cuda", gpu))) for gpu in gpus}
    memory["cpu"] = 2 * model_bytes(model)  # it is there already
    layers = list(model._no_split_modules or ())
    tied = find_tied_parameters(model)
    attributes = [(module, set(vars(module))) for module in model.modules()]
    try:
        dispatch_model(model, infer_auto_device_map(model, memory, no_split_module_classes=layers))
        yield
    finally:
        remove_hook_from_submodules(model)
        for module, before in attributes:  # bound methods stay behind, which a copy of the module would run
            for name in set(vars(module)) - before:
                del vars(module)[name]
        model.to("cpu")
        retie_parameters(model, tied)
