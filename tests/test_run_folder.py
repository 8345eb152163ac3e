"""Files of a run: whole or not there, found again by content alone."""

import contextlib
import json
import multiprocessing
import os
import platform

import pytest
import torch
from safetensors.torch import save_file
from test_report import make_run

from slicing.experiment.digests import content_key, windows_key
from slicing.experiment.results import PeakMemory, Point, Seconds, Trial, VectorFile
from slicing.experiment.run_folder import RunFolder
from slicing.experiment.saving import is_saved_model
from slicing.families import InputError
from slicing.files import _machine, new_folder, read_json, replacing, write_json
from slicing.structure import as_json

_NOT_SLICED = dict.fromkeys(("mean", "base", "amount", "slices", "widths", "rotations", "calibration"))


def point(key: str, perplexity: float = 12.5, base: float | None = None) -> Point:
    """A dense model's point."""
    measured = {"parameters": 1, "cut": 0.0, "nll": [2.5], "tasks": {}, "mean_accuracy": None, "git": None}
    parts = {"seconds": Seconds(None, 1.5, None), "peak_memory_bytes": PeakMemory(None, 1, None)}
    which = _NOT_SLICED | {"key": key, "kind": "dense", "base": base, "perplexity": perplexity}
    return Point(**which, **measured, **parts)


def test_what_is_kept_is_read_again_by_its_kind_and_key_alone(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write(Point, "abc", point("abc"))
    assert RunFolder(tmp_path / "run").read(Point, "abc") == point("abc")
    assert folder.read(Point, "abd") is None
    assert folder.read(list[Trial], "abc") is None
    assert (tmp_path / "run" / "points" / "abc.json").exists()


def test_fresh_forgets_what_the_run_wrote_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write(Point, "abc", point("abc"))
    folder.write(list[Trial], "abc", [])
    folder.write(VectorFile, "abc", VectorFile([0.0, 1.0]))
    (tmp_path / "run" / "results.json").write_text("{}")
    folder.model(point("abcdefghij", base=0.1)).mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    RunFolder(tmp_path / "run", fresh=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_models_of_one_base_and_different_points_have_different_folders(tmp_path):
    folder = RunFolder(tmp_path)
    one, other = (folder.model(point(key, base=0.1)) for key in ("aaaaaaaabb", "bbbbbbbbbb"))
    assert one.name == "SB_0.1000-aaaaaaaa"
    assert one != other


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"points": [1]})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_json(path, {"points": [1, 2]})
    assert json.loads(path.read_text()) == {"points": [1]}
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_a_killed_run_had_begun_is_removed_and_what_another_process_writes_is_not(tmp_path):
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f".{_machine()}.{ended.pid}.SB_0.1").mkdir()
    for name in (f"{_machine()}.{ended.pid}", f"{_machine()}.{os.getpid()}"):
        (tmp_path / f".{name}.results.json").touch()
    alive = [f".{_machine()}.{os.getppid()}.results.json", f".another-{platform.node()}.{ended.pid}.a", ".mine"]
    for name in alive:
        (tmp_path / name).touch()
    RunFolder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*alive, "models"])
    assert os.listdir(tmp_path / "models") == []


def test_a_long_name_has_a_possible_name_while_it_is_written(tmp_path):
    with replacing(tmp_path / f"{'a' * 250}.json") as partial:
        partial.write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == [f"{'a' * 250}.json"]


def write_weights(folder, text="mine"):
    """What `is_saved_model` takes for a model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.zeros(8)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"of": text}))


def test_of_two_that_write_one_folder_the_first_stays_and_a_part_is_replaced(tmp_path):
    place = tmp_path / "SB_0.1"
    with new_folder(place, is_saved_model) as slow:
        write_weights(slow, "slow")
        write_weights(place, "fast")
    assert read_json(place / "config.json") == {"of": "fast"}
    (place / "model.safetensors").unlink()
    with new_folder(place, is_saved_model) as again:
        write_weights(again, "again")
    assert read_json(place / "config.json") == {"of": "again"}
    with contextlib.suppress(KeyError), new_folder(tmp_path / "other", is_saved_model) as broken:
        write_weights(broken)
        raise KeyError
    assert os.listdir(tmp_path) == ["SB_0.1"]


def test_a_folder_without_all_of_its_weights_is_no_saved_model(tmp_path):
    write_weights(tmp_path / "a")
    assert is_saved_model(tmp_path / "a")
    weights = tmp_path / "a" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    assert not is_saved_model(tmp_path / "a")
    weights.rename(tmp_path / "a" / "model-1.safetensors")
    assert not is_saved_model(tmp_path / "a")
    (tmp_path / "a" / "model-1.safetensors").write_bytes(whole)
    (tmp_path / "a" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert is_saved_model(tmp_path / "a")
    (tmp_path / "a" / "model-1.safetensors").unlink()
    assert not is_saved_model(tmp_path / "a")


@pytest.mark.parametrize("gone", ["modeling.py", "families.py"])
def test_a_folder_without_all_of_its_code_is_no_saved_model(tmp_path, gone):
    write_weights(tmp_path)
    assert is_saved_model(tmp_path)  # a plain one has no code
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "modeling.SlicedConfig"}}')
    assert not is_saved_model(tmp_path)
    (tmp_path / "modeling.py").write_text("from .families import FAMILIES")
    (tmp_path / "families.py").write_text("FAMILIES = {}")
    assert is_saved_model(tmp_path)
    (tmp_path / gone).unlink()
    assert not is_saved_model(tmp_path)


@pytest.mark.parametrize("number", ["1" * 400, "-" + "1" * 400, "1e999", "1" * 5000])
def test_a_number_beyond_a_double_is_no_number_of_a_file(tmp_path, number):
    (tmp_path / "a.json").write_text(f'{{"parameters": {number}}}')
    with pytest.raises(InputError, match=r"a.json is damaged \(.*111.* beyond|a.json is damaged \(1e999 is beyond"):
        read_json(tmp_path / "a.json")


def test_a_number_that_is_not_finite_is_not_written_and_its_place_is_said(tmp_path):
    with pytest.raises(
        InputError, match=r"can't write .*a.json: \['points'\]\[1\]\['nll'\] \(inf\) is no finite number"
    ):
        write_json(tmp_path / "a.json", {"points": [{"nll": 1.0}, {"nll": float("inf")}]})
    assert not list(tmp_path.iterdir())


def test_a_byte_order_mark_before_json_is_no_damage(tmp_path):
    (tmp_path / "a.json").write_text('{"normalised": [0, 0.5, 1]}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"normalised": [0, 0.5, 1]}


def test_numbers_survive_the_file_bit_for_bit(tmp_path):
    numbers = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    folder = RunFolder(tmp_path)
    folder.write(VectorFile, "a", VectorFile(numbers))
    assert folder.read(VectorFile, "a") == VectorFile(numbers)


def test_a_folder_that_cant_be_written_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --output-dir"):
        RunFolder(tmp_path / "file" / "run")


DAMAGED = {
    "half a file": ('{"perple', "is damaged"),
    "no number": ('{"perplexity": NaN}', "NaN is no number"),
    "too deep": ("[" * 100_000, "is damaged"),
    "a list": ("[]", "point is .* of type list: it must be object"),
    "nothing in it": ("{}", "point.key is missing"),
    "a word for a number": (
        json.dumps(as_json(point("a")) | {"perplexity": "3"}),
        "point.perplexity is '3' of type str",
    ),
    "a key too many": (json.dumps(as_json(point("a")) | {"more": 1}), "point.more is not a known key"),
    "another point": (json.dumps(as_json(point("b"))), "point.key is 'b': it must be 'a'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_point_is_an_error_that_names_the_file(tmp_path, case):
    content, message = DAMAGED[case]
    folder = RunFolder(tmp_path)
    folder.write(Point, "a", point("a"))
    (tmp_path / "points" / "a.json").write_text(content)
    with pytest.raises(InputError, match=rf"{message}.*: delete .*points/a\.json, and it is measured again"):
        folder.read(Point, "a")


def test_results_that_are_not_what_their_fields_say_are_not_written(tmp_path):
    folder, run = RunFolder(tmp_path), make_run()
    run.points[1].perplexity = "low"
    with pytest.raises(InputError, match=r"points\[1\].perplexity is 'low' of type str: it must be number"):
        folder.write_results(run)
    run.points[1].perplexity = float("nan")
    with pytest.raises(InputError, match=r"\['points'\]\[1\]\['perplexity'\] \(nan\) is no finite number"):
        folder.write_results(run)
    assert os.listdir(tmp_path) == []


def test_a_run_takes_over_what_another_one_beside_it_has_measured(tmp_path):
    vector = VectorFile([0.0, 0.5, 1.0])
    RunFolder(tmp_path / "one").write(Point, "a", point("a"))
    RunFolder(tmp_path / "one").write(VectorFile, "b", vector)
    assert RunFolder(tmp_path / "fresh", fresh=True).take_over(Point, "a") is None
    other = RunFolder(tmp_path / "two")
    assert other.read(Point, "a") is None
    assert (other.take_over(Point, "a"), other.take_over(VectorFile, "b")) == (point("a"), vector)
    assert other.read(Point, "a") == point("a")
    assert other.take_over(Point, "b") is None


def test_the_newest_good_file_of_those_beside_is_taken_over(tmp_path):
    for age, (run, perplexity) in enumerate((("new", 3.0), ("old", 2.0), ("oldest", 1.0))):
        RunFolder(tmp_path / run).write(Point, "a", point("a", perplexity))
        file = tmp_path / run / "points" / "a.json"
        os.utime(file, (10**9 - age, 10**9 - age))
    assert RunFolder(tmp_path / "x").take_over(Point, "a").perplexity == 3
    (tmp_path / "new" / "points" / "a.json").write_text("{")
    (tmp_path / "x" / "points" / "a.json").unlink()
    assert RunFolder(tmp_path / "y").take_over(Point, "a").perplexity == 2


def test_keys_depend_on_content_and_not_on_order():
    assert content_key({"a": 1, "b": [0.5, None]}) == content_key({"b": [0.5, None], "a": 1})
    keys = {content_key({"a": value}) for value in (1, 2, 1.5, "1", None, True, [1])}
    assert len(keys) == 7


def test_window_keys_depend_on_tokens_and_shape():
    windows = torch.arange(12)
    keys = {windows_key(windows.view(3, 4)), windows_key(windows.view(4, 3)), windows_key(windows.view(3, 4) + 1)}
    assert len(keys) == 3
    assert windows_key(windows.view(3, 4)) in keys
