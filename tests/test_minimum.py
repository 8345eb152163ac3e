"""Golden section and bisection on functions whose answer is known."""

import math

import pytest

from slicing.experiment.minimum import golden_section, nearest


@pytest.mark.parametrize("lowest", [0.0, 0.01, 0.0731, 0.15, 0.2999, 0.3])
def test_golden_section_comes_within_the_tolerance_of_the_minimum(lowest):
    assert abs(golden_section(lambda x: (x - lowest) ** 2, 0.0, 0.3, 0.005) - lowest) <= 0.005


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 0.001])
def test_golden_section_asks_at_each_place_once_and_about_as_often_as_the_golden_ratio_needs(tolerance):
    places = []

    def valley(x):
        places.append(x)
        return abs(x - 0.1234)

    golden_section(valley, 0.0, 0.3, tolerance)
    assert len(set(places)) == len(places)
    assert len(places) <= 4 + math.ceil(math.log(0.3 / tolerance) / math.log((1 + math.sqrt(5)) / 2))
    assert min(places) == 0.0
    assert max(places) == 0.3


def test_golden_section_returns_a_place_that_it_tried_and_no_worse_one_than_any_other():
    tried = {}

    def bumpy(x):
        tried[x] = math.sin(40 * x)
        return tried[x]

    assert golden_section(bumpy, 0.0, 1.0, 0.01) in [x for x in tried if tried[x] == min(tried.values())]


def test_golden_section_stops_on_a_plateau():
    assert 0 <= golden_section(lambda x: 1.0, 0.0, 0.3, 0.005) <= 0.3


@pytest.mark.parametrize("wanted", [0.05, 0.31, 0.77, 0.99])
def test_nearest_finds_the_value_of_a_falling_function(wanted):
    assert nearest(lambda x: 1 - x, wanted, 0.0, 1.0, 1e-4) == pytest.approx(1 - wanted, abs=1e-4)


def test_nearest_finds_the_falling_side_of_a_hump():
    hump = {"low": 1.0, "top": 1.1}  # as parameters over the mean cut: shortcuts come, then widths fall
    found = nearest(lambda x: hump["top"] - x if x > 0.01 else hump["low"], 1.05, 0.0, 1.0, 1e-4)
    assert found == pytest.approx(0.05, abs=1e-3)


def test_nearest_takes_the_closest_step_of_a_staircase():
    assert math.floor(10 * (1 - nearest(lambda x: math.floor(10 * (1 - x)), 3.4, 0.0, 1.0, 1e-3))) == 3
