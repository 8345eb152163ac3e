"""What is said below a table: the best dynamic point against constant slicing, and what the mean accuracy is of."""

import math
from collections.abc import Sequence

from slicing.experiment.comparison import best_dynamic_point, compare, constant_point, paired_standard_error
from slicing.experiment.results import Point, Results
from slicing.report.columns import change_text, mean_of, millions, perplexity_text

SIZE_TOLERANCE = 5e-4  # models whose parameter counts differ by less are of equal size


def equal_size_summary(results: Results) -> list[str]:
    """Lines on the best dynamic point against constant slicing, as it is and at an equal parameter count."""
    constant = constant_point(results)
    best = best_dynamic_point(results, constant) if constant else None
    if constant is None:
        return []
    if best is None:
        return ["The search found no slice base better than constant slicing."] if results.search else []
    lines = [f"Best dynamic point: SB {best.base:.3f}. {_against('constant slicing', best, constant)}"]
    equal = next((point for point in results.points if point.kind == "equal-parameters"), None)
    size = best.parameters / constant.parameters - 1
    if equal is not None:
        name = f"constant slicing of mean {equal.mean:.4f}"
        lines.append(f"At equal size: {_against(name, best, equal)}")
        gain = math.log(constant.perplexity / best.perplexity)
        left = math.log(equal.perplexity / best.perplexity)
        if not (_can_be_told(best, constant) and _can_be_told(best, equal)):
            lines.append(
                "No share of a gain is given: a difference within two paired standard errors can't be told from none."
            )
        elif gain > 0:
            lines.append(f"At equal size {left / gain:.0%} of the gain in log perplexity is left.")
        else:
            lines.append("There is no gain of which a part could be left at equal size.")
    elif abs(size) < SIZE_TOLERANCE:
        lines.append("Both have the same number of parameters, so this is a comparison at equal size.")
    else:
        lines.append(
            f"The dynamic model has {abs(size):.1%} {'more' if size > 0 else 'fewer'} parameters than the constant one:"
            " --compare equal-parameters shows what is left of the difference at equal size."
        )
    return lines


def _can_be_told(point: Point, reference: Point) -> bool:
    """Whether the difference in log perplexity is more than two of its standard errors, or these are not known."""
    error = paired_standard_error(point.nll, reference.nll)
    return error is None or abs(math.log(point.perplexity / reference.perplexity)) > 2 * error


def _against(name: str, point: Point, reference: Point) -> str:
    change, error = compare(point, reference)
    paired = "" if error is None else f", paired SE {error:.4f} in log perplexity"
    if not _can_be_told(point, reference):
        paired += ": no difference can be told"
    return (
        f"Perplexity {perplexity_text(point.perplexity)} with {millions(point.parameters)} parameters against"
        f" {perplexity_text(reference.perplexity)} with {millions(reference.parameters)} for {name}"
        f" ({change_text(change)}{paired})."
    )


def mean_accuracy_line(runs: Sequence[Results]) -> list[str]:
    """What the mean accuracy is a mean of; nothing without tasks."""
    tasks = mean_of(runs)
    return [f"Mean accuracy: of {', '.join(tasks)}."] if tasks else []


def speed_lines(runs: Sequence[Results]) -> list[str]:
    """What was timed, where something was."""
    measured = ((run.device, point.speed) for run in runs for point in run.points if point.speed is not None)
    return list(
        dict.fromkeys(
            f"Speed on {device}: prefill of {speed.windows} x {speed.length} tokens; one sequence decoded in a cache of"
            f" {speed.cache_length}; median of {speed.repeats} turns, dense and sliced alternating."
            for device, speed in measured
        )
    )
