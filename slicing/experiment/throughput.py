"""The speed of a point beside the dense model's, as results.json has it."""

import torch
from transformers import PreTrainedModel

from slicing.batches import evaluation_mode
from slicing.experiment.results import Speed
from slicing.families import InputError
from slicing.rotation import random_sliced
from slicing.speed import Turns, compare_speeds


def measured_speed(
    model: PreTrainedModel,
    windows: torch.Tensor,
    widths: list[int] | None,
    *,
    rotations: int,
    inner_widths: list[int] | None = None,
    turns: Turns,
) -> Speed:
    """Speed and memory of the dense model (`widths` None), or of a model of these widths and the dense one by turns.

    The sliced model has random weights: its shapes say how fast it is, so a point that is finished need not be sliced
    again. windows: (N, S) token ids to read. InputError where the device's memory does not suffice.
    """
    models = {"dense": model}
    try:
        if widths is not None:
            models["sliced"] = random_sliced(model, widths, rotations=rotations, inner_widths=inner_widths)
        with evaluation_mode(model):
            found = compare_speeds(models, windows, turns)
    except torch.OutOfMemoryError as error:
        raise InputError("out of memory while the speed was measured: leave --speed out") from error
    dense, own = found["dense"], list(found.values())[-1]
    return Speed(
        windows=turns.windows,
        length=turns.length,
        cache_length=turns.cache_length,
        repeats=turns.repeats,
        prefill=own.prefill,
        dense_prefill=dense.prefill,
        decode=own.decode,
        dense_decode=dense.decode,
        memory=own.memory,
        dense_memory=dense.memory,
    )
