"""The bar of a run: what it says of the work under way, and how long the rest takes."""

import io
import time

from slicing.experiment.waiting import RunBar
from slicing.progress import counted

PARTS = [["perplexity"], ["slice", "perplexity"], ["slice", "perplexity"]]


def test_what_is_left_is_told_by_the_last_part_of_the_same_name() -> None:
    now = [0.0]
    with RunBar(PARTS, shown=False, clock=lambda: now[0]) as bar:
        assert bar.left() is None
        bar.point("dense")
        with bar.part("perplexity"):
            now[0] += 10
        assert bar.left() is None  # no slicing has begun
        bar.point("SB 0.300")
        with bar.part("slice"):
            bar("slice", 0, 4, "layer")
            assert bar.left() is None
            now[0] += 5
            bar("slice", 1, 4, "layer")  # so 20 seconds in all
            assert bar.left() == 15 + 10 + 20 + 10
            assert bar.text() == "point 2 of 3, SB 0.300: slice 1/4 layers; 00:15 gone, 00:55 left"
            now[0] += 25  # longer than it seemed
        assert bar.left() == 10 + 30 + 10
        with bar.part("perplexity"):
            now[0] += 4
            assert bar.left() == 6 + 30 + 10
            now[0] += 100
            assert bar.left() == 0 + 30 + 10
        bar.point("SB 0.000")
        assert bar.left() == 30 + 104


def test_the_bar_moves_while_nothing_is_reported_and_ends_with_the_run() -> None:
    drawn = io.StringIO()
    with RunBar(PARTS, look=0.01, file=drawn) as bar:
        bar.point("dense")
        with bar.part("perplexity"):
            before = drawn.tell()
            for _ in range(500):
                if drawn.tell() > before:
                    break
                time.sleep(0.01)
            assert drawn.tell() > before
            assert list(counted("abc", bar, "windows of text", 3, "window")) == ["a", "b", "c"]
    assert "point 1 of 3, dense: perplexity; 00:00 gone, time left not known yet" in drawn.getvalue()
    after = drawn.tell()
    time.sleep(0.03)
    assert drawn.tell() == after


def test_a_hidden_bar_draws_nothing() -> None:
    drawn = io.StringIO()
    with RunBar(PARTS, shown=False, file=drawn) as bar:
        bar.point("dense")
        with bar.part("perplexity"):
            bar("perplexity", 1, 2, "window")
    assert drawn.getvalue() == ""
