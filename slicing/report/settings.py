"""What tells runs apart besides model, mean and text: each setting once, for CSV, table and labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slicing.experiment.names import text_name
from slicing.experiment.results import Results, Text


@dataclass(frozen=True)
class Setting:
    """A setting of a run.

    name: its column in the CSV and for --columns. words: for a label, with {} for the value. value: None where a run
    has none, because nothing is sliced or no task is evaluated.
    """

    name: str
    words: str
    value: Callable[[Results], Any]

    def label(self, run: Results) -> str:
        """The value in words."""
        if self.name == "calibration_text" and self.value(run) == run.data.perplexity.source:
            return "calibrated on its own text"
        return self.words.format(shown_value(self, run))


def _calibration(value: Callable[[Text], Any]) -> Callable[[Results], Any]:
    return lambda run: None if run.data.calibration is None else value(run.data.calibration)


def _round_interval(run: Results) -> Any:
    return run.arguments.get("round_interval") if run.redundancy else None


def _limit(run: Results) -> Any:
    return run.arguments.get("accuracy_limit") if run.tasks else None


def shots(run: Results) -> str | None:
    """Examples in the prompt of the run's tasks: a number, or one for each task; None without tasks."""
    found = {name: task.shots for name, task in run.tasks.items()}
    if not found:
        return None
    if len(set(found.values())) == 1:
        return _number(next(iter(found.values())))
    return " ".join(f"{name}:{_number(count)}" for name, count in found.items())


def _number(count: int | None) -> str:
    return "mixed" if count is None else str(count)


SETTINGS = (
    Setting("calibration_text", "calibrated on {}", _calibration(lambda text: text.source)),
    Setting("calibration_samples", "{} calibration windows", _calibration(lambda text: text.windows)),
    Setting("calibration_length", "calibration windows of {}", _calibration(lambda text: text.length)),
    Setting("round_interval", "multiples of {}", _round_interval),
    Setting("dtype", "{}", lambda run: run.model.dtype),
    Setting("device", "{}", lambda run: run.device),
    Setting("windows", "{} windows", lambda run: run.data.perplexity.windows),
    Setting("window_length", "windows of {}", lambda run: run.data.perplexity.length),
    Setting("limit", "{} documents a task", _limit),
    Setting("shots", "{} shots", shots),
)


def differing(runs: Sequence[Results]) -> list[Setting]:
    """The settings by which runs that have them differ."""
    found = []
    for setting in SETTINGS:
        having = [run for run in runs if shown_value(setting, run) != "-"]
        if len({setting.label(run) for run in having}) > 1:
            found.append(setting)
    return found


def shown_value(setting: Setting, run: Results) -> str:
    """For a cell."""
    value = setting.value(run)
    if setting.name == "limit" and run.tasks:
        return "all" if value is None else str(value)
    if value is None:
        return "-"
    return text_name(value) if setting.name == "calibration_text" else str(value)
