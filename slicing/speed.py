"""Tokens a second of models that take turns: prefill, and decoding with a KV cache; and the memory that prefill needs.

Prefill is a plain forward: the head on the last token only, no cache written. Decoding is greedy, one token a step with
its head, in a static cache whose whole length every step attends to; on CUDA a step can be a CUDA graph.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, StaticCache

from slicing.devices import model_bytes
from slicing.families import InputError

WARM_UP_STEPS = 3  # of decoding

Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """Something to time. tokens: of a turn. run: a turn. rewind: goes before each turn and is not timed."""

    tokens: int
    run: Callable[[], object]
    rewind: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Turns:
    """How much is timed.

    windows, length: of a turn of prefill. steps: tokens that one sequence decodes in a turn. cache_length: of the
    static cache. repeats: turns of each model.
    """

    windows: int
    length: int
    steps: int
    cache_length: int
    repeats: int

    @classmethod
    def of(cls, device: torch.device, positions: int | None = None) -> "Turns":
        """What a GPU needs to be busy, or what a CPU does in seconds; no longer than the positions that a model has."""
        found = cls(8, 2048, 16, 512, 5) if device.type == "cuda" else cls(1, 512, 8, 64, 3)
        longest = positions or found.length
        length, cache_length = min(found.length, longest), min(found.cache_length, longest)
        return cls(found.windows, length, min(found.steps, cache_length), cache_length, found.repeats)


@dataclass(frozen=True)
class ModelSpeed:
    """Of one model.

    prefill, decode: tokens a second, from the median turn; decode None where the family has no static cache.
    memory: bytes of the weights and of what prefill needs beside them; None where there is no GPU that counts them.
    """

    prefill: float
    decode: float | None
    memory: int | None


def compare_speeds(models: Mapping[str, PreTrainedModel], windows: torch.Tensor, turns: Turns) -> dict[str, ModelSpeed]:
    """The speed of each model by its name, taking turns, so that what else the machine does is shared by all.

    models: on one device, in evaluation mode. windows: (N, S) token ids, which prefill takes its tokens from, again
        from the first one on where they are too few.
    Raises InputError where logits are not finite.
    """
    device = next(iter(models.values())).device
    needed = turns.windows * turns.length
    flat = windows.flatten().to(device)
    tokens = flat.repeat(-(-needed // flat.numel()))[:needed].reshape(turns.windows, turns.length)
    prefills = {name: prefill(model, tokens) for name, model in models.items()}
    memory = {name: _memory(model, prefills[name]) for name, model in models.items()}
    prefilled = median_speeds(prefills, take_turns(device, prefills, turns.repeats))
    decodings = {
        name: decoding(model, tokens[:1, :1], turns.steps, turns.cache_length)
        for name, model in models.items()
        if has_static_cache(model)
    }
    decoded = median_speeds(decodings, take_turns(device, decodings, turns.repeats))
    return {name: ModelSpeed(prefilled[name], decoded.get(name), memory[name]) for name in models}


def median_speeds(works: Mapping[str, Work], turns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Tokens a second of each, from the median of the seconds of its turns."""
    return {name: work.tokens / statistics.median(turns[name]) for name, work in works.items()}


def take_turns(device: torch.device, works: Mapping[str, Work], repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn; each work has its turn before the first one has its next."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            work.rewind()
            seconds[name].append(timed(device, work.run)[0])
    return seconds


def prefill(model: PreTrainedModel, windows: torch.Tensor) -> Work:
    """A forward over all windows (N, S) at once, warm."""
    work = Work(windows.numel(), lambda: plain_forward(model, windows, len(windows)))
    for _ in range(2 if model.device.type == "cuda" else 1):
        work.run()
    return work


@torch.inference_mode()
def plain_forward(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> None:
    """The model's own forward on all windows (N, S), with the head on the last token only and no cache."""
    for batch in torch.split(windows, batch_size):
        model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)


def has_static_cache(model: PreTrainedModel) -> bool:
    """Whether the family says that it can be compiled, and so takes a cache of fixed size; Falcon's and MPT's position
    biases are made for one that grows."""
    compiled = bool(getattr(model, "_can_compile_fullgraph", False)) and not getattr(model.config, "alibi", False)
    return compiled and _cache_name(model) is not None


@torch.inference_mode()
def decoding(
    model: PreTrainedModel, first: torch.Tensor, steps: int, cache_length: int, *, graph: bool | None = None
) -> Work:
    """Greedy decoding from an empty static cache, warm; each step reads the token of the last one.

    first: (B, 1) the first token of each sequence. steps: of a turn. graph: run a step as a CUDA graph; None does so
        on CUDA. InputError where the logits are not finite.
    """
    cache = StaticCache(config=model.config, max_cache_len=cache_length)
    name = _cache_name(model) or "past_key_values"
    first = first.to(model.device)
    token = first.clone()

    @torch.inference_mode()
    def step() -> torch.Tensor:
        arguments: dict[str, Any] = {name: cache}
        logits: torch.Tensor = model(input_ids=token, use_cache=True, **arguments).logits  # (B, 1, V)
        token.copy_(logits.argmax(-1))
        return logits

    @torch.inference_mode()
    def rewind() -> None:  # it also keeps alive what a graph reads and writes
        cache.reset()
        token.copy_(first)

    for _ in range(min(WARM_UP_STEPS, cache_length)):  # the first allocates the cache, which a graph finds in its place
        logits = step()
    if not bool(logits.isfinite().all()):
        raise InputError(f"the logits are not finite in {model.dtype}: use --dtype bfloat16")
    run: Callable[[], object] = step
    if model.device.type == "cuda" if graph is None else graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.device(model.device), torch.cuda.graph(recorded):
            step()
        run = recorded.replay
    return Work(first.shape[0] * steps, lambda: [run() for _ in range(steps)], rewind)


def timed(device: torch.device, run: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of a call, the device idle before and after, and what it returned."""
    _wait(device)
    start = time.perf_counter()
    result = run()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _cache_name(model: PreTrainedModel) -> str | None:
    """The argument that takes the cache: its name differs between Transformers releases."""
    taken = signature(type(model.get_decoder()).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def _memory(model: PreTrainedModel, work: Work) -> int | None:
    if model.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    work.run()
    return model_bytes(model) + torch.cuda.max_memory_allocated(model.device) - before
