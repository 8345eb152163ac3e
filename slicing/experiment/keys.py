"""The keys that runs, points and what else is kept are known by: hashes of all that their numbers depend on."""

from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicing.experiment import identity
from slicing.experiment.digests import content_key
from slicing.experiment.inputs import Inputs
from slicing.experiment.options import Options
from slicing.experiment.plan import Target
from slicing.experiment.results import SCHEMA_VERSION
from slicing.experiment.windows import Windows
from slicing.flags import values_for
from slicing.speed import Turns
from slicing.structure import as_json
from slicing.task_content import task_content


class Keys:
    """Of a run of `inputs` with a model, whose weights are read once, here: best while they are on the CPU."""

    def __init__(
        self, inputs: Inputs, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
    ) -> None:
        self.inputs, self.options, self._tokenizer = inputs, inputs.options, tokenizer
        versions = as_json(identity.versions(self.options))
        self._every_number: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "model": identity.model_content(model),
            "versions": {name: value for name, value in versions.items() if name != "lm_eval"},
            "device": identity.device_name(device),
        }

    def run(self) -> str:
        """Of all that the points of this run come from: runs with the same one have one folder."""
        windows = (self.inputs.calibration, self.inputs.validation, self.inputs.redundancy)
        return content_key(
            self._every_number
            | {
                "options": values_for(self.options, "point", "run"),
                "vector": self.inputs.vector,
                "perplexity": self.inputs.test.key,
                "windows": [None if one is None else one.key for one in windows],
                "tasks": self.scores,
            }
        )

    def point(self, target: Target, windows: Windows | None = None) -> str:
        """Of a point measured on these windows, by default those of the perplexity."""
        sliced = target.widths is not None
        calibration, options = self.inputs.calibration, values_for(self.options, "point")
        tasks = self.inputs.tasks
        if not sliced and not (tasks and tasks.loaded.takes_chance(self.options.num_fewshot)):
            options["seed"] = Options.seed  # a run with another seed takes the dense model's point over
        return content_key(
            self._every_number
            | {
                "target": {
                    name: value
                    for name, value in asdict(target).items()
                    if value is not None or not name.startswith("inner_")  # keys from before there were inner widths
                },
                "rotations": self.options.rotations if sliced else None,
                "options": options,
                "tasks": self.scores,
                "calibration": calibration.key if sliced and calibration is not None else None,
                "perplexity": (windows or self.inputs.test).key,
            }
            | (self._solving if sliced else {})
        )

    def speed(self, point: str, turns: Turns) -> str:
        """Of the speed of the point with this key."""
        return content_key({"point": point, "turns": asdict(turns)})

    def redundancy(self, windows: Windows) -> str:
        """Of LR measured on these windows."""
        return content_key(self._every_number | {"windows": windows.key, "batch_size": self.options.batch_size})

    def search(self, vector: list[float], windows: Windows) -> str:
        """Of a search for the best base by LR (L), on these windows."""
        first = self.inputs.plan.target(self.options.mean, 0.0, vector, kind="search")
        round_interval = self.options.round_interval
        return content_key({"first": self.point(first, windows), "vector": vector, "round_interval": round_interval})

    @cached_property
    def scores(self) -> dict[str, Any] | None:
        """What scores depend on besides; None where there are no tasks."""
        options, tasks = self.options, self.inputs.tasks
        if tasks is None:
            return None
        return {
            "lm_eval": identity.versions(options).lm_eval,
            "tokenizer": identity.tokenizer_content(self._tokenizer),
            "tasks": task_content(tasks, limit=options.accuracy_limit, num_fewshot=options.num_fewshot),
        }

    @property
    def _solving(self) -> dict[str, Any]:
        """How the weights are found, where that is not the paper's way: keys of its points stay as they were."""
        how = {"metric": (self.options.metric, "pca"), "refit": (self.options.refit, False)}
        return {name: value for name, (value, plain) in how.items() if value != plain}
