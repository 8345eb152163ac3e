"""The run as a whole: a sweep over slice bases, or a search for the best one, its points kept as they end.

The same options go on where an earlier run stopped. Under a launcher the ranks share out the points; rank 0 reports.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from slicing.experiment.header import header
from slicing.experiment.inputs import Inputs
from slicing.experiment.keys import Keys
from slicing.experiment.measure import Measurement
from slicing.experiment.names import run_name
from slicing.experiment.plan import Missing, Target
from slicing.experiment.ranks import Ranks
from slicing.experiment.results import Point, Redundancy, Results, Speed
from slicing.experiment.run_folder import RunFolder, check_writable
from slicing.experiment.saving import OnModel, SavedModels
from slicing.experiment.search import equal_size, find_slice_base
from slicing.experiment.slicer import Slicer
from slicing.experiment.vector import find_vector
from slicing.families import InputError
from slicing.loading import load_model, resolve_device

_SHARED_FOLDER_DELAY = 90.0  # seconds until a file that one machine wrote must show on another

OnPoint = Callable[[Point, Results], None]


class Experiment:
    """One run: what measures its points, the folder that they are kept in, and the results.

    `folder` is <output_dir>/<model>-<data set>-mean<SP>-<key of the run>: with another content of the model, the texts
    or the tasks it is another run, whatever their names.
    """

    def __init__(self, inputs: Inputs, ranks: Ranks) -> None:
        self.inputs, self.options, self.ranks = inputs, inputs.options, ranks
        options = self.options
        if ranks.first:
            check_writable(Path(options.output_dir))  # before the weights are read
        device = resolve_device(ranks.own_device(options.cuda_device))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model, tokenizer = load_model(
            options.model,
            device="cpu",
            dtype=options.dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
        self.keys = Keys(inputs, model, tokenizer, device)
        self.slicer = Slicer(inputs, model, device, processes=ranks.count)
        self.results = header(inputs, model, device, self.keys)
        progress = ranks.first and not options.quiet
        self.measurement = Measurement(inputs, self.slicer, tokenizer, self.results, progress=progress)
        self.folder = self._shared_folder()
        self.models = SavedModels(options.save_model, self.measurement, self.folder)
        self._points: dict[str, Point] = {}  # finished ones, by key
        self._reported = 0
        self._bases_are_shared = False
        before = self.folder.results() if ranks.first else None
        self._kept = 0 if before is None else len(before.points)
        self.results.check_seconds = None if before is None else before.check_seconds

    def _shared_folder(self) -> RunFolder:
        """Rank 0 makes it, and starts over where that is wanted, before the others look."""
        options, ranks = self.options, self.ranks
        key = ranks.from_first(self.keys.run() if ranks.first else "")
        name = run_name(options.model, options.dataset, options.mean, key, options.inner_mean)
        place = Path(options.output_dir) / name
        folder = RunFolder(place, fresh=options.fresh) if ranks.first else None
        ranks.wait()
        return folder or RunFolder(place)

    def run(self, on_point: OnPoint, on_model: OnModel) -> Results:
        """Measure what is missing, call `on_point` for each point in order (in rank 0), and return the results.

        `on_point` gets the point and the results, which hold every point that is finished by then; `on_model` is called
        at the end for each saved model without a card, with its folder, its point and the results.
        """
        vector = self._vector()
        targets = self.inputs.plan.targets(vector)
        if vector is not None and self.options.find_base:
            targets = self._searched(vector, dense=targets[0], constant=targets[1])
        self._measure(targets, on_point)
        if vector is not None and self.options.compare == "equal-parameters":
            found = equal_size(self.inputs, vector, self.slicer.model, self.results) if self.ranks.first else None
            equal = self.ranks.from_first(found)
            if equal is not None:
                self._measure([*targets, equal], on_point)
        self.models.finish(self.results, self.ranks, self._wait_for_files, on_model)
        if len(self.results.points) < self._kept:  # fewer are wanted now than the file holds
            self.folder.write_results(self.results)
        return self.results

    # ---- which points

    def _vector(self) -> list[float] | None:
        """LR (L), noted in the results; None where nothing is sliced."""
        found = find_vector(self.inputs, self.ranks, self.folder, self.keys, self.measurement)
        if found is None:
            return None
        self.results.redundancy = Redundancy(found.normalised, found.cosine, found.stderr)
        self.results.data.redundancy = found.data
        return found.normalised

    def _searched(self, vector: list[float], *, dense: Target, constant: Target) -> list[Target]:
        """The dense model, constant slicing, and the slice base that rank 0 finds, if it is another one: each with a
        calibration of its own."""
        found = None
        if self.ranks.first:
            found = find_slice_base(self.inputs, vector, self.folder, self.keys, self.measurement)
        self.results.search = found = self.ranks.from_first(found)
        assert found is not None
        plan, once_each = self.inputs.plan, "every-point"
        best = plan.target(self.options.mean, found.base, vector, kind="confirm", calibration=once_each)
        targets = [dense, replace(constant, calibration=once_each)]
        return targets if best.widths == constant.widths else [*targets, best]

    # ---- measured and reported

    def _measure(self, targets: Sequence[Target], on_point: OnPoint) -> None:
        """Measure this rank's share of the targets that are not there; rank 0 reports all of them, in order."""
        keys = [self.keys.point(target) for target in targets]
        # rank 0 says what is missing: the others might already see points of this very run
        missing = self.ranks.from_first(self._missing(targets, keys) if self.ranks.first else [])
        mine = self.ranks.share(missing)
        if any(one.point for one in mine):
            seconds = self.slicer.check()
            self.results.check_seconds = self.results.check_seconds or seconds
        if any(one.point and one.target.calibration == "once" for one in missing):
            self._share_bases()
        with self.measurement.waiting(mine):
            self._report(keys, on_point)
            for one in mine:
                self.measurement.begin(one.target)
                if one.point:
                    self._point(one.target, one.key)
                if one.speed:
                    self.folder.write(Speed, self._speed_key(one.key), self.measurement.speed(one.target))
                self._report(keys, on_point)
        self.ranks.wait(meanwhile=lambda: self._report(keys, on_point))
        if self.ranks.first:
            self._wait_for_files(lambda: self._report(keys, on_point))

    def _missing(self, targets: Sequence[Target], keys: Sequence[str]) -> list[Missing]:
        found = []
        for target, key in zip(targets, keys, strict=True):
            point = self.folder.take_over(Point, key) is None
            speed = self.options.speed and self.folder.take_over(Speed, self._speed_key(key)) is None
            if point or speed:
                found.append(Missing(target, key, point, speed))
        return found

    def _speed_key(self, key: str) -> str:
        return self.keys.speed(key, self.measurement.turns)

    def _point(self, target: Target, key: str) -> None:
        """Measure and keep a point, also where its model can't be saved."""
        point, model = self.measurement.point(target, key)
        try:
            self.models.measured(point, model)
        finally:
            self.folder.write(Point, key, point)
        self.models.compared(point, model, self._points.values())

    def _report(self, keys: Sequence[str], on_point: OnPoint) -> bool:
        """Rank 0: write results.json with all finished points, and hand on those that no missing one comes before.
        Whether all are handed on."""
        if not self.ranks.first:
            return False
        for key in keys:
            point = None if key in self._points else self.folder.read(Point, key)
            if point is None:
                continue
            point.speed = self.folder.read(Speed, self._speed_key(key))  # where an earlier call measured it, too
            if point.speed is not None or not self.options.speed:
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

    # ---- between the ranks

    def _share_bases(self) -> None:
        """The bases of --calibration once in every rank: rank 0 makes the pass, and the others read what it wrote."""
        if self.ranks.count == 1 or self._bases_are_shared:
            return
        self._bases_are_shared = True
        file = self.folder.folder / "bases.pt"
        try:
            if self.ranks.first:
                self.slicer.write_bases(file, self.measurement.progress)
            self.ranks.wait()
            if not self.ranks.first:
                self._wait_for_files(file.exists)
                self.slicer.read_bases(file)
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
