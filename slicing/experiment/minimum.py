"""One-dimensional searches: where a function is lowest, and where it comes nearest to a value."""

import math
from collections.abc import Callable

_RATIO = (math.sqrt(5) - 1) / 2


def golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    """The place in [low, high] with the lowest value found, for a function with one minimum there.

    The ends are tried first, since the minimum may lie there; then the bracket shrinks until it is within `tolerance`.
    The places depend on the values alone: the same function is asked at the same places again.
    """
    values = {low: function(low), high: function(high)}
    left, right = high - _RATIO * (high - low), low + _RATIO * (high - low)
    while high - low > tolerance:
        for place in (left, right):
            if place not in values:
                values[place] = function(place)
        if values[left] <= values[right]:
            high, right = right, left
            left = high - _RATIO * (high - low)
        else:
            low, left = left, right
            right = low + _RATIO * (high - low)
    return min(values, key=lambda place: values[place])


def nearest(function: Callable[[float], float], wanted: float, low: float, high: float, tolerance: float) -> float:
    """The place in [low, high] whose value comes nearest to `wanted`, of those that a bisection tries, for a function
    that falls wherever it crosses that value."""
    values: dict[float, float] = {}
    while not values or high - low > tolerance:
        middle = (low + high) / 2
        values[middle] = function(middle)
        low, high = (low, middle) if values[middle] < wanted else (middle, high)
    return min(values, key=lambda place: abs(values[place] - wanted))
