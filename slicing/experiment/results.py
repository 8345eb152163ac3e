"""What results.json holds, as structures: read, checked and written by their fields, which say what each key holds."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from msgspec import field

from slicing.families import InputError
from slicing.files import read_json
from slicing.structure import Structure, as_json, from_json
from slicing.task_scores import TaskScore

SCHEMA_VERSION = 3  # 2 had no reason of a task's score, and a value for each: read as 3
Kind = Literal["dense", "sweep", "equal-parameters", "confirm"]
Part = Literal["slice", "perplexity", "tasks"]
PARTS: tuple[Part, ...] = get_args(Part)  # of the work on a point


class Text(Structure):
    """Windows of a text."""

    source: Annotated[str, "data set, text file or demo"]
    split: Annotated[str | None, "part of the data set"]
    windows: Annotated[int, "number of windows N"]
    length: Annotated[int, "tokens a window S"]
    tokens: Annotated[int, "N * S"]


class Model(Structure):
    """The dense model."""

    name: Annotated[str, "hub name, folder, .gguf file or demo"]
    revision: Annotated[str | None, "commit on the hub"]
    model_type: Annotated[str, "family, as in config.json"]
    dtype: Annotated[str, "dtype of the weights"]
    parameters: Annotated[int, "unique parameters"]
    tied: Annotated[bool, "whether the head is the embedding table"]
    hidden_size: Annotated[int, "D"]
    layers: Annotated[int, "decoder layers L"]


class Versions(Structure):
    """Of what the numbers depend on."""

    python: Annotated[str, "as platform.python_version() has it"]
    torch: Annotated[str, "with the kind of its build"]
    transformers: Annotated[str, "as it is installed"]
    lm_eval: Annotated[str | None, "null where no task was evaluated"]


class Data(Structure):
    """The text."""

    perplexity: Annotated[Text, "windows of the perplexity"]
    calibration: Annotated[Text | None, "windows that the bases come from"]
    redundancy: Annotated[Text | None, "windows of LR; null where the vector was given as numbers"]


Cosines = Annotated[list[float] | None, "mean cosine similarity before normalisation (L)"]
Errors = Annotated[list[float] | None, "standard error of the cosine over the windows (L); null of one window"]


class Redundancy(Structure):
    """Layer redundancy."""

    normalised: Annotated[list[float], "LR of each layer (L)"]
    cosine: Cosines
    stderr: Errors

    def check_lengths(self) -> None:
        """InputError unless there is a value a layer in each vector."""
        for name in ("cosine", "stderr"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.normalised):
                raise InputError(f"{name} has {len(values)} values, normalised {len(self.normalised)}")


class VectorFile(Redundancy, forbid_unknown_fields=False):
    """LR in a file of its own: what calculate_LR.py --output writes, and what a run keeps of its own measurement."""

    cosine: Cosines = None
    stderr: Errors = None
    arguments: Annotated[dict[str, Any] | None, "the options of calculate_LR.py, as given"] = None
    data: Annotated[Text | None, "windows of LR"] = None


class Trial(Structure):
    """A slice base that was tried."""

    base: Annotated[float, "SB"]
    perplexity: Annotated[float, "with the bases of the dense model (calibration once)"]


class Search(Structure):
    """Of --find-base."""

    base: Annotated[float, "SB with the lowest perplexity"]
    data: Annotated[Text, "windows of the search"]
    trials: Annotated[list[Trial], "each slice base that was tried"]


class Task(Structure):
    """What was asked of a task or group."""

    version: Annotated[str | None, "lm-eval's version of it"]
    content: Annotated[str, "hash of its documents, settings and functions"]
    shots: Annotated[int | None, "examples in the prompt; null of a group whose tasks differ"]


class Seconds(Structure):
    """Wall time by part of the work on a point; null where the part was not run."""

    slice: Annotated[float | None, "rotating and slicing"]
    perplexity: Annotated[float | None, "its windows"]
    tasks: Annotated[float | None, "their requests"]


class PeakMemory(Structure):
    """Highest memory by part of the work on a point, in bytes; null where it is not known."""

    slice: Annotated[int | None, "rotating and slicing"]
    perplexity: Annotated[int | None, "its windows"]
    tasks: Annotated[int | None, "their requests"]


class Speed(Structure, kw_only=True):
    """Of a model, by turns with the dense one; tokens a second are those of the median turn."""

    windows: Annotated[int, "that one turn of prefill reads at once"]
    length: Annotated[int, "tokens of each"]
    cache_length: Annotated[int, "tokens that each step of decoding one sequence attends to"]
    repeats: Annotated[int, "turns of each model"]
    prefill: Annotated[float, "tokens a second"]
    dense_prefill: Annotated[float, "the dense model's"]
    decode: Annotated[float | None, "tokens a second; null where the family has no cache of fixed size"]
    dense_decode: Annotated[float | None, "the dense model's"]
    memory: Annotated[int | None, "bytes of the weights and of what prefill needs besides; null on a CPU"]
    dense_memory: Annotated[int | None, "the dense model's"]


class Point(Structure, kw_only=True):
    """A model that was measured. What is absent in points of earlier versions has a default."""

    key: Annotated[str, "name of the point's file"]
    git: Annotated[str | None, "commit of this repository that measured the point"]
    kind: Annotated[Kind, "confirm: the base that --find-base found"]
    mean: Annotated[
        float | None,
        "SP, of the inner widths where only they are cut; null for the dense model, as are the next eleven",
    ]
    base: Annotated[float | None, "SB"]
    amount: Annotated[float | None, "SP - SB; 0 is constant slicing"]
    slices: Annotated[list[float] | None, "FS of each layer (L)"]
    widths: Annotated[list[int] | None, "width of each layer (L)"]
    rotations: Annotated[int | None, "bases a layer, 1 or 2"]
    metric: Annotated[str | None, "of the bases: pca or gradient; points from before it are pca"] = None
    refit: Annotated[bool | None, "whether the writers were solved anew"] = None
    inner_mean: Annotated[float | None, "SP of the MLPs' inner widths; null where these are not cut"] = None
    inner_base: Annotated[float | None, "SB of the inner widths"] = None
    inner_widths: Annotated[list[int] | None, "inner width of each layer (L)"] = None
    calibration: Annotated[str | None, "every-point or once"]
    parameters: Annotated[int, "unique parameters, shortcuts and head included"]
    cut: Annotated[float, "1 - parameters / those of the dense model"]
    perplexity: Annotated[float, "exp of the mean of nll"]
    nll: Annotated[list[float], "mean negative log likelihood of a token, in nats, for each window (N)"]
    tasks: Annotated[dict[str, TaskScore], "scores by task name; {} where there are none"]
    mean_accuracy: Annotated[
        float | None, "mean of the values that are accuracies; null where none is, or a score has no value"
    ]
    seconds: Annotated[Seconds, "wall time by part; null where it was not run"]
    peak_memory_bytes: Annotated[
        PeakMemory, "highest memory by part, on one card; of the process so far on a CPU; null where unknown"
    ]
    speed: Annotated[Speed | None, "of --speed; in a file of its own, not in that of the point"] = None


class Results(Structure, kw_only=True):
    """A results.json."""

    schema_version: Annotated[int, f"{SCHEMA_VERSION}"]
    arguments: Annotated[dict[str, Any], "the options of the run, as given"]
    model: Annotated[Model, "the dense model"]
    versions: Annotated[Versions, "of what the numbers depend on"]
    git: Annotated[
        str | None, "commit of this repository that wrote the file last, -dirty where files differed from it"
    ]
    device: Annotated[str, "name of the card, or cpu"]
    seed: Annotated[int, "of the calibration windows and the examples in prompts"]
    data: Annotated[Data, "the text"]
    redundancy: Annotated[Redundancy | None, "layer redundancy; null where nothing is sliced"]
    search: Annotated[Search | None, "of --find-base: where the lowest perplexity was looked for, and found"]
    check_seconds: Annotated[
        float | None, "of the self-check of the model's layers before the first slicing; null where nothing was sliced"
    ] = None
    tasks: Annotated[dict[str, Task], "what was asked of each task or group, by its name"] = field(default_factory=dict)
    points: Annotated[list[Point], "dense, constant slicing, the amounts up to the mean, then the extra kinds"]


def read_results(folder: str | Path) -> Results:
    """The results.json of a run's folder. InputError where it is missing, damaged or not what the fields say."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise InputError(f"there is no {path}: give the folder of a run")
    try:
        content = read_json(path)
    except InputError as error:
        raise InputError(f"{error}: the same experiment run again writes it anew") from error
    try:
        return results_of(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def results_of(content: Any) -> Results:
    """What a results.json holds, as results; those of schema 2 as today's. InputError, which names the key, where they
    are of another version, or not what the fields say, or a list has not a value a layer or a window."""
    if isinstance(content, dict):
        _check_version(content)
        if content["schema_version"] == 2:
            _upgrade(content)
    results = from_json(content, Results)
    layers, windows = results.model.layers, results.data.perplexity.windows
    lists = [] if results.redundancy is None else [("redundancy.normalised", results.redundancy.normalised, layers)]
    for i, point in enumerate(results.points):
        of_layers = (("slices", point.slices), ("widths", point.widths), ("inner_widths", point.inner_widths))
        lists += [(f"points[{i}].{name}", list(values), layers) for name, values in of_layers if values is not None]
        lists += [(f"points[{i}].nll", point.nll, windows)]
    for label, values, length in lists:
        if len(values) != length:
            raise InputError(f"{label} has {len(values)} values: there must be {length}")
    return results


def check_results(results: Results) -> None:
    """InputError, which names the key, where results made by the code are not what the fields say."""
    results_of(as_json(results))


def _check_version(content: dict[str, Any]) -> None:
    version = content.get("schema_version")
    if version in (2, SCHEMA_VERSION) and not isinstance(version, bool):
        return
    commit = content.get("git")
    wrote = f"the code that wrote it, commit {commit}" if isinstance(commit, str) else "the code that wrote it"
    raise InputError(f"schema_version is {version!r}, known are 2 and {SCHEMA_VERSION}: read it with {wrote}")


def _upgrade(content: dict[str, Any]) -> None:
    """Turn what a file of schema 2 holds into today's; what is damaged is left to the check of the fields."""
    content["schema_version"] = SCHEMA_VERSION
    points = content.get("points")
    for point in points if isinstance(points, list) else []:
        tasks = point.get("tasks") if isinstance(point, dict) else None
        for score in tasks.values() if isinstance(tasks, dict) else []:
            if isinstance(score, dict):
                score.setdefault("reason", None)
