"""The schedule: LR vector -> final slices -> widths, and the amounts of a sweep."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slicing.families import InputError
from slicing.schedule import check_vector, difference, final_slices, normalise, slice_widths, sweep_amounts

# LR of Mistral-7B-v0.1 as published.
MISTRAL = [
    *[0, 0.4291, 0.6063, 0.6858, 0.6245, 0.6643, 0.7004, 0.7172, 0.7473, 0.7836, 0.7842, 0.8073, 0.8310, 0.8477],
    *[0.8281, 0.8459, 0.8423, 0.8856, 0.8264, 0.8620, 0.9188, 0.9590, 0.9824, 0.9825, 0.9978, 1, 0.9992, 0.9887],
    *[0.9604, 0.9334, 0.9276, 0.4930],
]

fractions = st.floats(0, 1)
vectors = st.lists(fractions, min_size=2, max_size=48).filter(lambda values: max(values) > min(values))
slice_lists = st.lists(fractions, min_size=1, max_size=48)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[float], float, float, float]:
    """A vector, a mean, a base and a limit under which the mean can be reached."""
    vector = draw(vectors)
    limit = draw(st.floats(0.05, 1))
    share = draw(st.floats(0, 0.999))  # of the limit, or of what can be reached
    base_share = draw(fractions)
    at_base = sum(lr == 0 for lr in vector) / len(vector)
    # mean <= at_base * base + (1 - at_base) * limit, with base = base_share * mean
    mean = share * (1 - at_base) * limit / (1 - at_base * base_share)
    return vector, mean, min(mean, base_share * mean), limit


def mean_of(values: list[float]) -> float:
    return math.fsum(values) / len(values)


# ---- final slices


@given(schedules())
def test_slices_have_the_wanted_mean_and_stay_within_their_bounds(schedule):
    vector, mean, base, limit = schedule
    slices = final_slices(vector, mean=mean, base=base, limit=limit)
    assert len(slices) == len(vector)
    assert abs(mean_of(slices) - mean) <= 1e-12
    assert all(base <= cut <= limit for cut in slices)


@given(schedules())
def test_slices_rise_with_redundancy_and_equal_layers_get_equal_slices(schedule):
    vector, mean, base, limit = schedule
    slices = final_slices(vector, mean=mean, base=base, limit=limit)
    pairs = sorted(zip(vector, slices, strict=True))
    for (lr, cut), (next_lr, next_cut) in pairwise(pairs):
        assert cut <= next_cut
        if lr == next_lr:
            assert cut == next_cut


@given(schedules())
def test_layers_below_the_limit_share_in_proportion_to_redundancy(schedule):
    vector, mean, base, limit = schedule
    slices = final_slices(vector, mean=mean, base=base, limit=limit)
    free = [(lr, cut - base) for lr, cut in zip(vector, slices, strict=True) if cut < limit - 1e-9 and lr > 1e-3]
    for (lr, share), (next_lr, next_share) in pairwise(free):
        assert share * next_lr == pytest.approx(next_share * lr, rel=1e-9, abs=1e-12)


@given(vectors, st.floats(0, 0.999))
def test_base_equal_to_the_mean_is_constant_slicing(vector, mean):
    assert final_slices(vector, mean=mean, base=mean) == [mean] * len(vector)


def test_slices_are_those_of_the_formula_where_nothing_is_clipped():
    slices = final_slices(MISTRAL, mean=0.3, base=0.1)
    assert slices == pytest.approx([0.1 + 0.2 * lr / mean_of(MISTRAL) for lr in MISTRAL], abs=1e-15)
    assert slices[0] == 0.1


def test_what_a_clipped_layer_cannot_take_is_shared_out_over_the_others():
    # The formula gives 0, 0.25, 0.5, 0.75; the last may lose 0.6 only, and the 0.15 left are shared out as 1 : 2.
    assert final_slices([0, 1 / 3, 2 / 3, 1], mean=0.375, base=0, limit=0.6) == pytest.approx([0, 0.3, 0.6, 0.6])
    assert final_slices([0, 0.5, 1], mean=0.4, base=0, limit=0.7) == pytest.approx([0, 0.5, 0.7])


def test_the_highest_possible_mean_can_be_asked_for():
    assert final_slices([0, 0.5, 1, 0.25], mean=0.6, base=0, limit=0.8) == pytest.approx([0, 0.8, 0.8, 0.8])


def test_a_mean_that_cannot_be_reached_names_the_highest_one():
    with pytest.raises(InputError, match=r"mean of 0\.7 with base 0 is impossible.*highest possible mean is 0\.6000"):
        final_slices([0, 0.5, 1, 0.25], mean=0.7, base=0, limit=0.8)
    with pytest.raises(InputError, match=r"highest possible mean is 0\.2500"):
        final_slices([0, 1], mean=0.6, base=0.6, limit=0.25)


@pytest.mark.parametrize(
    ("given_mean", "base", "limit", "message"),
    [
        (1.0, 0.0, 1.0, r"mean cut is 1: it must lie in \[0, 1\)"),
        (-0.1, 0.0, 1.0, r"mean cut is -0\.1"),
        (math.nan, 0.0, 1.0, r"mean cut is nan"),
        (0.3, 0.4, 1.0, r"slice base is 0\.4: it must lie in \[0, 0\.3\]"),
        (0.3, -0.1, 1.0, r"slice base is -0\.1"),
        (0.3, math.nan, 1.0, r"slice base is nan"),
        (0.3, 0.0, 0.0, r"limit of a layer's cut is 0"),
        (0.3, 0.0, 1.5, r"limit of a layer's cut is 1\.5"),
    ],
)
def test_bad_numbers_are_refused(given_mean, base, limit, message):
    with pytest.raises(InputError, match=message):
        final_slices([0, 0.5, 1], mean=given_mean, base=base, limit=limit)


# ---- the vector


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([], "empty"),
        ([0, 1], "has 2 values, the model 3 layers"),
        ([0, math.nan, 1], "nan for layer 1"),
        ([0, math.inf, 1], "inf for layer 1"),
        ([0, 0.5, 1.2], r"layer 2 is 1\.2, outside \[0, 1\]"),
        ([-0.1, 0.5, 1], r"layer 0 is -0\.1, outside \[0, 1\]"),
        ([0.4, 0.4, 0.4], r"all 3 values of the LR vector are 0\.4"),
    ],
)
def test_bad_vectors_are_refused_in_one_line(vector, message):
    with pytest.raises(InputError, match=message) as caught:
        check_vector(vector, 3)
    assert "\n" not in str(caught.value)


def test_final_slices_refuses_a_constant_vector_even_for_constant_slicing():
    with pytest.raises(InputError, match="all 2 values"):
        final_slices([0.5, 0.5], mean=0.2, base=0.2)


def test_the_published_vector_is_accepted_and_already_normalised():
    check_vector(MISTRAL, 32)
    assert normalise(MISTRAL) == MISTRAL


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=48).filter(lambda values: max(values) > min(values)))
def test_normalised_values_reach_from_zero_to_one_in_the_same_order(values):
    result = normalise(values)
    check_vector(result, len(values))
    assert min(result) == 0
    assert max(result) == 1
    pairs = sorted(zip(values, result, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(pairs))


def test_normalise_refuses_equal_values():
    with pytest.raises(InputError, match="all 2 values"):
        normalise([0.9, 0.9])


# ---- widths


@given(slice_lists, st.integers(1, 80), st.integers(1, 64), st.integers(0, 63))
def test_widths_are_multiples_within_bounds(slices, blocks, multiple, beyond):
    hidden_size = blocks * multiple + beyond % multiple
    widths = slice_widths(slices, hidden_size, multiple=multiple)
    assert len(widths) == len(slices)
    assert all(multiple <= width <= hidden_size for width in widths)
    assert all(width % multiple == 0 or width == hidden_size for width in widths)
    assert all(width == hidden_size for cut, width in zip(slices, widths, strict=True) if cut == 0)


@given(slice_lists, st.integers(1, 80), st.integers(1, 64), st.integers(0, 63))
def test_sum_of_widths_is_within_half_a_multiple_of_the_target(slices, blocks, multiple, beyond):
    hidden_size = blocks * multiple + beyond % multiple
    target = hidden_size * math.fsum(1 - cut for cut in slices)
    full = sum(1 - cut == 1 for cut in slices)
    least = full * hidden_size + (len(slices) - full) * multiple
    total = sum(slice_widths(slices, hidden_size, multiple=multiple))
    if target >= least - multiple / 2:
        assert abs(total - target) <= multiple / 2 + 1e-6
    else:
        assert total == least


@given(st.lists(st.floats(0, 0.9), min_size=1, max_size=48), st.integers(10, 80), st.integers(1, 64))
def test_a_width_is_less_than_a_multiple_from_its_exact_value(slices, blocks, multiple):
    hidden_size = blocks * multiple  # so that no layer is held at the lower bound
    for cut, width in zip(slices, slice_widths(slices, hidden_size, multiple=multiple), strict=True):
        assert abs(width - hidden_size * (1 - cut)) < multiple + 1e-6


@given(slice_lists, st.integers(1, 80), st.integers(1, 64), st.integers(0, 63))
def test_widths_never_rise_where_the_slice_does(slices, blocks, multiple, beyond):
    hidden_size = blocks * multiple + beyond % multiple
    widths = slice_widths(slices, hidden_size, multiple=multiple)
    exact = [hidden_size * (1 - cut) for cut in slices]
    pairs = sorted(zip(exact, widths, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(pairs) if a[0] < b[0] - 1e-6)


def test_the_published_mistral_vector_gives_the_widths_of_the_formula():
    slices = final_slices(MISTRAL, mean=0.3, base=0)
    exact = [4096 * (1 - 0.3 * lr / mean_of(MISTRAL)) for lr in MISTRAL]
    widths = slice_widths(slices, 4096, multiple=1)
    assert sum(widths) == round(32 * 4096 * 0.7)
    assert all(math.floor(value) <= width <= math.ceil(value) for value, width in zip(exact, widths, strict=True))
    assert sum(width != round(value) for value, width in zip(exact, widths, strict=True)) <= 2
    assert (widths[0], min(widths), widths.index(min(widths))) == (4096, 2552, 25)


def test_constant_slicing_mixes_two_neighbouring_widths_the_larger_ones_first():
    # 403.2 a layer: 30 layers need 12,096 in all, 12 x 408 + 18 x 400.
    assert slice_widths([0.3] * 30, 576) == [408] * 12 + [400] * 18


def test_a_full_layer_keeps_a_hidden_size_that_is_no_multiple():
    assert slice_widths([0, 0.5, 0], 100) == [100, 48, 100]


def test_a_layer_held_at_the_lower_bound_is_paid_for_by_the_others():
    assert slice_widths([1, 1, 0.5], 128) == [8, 8, 48]


def test_widths_at_the_limit_of_a_sweep_are_one_multiple():
    assert slice_widths([1 - 8 / 576] * 3, 576) == [8, 8, 8]


@pytest.mark.parametrize(
    ("slices", "multiple", "message"),
    [
        ([], 8, "slices is empty"),
        ([0.1, 1.1], 8, r"slice of layer 1 is 1\.1"),
        ([math.nan], 8, "nan for layer 0"),
        ([0.1], 0, r"multiples of 0: it must lie in \[1, 64\]"),
        ([0.1], 65, r"multiples of 65: it must lie in \[1, 64\]"),
    ],
)
def test_bad_slices_and_multiples_are_refused(slices, multiple, message):
    with pytest.raises(InputError, match=message):
        slice_widths(slices, 64, multiple=multiple)


# ---- amounts


def test_amounts_of_the_default_sweep_are_sixteen_and_none_twice():
    amounts = sweep_amounts(0.3, 0.02)
    assert amounts == [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.24, 0.26, 0.28, 0.3]
    assert [difference(0.3, amount) for amount in amounts] == amounts[::-1]


def test_an_amount_a_rounding_error_below_the_mean_is_dropped():
    mean = 0.2 + 1e-10
    assert sweep_amounts(mean, 0.1) == [0, 0.1, mean]


def test_a_mean_of_zero_has_one_point():
    assert sweep_amounts(0, 0.02) == [0.0]


@given(st.floats(0, 0.99), st.floats(0.001, 2))
def test_amounts_are_multiples_of_the_step_that_rise_to_the_mean(mean, step):
    amounts = sweep_amounts(mean, step)
    assert amounts[-1] == mean
    assert amounts[:-1] == pytest.approx([k * step for k in range(len(amounts) - 1)], abs=1e-12)
    bases = [difference(mean, amount) for amount in amounts]
    assert (bases[0], bases[-1]) == (mean if len(amounts) > 1 else 0, 0)
    assert all(0 <= base <= mean for base in bases)
    assert all(b - a > 0 for a, b in pairwise(amounts))
    assert len(amounts) * step >= mean - 1e-9  # none left out


@pytest.mark.parametrize("step", [0, -0.02, math.nan, math.inf, 1e-12])
def test_bad_steps_are_refused(step):
    with pytest.raises(InputError, match="the step is"):
        sweep_amounts(0.3, step)


def test_bad_means_of_a_sweep_are_refused():
    with pytest.raises(InputError, match="mean cut is 1"):
        sweep_amounts(1, 0.02)
