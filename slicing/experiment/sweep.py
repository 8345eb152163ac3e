"""The run: a sweep over slice bases, or a search for the best one, its points kept as they end.

The same options go on where an earlier run stopped. Under a launcher the ranks share out the points; rank 0 reports.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from slicing.experiment import identity
from slicing.experiment.comparison import best_dynamic_point
from slicing.experiment.measure import Bench
from slicing.experiment.minimum import golden_section, nearest
from slicing.experiment.names import run_name
from slicing.experiment.options import Checked, Target
from slicing.experiment.ranks import Ranks
from slicing.experiment.results import Point, Redundancy, Results, Search, Trial, VectorFile
from slicing.experiment.store import RunFolder, check_writable, content_key, is_saved_model
from slicing.families import InputError
from slicing.loading import resolve_device
from slicing.rotation import sliced_parameters

BASE_TOLERANCE = 0.005  # of --find-base
_SHARED_FOLDER_DELAY = 90.0  # seconds until a file that one machine wrote must show on another

OnPoint = Callable[[Point, Results], None]
OnModel = Callable[[Path, Point, Results], object]


class Experiment:
    """One run: the bench that its points are measured on, the folder that they are kept in, and the results.

    `folder` is <output_dir>/<model>-<data set>-mean<SP>-<key of the run>: with another content of the model, the texts
    or the tasks it is another run, whatever their names.
    """

    def __init__(self, checked: Checked, ranks: Ranks) -> None:
        self.checked, self.options, self.ranks = checked, checked.options, ranks
        if ranks.first:
            check_writable(Path(self.options.output_dir))  # before the weights are read
        device = resolve_device(ranks.own_device(self.options.cuda_device))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.progress = ranks.first and not self.options.quiet
        self.bench = Bench(checked, device, progress=self.progress, processes=ranks.count)
        key = ranks.from_first(self.bench.run_key() if ranks.first else "")
        options = self.options
        name = run_name(options.model, options.dataset, options.mean, key, options.inner_mean)
        if ranks.first:
            self.folder = RunFolder(Path(self.options.output_dir) / name, fresh=self.options.fresh)
        ranks.wait()
        if not ranks.first:
            self.folder = RunFolder(Path(self.options.output_dir) / name)
        self.results: Results = self.bench.header()
        self._points: dict[str, Point] = {}  # finished ones, by key
        self._reported = 0
        self._best: tuple[Point, PreTrainedModel] | None = None  # of --save-model best, as far as memory allows
        self._bases_are_shared = False
        self._kept = self.folder.finished() if ranks.first else 0

    def run(self, on_point: OnPoint, on_model: OnModel) -> Results:
        """Measure what is missing, call `on_point` for each point in order (in rank 0), and return the results.

        `on_point` gets the point and the results, which hold every point that is finished by then; `on_model` is called
        at the end for each saved model without a card, with its folder, its point and the results.
        """
        vector = self._vector()
        targets = self.checked.targets(vector)
        if vector is not None and self.options.find_base:
            dense, constant = targets[:2]
            targets = [dense, replace(constant, calibration="every-point")]
            best = self._best_base(vector)
            if best.widths != constant.widths:
                targets.append(best)
        self._measure(targets, on_point)
        if vector is not None and self.options.compare == "equal-parameters":
            equal = self.ranks.from_first(self._equal_size(vector) if self.ranks.first else None)
            if equal is not None:
                self._measure([*targets, equal], on_point)
        self._save_models(on_model)
        if len(self.results.points) < self._kept:  # fewer are wanted now than the file holds
            self.folder.write_results(self.results)
        return self.results

    # ---- points

    def _measure(self, targets: Sequence[Target], on_point: OnPoint) -> None:
        """Measure this rank's share of the targets that are not there; rank 0 reports all of them, in order."""
        pairs = [(target, self.bench.point_key(target)) for target in targets]
        keys = [key for _, key in pairs]
        # rank 0 says what is missing: the others might already see points of this very run
        missing = [pair for pair in pairs if self.folder.take_over(Point, pair[1]) is None] if self.ranks.first else []
        missing = self.ranks.from_first(missing)
        mine = self.ranks.share(missing)
        if mine:
            self.bench.check_model()
        if any(target.calibration == "once" for target, _ in missing):
            self._share_bases()
        with self.bench.waiting([target for target, _ in mine]):
            self._report(keys, on_point)
            for target, key in mine:
                self._point(target, key)
                self._report(keys, on_point)
        self.ranks.wait(meanwhile=lambda: self._report(keys, on_point))
        if self.ranks.first:
            self._wait_for_files(lambda: self._report(keys, on_point))

    def _point(self, target: Target, key: str) -> None:
        """Measure and keep a point; save its model before, where all are wanted: a finished point has its model. Where
        that fails, the point is kept all the same."""
        point, model = self.bench.point(target, key)
        try:
            if target.widths is not None and self.options.save_model == "all":
                place = self.folder.model(point)
                if not is_saved_model(place):
                    self.bench.save(model, place)
        finally:
            self.folder.write(Point, key, point)
        if self.options.save_model == "best" and point in self._best_of([*self._points.values(), point]):
            self._best = (point, model) if self.bench.can_keep(model) else None

    @staticmethod
    def _best_of(points: Sequence[Point]) -> list[Point]:
        """The point of lowest perplexity that --save-model best means; none where nothing is sliced."""
        sliced = [point for point in points if point.widths is not None and point.kind != "equal-parameters"]
        return sorted(sliced, key=lambda point: point.perplexity)[:1]

    def _share_bases(self) -> None:
        """The bases of --calibration once in every rank: rank 0 makes the pass, and the others read what it wrote."""
        if self.ranks.count == 1 or self._bases_are_shared:
            return
        self._bases_are_shared = True
        file = self.folder.folder / "bases.pt"
        try:
            if self.ranks.first:
                self.bench.write_bases(file)
            self.ranks.wait()
            if not self.ranks.first:
                self._wait_for_files(file.exists)
                self.bench.read_bases(file)
            self.ranks.wait()
        finally:
            if self.ranks.first:
                file.unlink(missing_ok=True)  # it is mapped by those that need it

    def _wait_for_files(self, are_there: Callable[[], bool]) -> None:
        """Until what other ranks wrote shows on this machine."""
        latest = time.monotonic() + _SHARED_FOLDER_DELAY
        while not are_there():
            if time.monotonic() > latest:
                raise InputError(f"{self.folder.folder} lacks files of other ranks: all need the same --output-dir")
            time.sleep(0.1)

    def _report(self, keys: Sequence[str], on_point: OnPoint) -> bool:
        """Rank 0: write results.json with all finished points, and hand on those that no missing one comes before.
        Whether all are handed on."""
        if not self.ranks.first:
            return False
        for key in keys:
            point = None if key in self._points else self.folder.read(Point, key)
            if point is not None:
                self._points[key] = point
        found = [self._points.get(key) for key in keys]
        finished = [point for point in found if point is not None]
        if len(finished) > len(self.results.points):
            self.results.points = finished
            if len(finished) >= self._kept:  # a run that goes on replaces no file by a shorter one
                self.folder.write_results(self.results)
        while self._reported < len(keys) and (point := found[self._reported]) is not None:
            self._reported += 1
            with tqdm.external_write_mode():
                on_point(point, self.results)
        return self._reported == len(keys)

    # ---- what they are

    def _vector(self) -> list[float] | None:
        """LR (L), as given or as rank 0 measures it, noted in the results; None where nothing is sliced."""
        if self.options.swept == 0:
            return None
        if self.checked.vector is not None:
            vector, source = self.checked.vector, self.checked.source
        else:
            source = self.ranks.from_first(self._measured_redundancy() if self.ranks.first else None)
            assert source is not None
            vector = source.normalised
        self.results.redundancy = Redundancy(vector, None, None)
        if source is not None:
            self.results.redundancy = Redundancy(vector, source.cosine, source.stderr)
            self.results.data.redundancy = source.data
        return vector

    def _measured_redundancy(self) -> VectorFile:
        """LR, measured once and kept: on a GPU another time might give other last digits, and so other points."""
        windows = self.checked.redundancy_windows
        assert windows is not None
        key = self.bench.redundancy_key(windows)
        found = self.folder.take_over(VectorFile, key)
        if found is None:
            found = self.bench.redundancy(windows)
            self.folder.write(VectorFile, key, found)
        return found

    def _best_base(self, vector: list[float]) -> Target:
        """The slice base with the lowest perplexity on the validation split, looked for by rank 0 with one calibration;
        it is to be confirmed with a calibration of its own."""
        found = self.ranks.from_first(self._search(vector) if self.ranks.first else None)
        assert found is not None
        self.results.search = found
        return self.checked.target(self.options.mean, found.base, vector, kind="confirm", calibration="every-point")

    def _search(self, vector: list[float]) -> Search:
        """Each trial is kept as it ends."""
        mean = self.options.mean
        windows = self.checked.validation_windows
        assert windows is not None
        first = self.bench.point_key(self.checked.target(mean, 0.0, vector, kind="search"), windows)
        key = content_key({"first": first, "vector": vector, "round_interval": self.options.round_interval})
        trials = self.folder.take_over(list[Trial], key) or []

        def trial(base: float) -> float:
            for kept in trials:
                if kept.base == base:
                    return kept.perplexity
            target = self.checked.target(mean, base, vector, calibration="once")
            trials.append(Trial(base, self.bench.perplexity(target, windows)))
            self.folder.write(list[Trial], key, trials)
            bar.update()
            return trials[-1].perplexity

        with tqdm(desc="search", unit="trial", initial=len(trials), disable=not self.progress) as bar:
            base = golden_section(trial, 0.0, mean, BASE_TOLERANCE)
        data = identity.text_entry(self.options.dataset, "validation", windows)
        return Search(base, data, trials)

    def _equal_size(self, vector: list[float]) -> Target | None:
        """Constant slicing with the true parameter count of the best dynamic point, found by the count alone."""
        best = best_dynamic_point(self.results, None)
        if best is None:
            return None

        def constant(mean: float) -> Target:
            return self.checked.target(mean, mean, vector, kind="equal-parameters", calibration=best.calibration)

        def parameters(mean: float) -> int:
            target = constant(mean)
            return sliced_parameters(self.bench.model, target.widths or [], self.options.rotations, target.inner_widths)

        sizes = [self.checked.hidden_size] if self.options.mean else []
        sizes += [max(self.checked.inner_sizes)] if self.options.inner_mean else []
        step = self.options.round_interval / (max(sizes) * len(vector))  # one multiple in one layer
        return constant(nearest(parameters, best.parameters, 0.0, self.checked.highest_mean(), step / 2))

    # ---- models

    def _save_models(self, on_model: OnModel) -> None:
        """Slice and save what --save-model wants and no point of this run has saved, shared out over the ranks; then
        write the cards, which need the dense model's point."""
        wanted = [point for point in self.results.points if point.widths is not None]
        if self.options.save_model == "none":
            wanted = []
        elif self.options.save_model == "best":
            wanted = self._best_of(wanted)
        places = [self.folder.model(point) for point in wanted]
        missing = [(point, place) for point, place in zip(wanted, places, strict=True) if not is_saved_model(place)]
        names = ("kind", "mean", "base", "slices", "widths", "calibration", "inner_mean", "inner_base", "inner_widths")
        missing = self.ranks.from_first(missing)
        for point, place in missing:
            if self._best is not None and self._best[0].key == point.key:
                self.bench.save(self._best[1], place)
        self._best = None
        self.ranks.wait()
        missing = self.ranks.from_first([pair for pair in missing if not is_saved_model(pair[1])])
        for point, place in self.ranks.share(missing):
            self.bench.save(self.bench.sliced(Target(**{name: getattr(point, name) for name in names})), place)
        self.ranks.wait()
        if self.ranks.first:
            self._wait_for_files(lambda: all(map(is_saved_model, places)))
            for point, place in zip(wanted, places, strict=True):
                if not (place / "README.md").exists():
                    on_model(place, point, self.results)
