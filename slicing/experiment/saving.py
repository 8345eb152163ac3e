"""The sliced models that --save-model keeps: each whole or not there, with a card in the end."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from slicing.devices import free_bytes, free_memory, model_bytes
from slicing.experiment.measure import Measurement
from slicing.experiment.plan import Target
from slicing.experiment.ranks import Ranks
from slicing.experiment.results import Point, Results
from slicing.experiment.run_folder import RunFolder
from slicing.families import InputError
from slicing.files import new_folder, read_json

OnModel = Callable[[Path, Point, Results], object]


class SavedModels:
    """The models of a run that are to be kept. wanted: none, best or all."""

    def __init__(self, wanted: str, measurement: Measurement, folder: RunFolder) -> None:
        self.wanted, self.measurement, self.folder = wanted, measurement, folder
        self._best: tuple[Point, PreTrainedModel] | None = None  # as far as memory allows

    def measured(self, point: Point, model: PreTrainedModel) -> None:
        """A point was measured: its model is saved before the point is kept, where all are wanted: a finished point has
        its model."""
        if self.wanted == "all" and point.widths is not None and not is_saved_model(self.folder.model(point)):
            self._save(model, point)

    def compared(self, point: Point, model: PreTrainedModel, others: Iterable[Point]) -> None:
        """A point was measured after these: its model stays in memory where it is the best so far."""
        if self.wanted == "best" and point in best_of([*others, point]):
            self._best = (point, model) if can_keep(model) else None

    def finish(
        self, results: Results, ranks: Ranks, wait_for: Callable[[Callable[[], bool]], None], on_model: OnModel
    ) -> None:
        """Slice and save what is wanted and no point of this run has saved, shared out over the ranks. Rank 0, which
        has the points, waits for the files by `wait_for` and calls `on_model` for each model without a card."""
        points = [point for point in results.points if point.widths is not None]
        points = {"none": [], "best": best_of(points), "all": points}[self.wanted]
        missing = ranks.from_first([point for point in points if not is_saved_model(self.folder.model(point))])
        for point in missing:
            if self._best is not None and self._best[0].key == point.key:
                self._save(self._best[1], point)
        self._best = None
        ranks.wait()
        missing = ranks.from_first([point for point in missing if not is_saved_model(self.folder.model(point))])
        for point in ranks.share(missing):
            self._save(self.measurement.slicer.sliced(_target(point), self.measurement.progress), point)
        ranks.wait()
        if ranks.first:
            places = [self.folder.model(point) for point in points]
            wait_for(lambda: all(map(is_saved_model, places)))
            for point, place in zip(points, places, strict=True):
                if not (place / "README.md").exists():
                    on_model(place, point, results)

    def _save(self, model: PreTrainedModel, point: Point) -> None:
        save(model, self.measurement.tokenizer, self.folder.model(point))


def best_of(points: Sequence[Point]) -> list[Point]:
    """The point of lowest perplexity that --save-model best means; none where nothing is sliced."""
    sliced = [point for point in points if point.widths is not None and point.kind != "equal-parameters"]
    return sorted(sliced, key=lambda point: point.perplexity)[:1]


def _target(point: Point) -> Target:
    """What a point was measured for."""
    names = ("kind", "mean", "base", "slices", "widths", "calibration", "inner_mean", "inner_base", "inner_widths")
    return Target(**{name: getattr(point, name) for name in names})


def can_keep(model: PreTrainedModel) -> bool:
    """Whether a sliced model can stay in memory while others are sliced and measured; it goes to the CPU where the
    device has less room."""
    needed = 3 * model_bytes(model)  # it is there already: the next one, and what measuring it takes
    if model.device.type == "cuda" and free_bytes(model.device) < needed:
        if free_memory() < needed:
            return False
        model.to("cpu")
    return model.device.type == "cuda" or free_memory() > needed


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a sliced model with its tokenizer, in one step; one that another run has saved meanwhile stays."""
    try:
        with new_folder(folder, is_saved_model) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except Exception as error:
        # a full disk comes as OSError, as SafetensorError, and as a bare Exception of `tokenizers`
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"can't save the sliced model as {folder} ({why}): make room, and the same command goes on; the points"
            " measured are kept"
        ) from error


def is_saved_model(folder: Path) -> bool:
    """Whether a folder holds a whole saved model: its config, the code that this names and what that imports, and all
    of its weights, as long as they say they are."""
    try:
        index = folder / "model.safetensors.index.json"
        names = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
        for name in names:
            with safe_open(folder / name, framework="pt"):
                pass
        for name in {path.partition(".")[0] for path in read_json(folder / "config.json").get("auto_map", {}).values()}:
            get_relative_import_files(folder / f"{name}.py")
        return True
    except (OSError, SafetensorError, InputError, KeyError, TypeError, AttributeError):
        return False
