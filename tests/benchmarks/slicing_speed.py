"""Speed and memory of rotate-and-slice, LR and perplexity on a random model of a given shape.

    PYTHONPATH=. python tests/benchmarks/slicing_speed.py --shape 7b --lr 256 1024 --perplexity 166 2048
    PYTHONPATH=. python tests/benchmarks/slicing_speed.py --shape demo --device cpu --windows 16 --length 1024

Slicing runs three times: on 8 windows as a warm-up, undisturbed for the total and the peak memory, and once more with
the device waited for at each part. Waiting takes time and undoes overlap, so the parts don't add up to the total.
LR and perplexity take turns with a plain forward (head on the last token, no cache) on the same windows in the same
batches; a ratio is that of the two medians. GB are 10^9 bytes.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import CalibrationOptions, option, parse, random_model, random_windows, widths_of
from timing import Table, machine, print_heading, timed_parts
from torch import nn
from transformers import PreTrainedModel

from slicing import bases, pca, rotation, weights
from slicing.bases import dense_bases
from slicing.files import write_json
from slicing.likelihood import window_nll
from slicing.modeling import count_parameters
from slicing.redundancy import layer_redundancy
from slicing.rotation import rotate_and_slice, slice_with_bases
from slicing.speed import plain_forward, timed

WARM_UP = 8  # windows
PARTS: dict[str, list[tuple[Any, str]]] = {
    "covariances": [(pca.Covariance, "add")],
    "eigenvectors": [(bases, "leading_eigenvectors")],
    "weights": [(rotation._Slicer, "_write_embedding"), (weights.LayerWriter, "write")],
}
REST = "forward, all else"


@dataclass(frozen=True)
class Options(CalibrationOptions):
    """The options of this benchmark."""

    base: float = option(0.0, "slice base, SB; with the mean itself slicing is constant")
    skip_slicing: bool = option(False, "measure LR or perplexity only", action="store_true")
    lr: Sequence[int] | None = option(None, "measure LR too", type=int, nargs=2, metavar=("WINDOWS", "LENGTH"))
    perplexity: Sequence[int] | None = option(None, "and perplexity", type=int, nargs=2, metavar=("WINDOWS", "LENGTH"))
    repeats: int = option(5, "turns of LR, perplexity and the plain forward")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the options say; tables go to stdout, all figures to the JSON file."""
    options = parse(Options, __doc__, argv)
    model = random_model(options)
    where = machine(options.torch_device)
    print_heading(model, options.shape, where)
    results: dict[str, Any] = {"options": asdict(options), "machine": where, "parameters": count_parameters(model)}
    if not options.skip_slicing:
        results["slicing"] = _measure_slicing(options, model)
    if options.lr or options.perplexity:
        table = Table("against a plain forward", "windows", "length", "batch", "seconds", "plain", "ratio")
        if options.lr:
            results["lr"] = _measure_against_plain(options, model, table, "LR", layer_redundancy, options.lr)
        if options.perplexity:
            results["perplexity"] = _measure_against_plain(
                options, model, table, "perplexity", _quiet_nll, options.perplexity
            )
    if options.json:
        write_json(Path(options.json), results)


def _quiet_nll(model: PreTrainedModel, windows: torch.Tensor, batch_size: int | None) -> torch.Tensor:
    return window_nll(model, windows, batch_size=batch_size, progress=False)


# ---- slicing


def _measure_slicing(options: Options, model: PreTrainedModel) -> dict[str, Any]:
    """Figures by function of the library; prints both tables."""
    windows = random_windows(model.config, options.windows, options.length, options.seed)
    widths = widths_of(model.config, options.mean, options.base, options.round_interval)
    more: dict[str, Any] = {"rotations": options.rotations, "batch_size": options.batch_size}
    buffer = windows.numel() * model.config.hidden_size * model.dtype.itemsize
    found: dict[str, dict[str, Any]] = {}
    if options.calibration == "every-point":

        def slice_once(part: torch.Tensor) -> Any:
            return rotate_and_slice(model, part, widths, **more)

        found["rotate_and_slice"], _ = _measure(model, slice_once, windows, buffer)
    else:

        def find_bases(part: torch.Tensor) -> Any:
            return dense_bases(model, part, **more)

        found["dense_bases"], bases = _measure(model, find_bases, windows, buffer)
        found["slice_with_bases"], _ = _measure(model, lambda _: slice_with_bases(model, bases, widths), windows, 0)

    table = Table(f"{options.windows} x {options.length} tokens", *(f"{name}, s" for name in found))
    table.row("total, undisturbed", *(entry["seconds"] for entry in found.values()))
    table.row("with waits", *(entry["seconds_with_waits"] for entry in found.values()))
    for part in (REST, *PARTS):
        table.row(f"  {part}", *(entry["parts"][part] for entry in found.values()))
    if any(entry["memory"] for entry in found.values()):
        table = Table("peak memory", *(f"{name}, GB" for name in found))
        for part in ("peak", "model", "sliced model's own", "activations", "rest"):
            table.row(part if part == "peak" else f"  {part}", *(e["memory"][part] / 1e9 for e in found.values()))
    return found | {"widths": widths}


def _measure(
    model: PreTrainedModel, run: Callable[[torch.Tensor], Any], windows: torch.Tensor, buffer: int
) -> tuple[dict[str, Any], Any]:
    """Seconds, parts and memory of `run(windows)`, and what its last call returned. buffer: bytes of activations."""
    device = model.device
    run(windows[:WARM_UP])
    gc.collect()  # what the warm-up left must not count as memory of the run
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, result = timed(device, lambda: run(windows))
    memory = _memory(model, result, buffer)
    del result
    gc.collect()
    with timed_parts(device, PARTS) as parts:
        with_waits, result = timed(device, lambda: run(windows))
    parts = {REST: with_waits - sum(parts.values())} | parts
    return {"seconds": seconds, "seconds_with_waits": with_waits, "parts": parts, "memory": memory}, result


def _memory(model: PreTrainedModel, result: object, buffer: int) -> dict[str, int] | None:
    """Bytes at the peak, by owner; None without a CUDA device. A sliced model owns what it doesn't share."""
    if model.device.type != "cuda":
        return None
    dense = _storages(model)
    sliced = _storages(result) if isinstance(result, nn.Module) else {}
    peak = torch.cuda.max_memory_allocated(model.device)
    own = sum(size for place, size in sliced.items() if place not in dense)
    total = sum(dense.values())
    return {
        "peak": peak,
        "model": total,
        "sliced model's own": own,
        "activations": buffer,
        "rest": peak - total - own - buffer,
    }


def _storages(module: nn.Module) -> dict[int, int]:
    """Address -> bytes of the storages of all parameters and buffers."""
    storages = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


# ---- LR and perplexity


def _measure_against_plain(
    options: Options, model: PreTrainedModel, table: Table, name: str, run: Callable[..., Any], size: Sequence[int]
) -> dict[str, Any]:
    """Medians of `run` and of a plain forward in the batches that `run` chose, taking turns."""
    count, length = size
    windows = random_windows(model.config, count, length, options.seed)
    mine: list[float] = []
    plain: list[float] = []
    with _observed_batches(model) as batches:
        run(model, windows[: 4 * WARM_UP], batch_size=options.batch_size)
        plain_forward(model, windows[: 4 * WARM_UP], max(batches))
        for _ in range(options.repeats):
            batches.clear()
            mine.append(timed(model.device, lambda: run(model, windows, batch_size=options.batch_size))[0])
            batch = max(batches)  # trials of a few tokens, one window each, come first
            plain.append(timed(model.device, partial(plain_forward, model, windows, batch))[0])
    ratio = statistics.median(mine) / statistics.median(plain)
    table.row(
        name, str(count), str(length), str(batch), statistics.median(mine), statistics.median(plain), f"{ratio:.3f} x"
    )
    return {"windows": count, "length": length, "batch": batch, "seconds": mine, "plain_seconds": plain, "ratio": ratio}


@contextmanager
def _observed_batches(model: PreTrainedModel) -> Iterator[list[int]]:
    """The numbers of windows that the decoder body runs on while this lasts."""
    sizes: list[int] = []

    def note(body: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if "forward" not in vars(body):  # perplexity replaces it while it runs the head alone, on chunks of tokens
            sizes.append(len(kwargs["input_ids"]))

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


if __name__ == "__main__":
    main()
