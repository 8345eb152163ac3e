"""Points that are looked for: the best slice base, and constant slicing of the best dynamic point's size."""

from tqdm import tqdm
from transformers import PreTrainedModel

from slicing.experiment.comparison import best_dynamic_point
from slicing.experiment.inputs import Inputs
from slicing.experiment.keys import Keys
from slicing.experiment.measure import Measurement
from slicing.experiment.minimum import golden_section, nearest
from slicing.experiment.plan import Target
from slicing.experiment.results import Results, Search, Trial
from slicing.experiment.run_folder import RunFolder
from slicing.rotation import sliced_parameters

TOLERANCE = 0.005  # of SB, in --find-base


def find_slice_base(
    inputs: Inputs, vector: list[float], folder: RunFolder, keys: Keys, measurement: Measurement
) -> Search:
    """The slice base with the lowest perplexity on the validation split, with one calibration for all trials; each is
    kept as it ends."""
    mean, windows = inputs.options.mean, inputs.validation
    assert windows is not None
    key = keys.search(vector, windows)
    trials = folder.take_over(list[Trial], key) or []

    def trial(base: float) -> float:
        for kept in trials:
            if kept.base == base:
                return kept.perplexity
        target = inputs.plan.target(mean, base, vector, calibration="once")
        trials.append(Trial(base, measurement.perplexity(target, windows)))
        folder.write(list[Trial], key, trials)
        bar.update()
        return trials[-1].perplexity

    with tqdm(desc="search", unit="trial", initial=len(trials), disable=not measurement.progress) as bar:
        base = golden_section(trial, 0.0, mean, TOLERANCE)
    return Search(base, windows.entry(), trials)


def equal_size(inputs: Inputs, vector: list[float], model: PreTrainedModel, results: Results) -> Target | None:
    """Constant slicing with the true parameter count of the best dynamic point, found by the count alone; None where
    there is no dynamic point."""
    options, best = inputs.options, best_dynamic_point(results, None)
    if best is None:
        return None

    def constant(mean: float) -> Target:
        return inputs.plan.target(mean, mean, vector, kind="equal-parameters", calibration=best.calibration)

    def parameters(mean: float) -> int:
        target = constant(mean)
        return sliced_parameters(model, target.widths or [], options.rotations, target.inner_widths)

    sizes = [inputs.plan.hidden_size] if options.mean else []
    sizes += [max(inputs.inner_sizes)] if options.inner_mean else []
    step = options.round_interval / (max(sizes) * len(vector))  # one multiple in one layer
    return constant(nearest(parameters, best.parameters, 0.0, inputs.plan.highest_mean(), step / 2))
