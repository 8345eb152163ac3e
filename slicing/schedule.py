"""How much each layer is cut: layer redundancy -> final slices -> widths. Pure numbers, no torch.

LR_i    layer redundancy, in [0, 1]; high means that the layer changes the stream little and can be cut more
SP      slice percentage, the mean cut over the layers (`mean`)
SB      slice base, the part of the cut that every layer gets (`base`); the amount SP - SB is shared out by LR
FS_i    final slice, the part of the hidden size that layer i loses
width   hidden size that layer i keeps: D * (1 - FS_i), rounded
"""

import math
from collections.abc import Iterable, Sequence

from slicing.families import InputError

TOLERANCE = 1e-9  # amounts and means nearer to each other than this are the same
DIGITS = 12  # of amounts and bases: what is beyond them is the rounding of binary fractions
SMALLEST_STEP = 1e-6  # below it a sweep has more than a million points


def check_vector(values: Iterable[float], layers: int | None = None) -> None:
    """Raise InputError unless `values` is a usable LR vector: finite, inside [0, 1], not all equal.

    `layers` is the number of values there should be; None accepts any number above 0.
    """
    vector = _finite(values)
    if layers is not None and len(vector) != layers:
        raise InputError(f"the LR vector has {len(vector)} values, the model {layers} layers: give one value a layer")
    for i, value in enumerate(vector):
        if not 0 <= value <= 1:
            raise InputError(f"LR of layer {i} is {value:g}, outside [0, 1]: paste the normalised redundancy")
    _spread(vector)


def normalise(values: Iterable[float]) -> list[float]:
    """Min-max normalise: the lowest value becomes 0, the highest 1. InputError: no finite number, all equal."""
    vector = _finite(values)
    low, spread = min(vector), _spread(vector)
    return [(value - low) / spread for value in vector]


def final_slices(redundancy: Iterable[float], *, mean: float, base: float, limit: float = 1.0) -> list[float]:
    """FS of each layer (length L, in [base, limit], mean SP to 1e-12): FS_i = SB + (SP - SB) * LR_i / mean(LR).

    A layer that would pass `limit` is held there. What it can't take is shared out over the others in proportion to
    their LR, again and again until none passes the limit: FS_i = min(limit, SB + s * LR_i) with the one s that gives
    the mean. So FS never falls where LR rises, equal LR give equal FS, and a layer with LR 0 stays at SB.
    `redundancy` is used as it is; `normalise` stretches it to [0, 1] beforehand.

    Raises InputError for a bad vector, a mean outside [0, 1), a base outside [0, mean], a limit outside (0, 1],
    and a mean that the layers can't reach under the limit.
    """
    vector = _finite(redundancy)
    check_vector(vector)
    _check_mean(mean)
    if not 0 <= base <= mean:
        raise InputError(f"the slice base is {base:g}: it must lie in [0, {mean:g}], up to the mean")
    if not 0 < limit <= 1:
        raise InputError(f"the limit of a layer's cut is {limit:g}: it must lie in (0, 1]")
    reachable = math.fsum(limit if lr > 0 else min(base, limit) for lr in vector) / len(vector)
    if reachable < mean - 1e-13:
        raise InputError(
            f"a mean of {mean:g} with base {base:g} is impossible with this vector: no layer may lose more than"
            f" {limit:.4g}, layers of LR 0 lose the base only; the highest possible mean is {rounded_down(reachable)}"
        )

    slices = [float(limit if lr > 0 else base) for lr in vector]
    sharing = [i for i, lr in enumerate(vector) if lr > 0]
    held = 0
    while sharing:
        rest = max(0.0, len(vector) * (mean - base) - held * (limit - base))
        total = math.fsum(vector[i] for i in sharing)
        # The quotient first: it stays finite for the smallest LR.
        shares = {i: base + rest * (vector[i] / total) for i in sharing}
        sharing = [i for i in sharing if shares[i] <= limit]
        if len(sharing) == len(shares):
            for i, share in shares.items():
                slices[i] = share
            break
        held += len(shares) - len(sharing)
    return slices


def slice_widths(slices: Iterable[float], hidden_size: int, *, multiple: int = 8) -> list[int]:
    """Width of each layer (length L): D * (1 - FS_i) as multiples of `multiple` in [multiple, D], by largest remainder.

    Every layer gets the multiple below its exact width; then those with the largest remainder get the one above, of
    equal ones the first layers, whose errors go through all the others. So equal FS may give two widths that differ by
    one multiple. D itself is a width even where it isn't a multiple, and a layer with FS 0 keeps it. What a layer held
    at the lower bound has too much is taken from the others, so that the sum is within half a multiple of
    D * sum(1 - FS) wherever the bounds allow that. multiple=1: the paper's exact widths.

    Raises InputError for no slices or one outside [0, 1] and for a multiple outside [1, D].
    """
    cuts = _finite(slices, "slices")
    for i, cut in enumerate(cuts):
        if not 0 <= cut <= 1:
            raise InputError(f"the slice of layer {i} is {cut:g}: it must lie in [0, 1]")
    if not 1 <= multiple <= hidden_size:
        raise InputError(f"widths in multiples of {multiple}: it must lie in [1, {hidden_size}], the hidden size")

    exact = [hidden_size * (1 - cut) for cut in cuts]
    target = math.fsum(exact)
    widths = [
        hidden_size if width == hidden_size else max(multiple, int(width // multiple) * multiple) for width in exact
    ]
    rest = target - sum(widths)
    # The step up is shorter than a multiple only below a D that is no multiple itself.
    steps = [min(multiple, hidden_size - width) for width in widths]
    raisable = [i for i, step in enumerate(steps) if step > 0 and exact[i] > widths[i]]
    for i in sorted(raisable, key=lambda i: -(exact[i] - widths[i]) / steps[i]):
        if rest >= steps[i] / 2:
            widths[i] += steps[i]
            rest -= steps[i]
    while rest < -multiple / 2:
        lowerable = [i for i, width in enumerate(widths) if width > multiple and exact[i] < hidden_size]
        if not lowerable:
            break
        # The layer that is furthest above its exact width; of equal ones the last.
        i = min(reversed(lowerable), key=lambda i: exact[i] - widths[i])
        lower = (widths[i] - 1) // multiple * multiple
        rest += widths[i] - lower
        widths[i] = lower
    return widths


def inner_widths(
    redundancy: Sequence[float],
    sizes: Sequence[int],
    *,
    mean: float,
    base: float,
    multiple: int = 8,
    alike: bool = False,
) -> list[int]:
    """Inner width of each layer's MLP (length L) by the same schedule, `sizes` being the model's own (0: no MLP).

    FS as of the hidden size, over the layers that have an MLP; layers of one size are rounded together, as
    `slice_widths` does. alike: layers of one size and one FS get one width, the nearest multiple, so that a family's
    config can say it. Raises InputError as both do, and where no layer has an MLP.
    """
    having = [i for i, size in enumerate(sizes) if size]
    if not having:
        raise InputError("no layer of the model has an MLP whose inner width could be cut")
    limit = highest_inner_cut(sizes, multiple)
    slices = dict(
        zip(having, final_slices([redundancy[i] for i in having], mean=mean, base=base, limit=limit), strict=True)
    )
    widths = list(sizes)
    for size in {sizes[i] for i in having}:
        group = [i for i in having if sizes[i] == size]
        if alike:
            found = [slice_widths([slices[i]], size, multiple=multiple)[0] for i in group]
        else:
            found = slice_widths([slices[i] for i in group], size, multiple=multiple)
        for i, width in zip(group, found, strict=True):
            widths[i] = width
    return widths


def highest_inner_cut(sizes: Iterable[int], multiple: int) -> float:
    """The largest part of its inner width that a layer may lose. InputError where the smallest is no multiple long."""
    smallest = min(size for size in sizes if size)
    if multiple > smallest:
        raise InputError(
            f"widths in multiples of {multiple}: at most {smallest}, the smallest inner width, is possible"
        )
    return 1 - multiple / smallest


def sweep_amounts(mean: float, step: float) -> list[float]:
    """Amounts SP - SB of a sweep, rising: k * step below the mean, for k = 0, 1, ..., then the mean itself (SB = 0).

    The first is 0, constant slicing. Mean 0.3, step 0.02: 16 points; mean 0: [0.0].
    Raises InputError for a mean outside [0, 1) and a step that isn't above 0.
    """
    _check_mean(mean)
    if not SMALLEST_STEP <= step < math.inf:
        raise InputError(f"the step is {step:g}: it must be a number of at least {SMALLEST_STEP:g}, such as 0.02")
    amounts: list[float] = []
    while (amount := round(len(amounts) * step, DIGITS)) < mean - TOLERANCE:
        amounts.append(amount)
    return [*amounts, float(mean)]


def difference(mean: float, part: float) -> float:
    """SP less SB, or less the amount, in [0, SP]: 0.02 where binary fractions give 0.020000000000000018."""
    return min(mean, max(0.0, round(mean - part, DIGITS))) if part else mean


def _finite(values: Iterable[float], what: str = "LR vector") -> list[float]:
    """The values as floats; InputError where there are none or one isn't finite."""
    vector = [float(value) for value in values]
    if not vector:
        raise InputError(f"the {what} is empty: give one value a layer")
    for i, value in enumerate(vector):
        if not math.isfinite(value):
            raise InputError(f"the {what} has {value} for layer {i}: give finite numbers")
    return vector


def _spread(vector: Sequence[float]) -> float:
    """Highest less lowest value; InputError where it is 0."""
    spread = max(vector) - min(vector)
    if spread == 0:
        raise InputError(f"all {len(vector)} values of the LR vector are {vector[0]:g}: they say nothing about layers")
    return spread


def _check_mean(mean: float) -> None:
    if not 0 <= mean < 1:
        raise InputError(f"the mean cut is {mean:g}: it must lie in [0, 1)")


def rounded_down(value: float) -> str:
    """Four decimals, never above the value: the figure can be given back as a mean."""
    return f"{math.floor(value * 10_000) / 10_000:.4f}"
