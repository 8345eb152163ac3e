"""One point: the model sliced, its perplexity and its scores, timed; and what is measured of the dense model alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from msgspec.structs import replace
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicing.devices import on_devices
from slicing.experiment.comparison import mean_accuracy
from slicing.experiment.inputs import Inputs, positions_of
from slicing.experiment.plan import Missing, Target
from slicing.experiment.results import Part, Point, Results, Speed, VectorFile
from slicing.experiment.slicer import Slicer
from slicing.experiment.throughput import measured_speed
from slicing.experiment.timing import Timing
from slicing.experiment.waiting import RunBar
from slicing.experiment.windows import Windows
from slicing.families import InputError
from slicing.likelihood import perplexity, window_nll
from slicing.modeling import count_parameters
from slicing.redundancy import layer_redundancy
from slicing.speed import Turns
from slicing.structure import from_json
from slicing.task_scores import TaskScore
from slicing.tasks import evaluate_tasks

_WORST_NLL = 200  # nats a token; a perplexity of 10^87 is no result, and soon no number


class Measurement:
    """What measures the points of a run whose results are `about`: they have its commit and the dense model's size."""

    def __init__(
        self, inputs: Inputs, slicer: Slicer, tokenizer: PreTrainedTokenizerBase, about: Results, *, progress: bool
    ) -> None:
        self.inputs, self.options = inputs, inputs.options
        self.slicer, self.tokenizer, self.about = slicer, tokenizer, about
        self.turns = Turns.of(slicer.device, positions_of(inputs.config))
        self.progress: bool | RunBar = progress

    def begin(self, target: Target) -> None:
        """What is measured next is of this point."""
        if isinstance(self.progress, RunBar):
            self.progress.point("dense" if target.base is None else f"SB {target.base:.3f}")

    def point(self, target: Target, key: str) -> tuple[Point, PreTrainedModel]:
        """Slice and measure: what results.json has of a point, and the model that was measured."""
        assert target.kind != "search"  # which stands for no point of its own
        timing, model = Timing(self.slicer.device), self.slicer.model
        tasks: dict[str, TaskScore] = {}
        if target.widths is not None:
            with self._part("slice", timing):
                model = self.slicer.sliced(target, self.progress)
        with on_devices(model, self.slicer.device):
            with self._part("perplexity", timing):
                nll = self._nll(model)
            if self.inputs.tasks is not None:
                with self._part("tasks", timing):
                    tasks = self._scores(model)
        parameters, sliced = count_parameters(model), target.widths is not None
        point = Point(
            key=key,
            git=self.about.git,
            kind=target.kind,
            mean=target.mean,
            base=target.base,
            amount=target.amount,
            slices=target.slices,
            widths=target.widths,
            rotations=self.options.rotations if sliced else None,
            metric=self.options.metric if sliced else None,
            refit=self.options.refit if sliced else None,
            inner_mean=target.inner_mean,
            inner_base=target.inner_base,
            inner_widths=target.inner_widths,
            calibration=target.calibration,
            parameters=parameters,
            cut=1 - parameters / self.about.model.parameters,
            perplexity=nll.mean().exp().item(),
            nll=nll.tolist(),
            tasks=tasks,
            mean_accuracy=mean_accuracy(tasks),
            seconds=timing.seconds,
            peak_memory_bytes=timing.memory,
        )
        return point, model

    def speed(self, target: Target) -> Speed:
        """Speed and memory at a target's widths, beside the dense model's."""
        with self.progress.part("speed") if isinstance(self.progress, RunBar) else nullcontext():
            return measured_speed(
                self.slicer.model,
                self.inputs.test.ids,
                target.widths,
                rotations=self.options.rotations,
                inner_widths=target.inner_widths,
                turns=self.turns,
            )

    def perplexity(self, target: Target, windows: Windows) -> float:
        """Perplexity of a sliced model."""
        with on_devices(self.slicer.sliced(target, self.progress), self.slicer.device) as model:
            return perplexity(model, windows.ids, batch_size=self.options.batch_size, progress=self.progress)

    def redundancy(self, windows: Windows) -> VectorFile:
        """LR of the dense model."""
        with on_devices(self.slicer.model, self.slicer.device) as model:
            found = layer_redundancy(model, windows.ids, batch_size=self.options.batch_size, progress=self.progress)
        return replace(from_json(found.as_dict(), VectorFile), data=windows.entry())

    @contextmanager
    def waiting(self, missing: Sequence[Missing]) -> Iterator[None]:
        """One bar while these points are measured, in order, in place of one for each piece of work."""
        if not (self.progress and missing):
            yield
            return
        tasks = ["tasks"] if self.inputs.tasks is not None else []
        parts = []
        for one in missing:
            whole = [*(["slice"] if one.target.widths else []), "perplexity", *tasks] if one.point else []
            parts.append([*whole, *(["speed"] if one.speed else [])])
        before = self.progress
        with RunBar(parts) as self.progress:
            try:
                yield
            finally:
                self.progress = before

    @contextmanager
    def _part(self, name: Part, timing: Timing) -> Iterator[None]:
        with self.progress.part(name) if isinstance(self.progress, RunBar) else nullcontext(), timing.part(name):
            yield

    def _nll(self, model: PreTrainedModel) -> torch.Tensor:
        """Of each window of the perplexity, (N,). InputError where it is no language model's."""
        nll = window_nll(model, self.inputs.test.ids, batch_size=self.options.batch_size, progress=self.progress)
        if nll.mean() > _WORST_NLL:
            raise InputError(
                f"the mean negative log likelihood is {nll.mean():.4g} nats, more than {_WORST_NLL}: this is no"
                " language model; check its weights and --dtype"
            )
        return nll

    def _scores(self, model: PreTrainedModel) -> dict[str, TaskScore]:
        assert self.inputs.tasks is not None
        options = self.options
        return evaluate_tasks(
            model,
            self.tokenizer,
            self.inputs.tasks,
            limit=options.accuracy_limit,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            seed=options.seed,
            progress=self.progress,
        )
