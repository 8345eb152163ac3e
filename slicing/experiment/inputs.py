"""What a run reads before the model's weights: options found good, config, LR, tasks and windows."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from slicing.experiment.options import Options
from slicing.experiment.plan import Plan
from slicing.experiment.windows import Windows
from slicing.families import InputError
from slicing.files import local_path, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from slicing.experiment.results import VectorFile
    from slicing.task_set import TaskSet


@dataclass(frozen=True)
class Inputs:
    """Options that `check` has found good, with what it had to read.

    vector: LR (L), None where it is to be measured; source: the file that it came from.
    test, calibration, validation, redundancy: the windows that perplexity, slicing, --find-base and a vector that is
        not given are measured on; None where there is no need.
    notes: what a user should know before the run.
    inner_sizes: inner width of each layer (L), where it is to be cut.
    """

    options: Options
    config: "PretrainedConfig"
    vector: list[float] | None
    source: "VectorFile | None"
    tasks: "TaskSet | None"
    test: Windows
    calibration: Windows | None = None
    validation: Windows | None = None
    redundancy: Windows | None = None
    notes: tuple[str, ...] = ()
    inner_sizes: tuple[int, ...] = ()

    @cached_property
    def plan(self) -> Plan:
        """The points that these options allow on this model."""
        return Plan(self.options, int(self.config.hidden_size), self.inner_sizes)


def positions_of(config: "PretrainedConfig") -> int | None:
    """How many tokens a model was made for, where its config says so."""
    found: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


def check_positions(config: "PretrainedConfig", flag: str, length: int) -> None:
    """InputError where windows are longer than the positions that a model was made for."""
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise InputError(f"{flag} is {length}, the model has {positions} positions: choose {positions} or less")


def read_vector(given: tuple[str, ...]) -> "tuple[list[float], VectorFile | None]":
    """LR from the command line: a number a layer, or one JSON file that calculate_LR.py --output wrote; and what such a
    file says of it."""
    if len(given) == 1 and given[0].lower().endswith(".json"):
        from slicing.experiment.results import VectorFile
        from slicing.structure import from_json

        try:
            source = from_json(read_json(local_path(given[0])), VectorFile)
            source.check_lengths()
        except InputError as error:
            raise InputError(f"--vector-cut {given[0]!r}: {error}: give the file that --output wrote") from error
        return source.normalised, source
    try:
        return [float(value) for value in " ".join(given).split()], None  # also of a quoted line
    except ValueError as error:
        raise InputError(f"--vector-cut takes numbers or one .json file: {error}") from error
