"""Files of a run: whole or not there, found again by content alone."""

import json
import os

import pytest
import torch

from slicing.families import InputError
from slicing.store import RunFolder, content_key, windows_key, write_json


def test_what_is_kept_is_read_again_by_its_kind_and_key_alone(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write("point", "abc", {"key": "abc", "perplexity": 12.5})
    assert RunFolder(tmp_path / "run").read("point", "abc") == {"key": "abc", "perplexity": 12.5}
    assert folder.read("point", "abd") is None
    assert folder.read("search", "abc") is None
    assert (tmp_path / "run" / "points" / "abc.json").exists()


def test_fresh_forgets_what_the_run_wrote_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for kind in ("point", "search", "redundancy"):
        folder.write(kind, "abc", {})
    folder.write_results({})
    folder.model(0.1, "abcdefghij").mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    RunFolder(tmp_path / "run", fresh=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_models_of_one_base_and_different_points_have_different_folders(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.model(0.1, "aaaaaaaabb").name == "SB_0.1000-aaaaaaaa"
    assert folder.model(0.1, "aaaaaaaabb") != folder.model(0.1, "bbbbbbbbbb")


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


def test_numbers_survive_the_file_bit_for_bit(tmp_path):
    numbers = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    folder = RunFolder(tmp_path)
    folder.write("point", "a", numbers)
    assert folder.read("point", "a") == numbers


def test_a_folder_that_cant_be_written_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --output-dir"):
        RunFolder(tmp_path / "file" / "run")


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write("point", "a", {})
    (tmp_path / "points" / "a.json").write_text('{"perple')
    with pytest.raises(InputError, match=r"a\.json is damaged: delete it"):
        folder.read("point", "a")


def test_keys_depend_on_content_and_not_on_order():
    assert content_key({"a": 1, "b": [0.5, None]}) == content_key({"b": [0.5, None], "a": 1})
    keys = {content_key({"a": value}) for value in (1, 2, 1.5, "1", None, True, [1])}
    assert len(keys) == 7


def test_window_keys_depend_on_tokens_and_shape():
    windows = torch.arange(12)
    keys = {windows_key(windows.view(3, 4)), windows_key(windows.view(4, 3)), windows_key(windows.view(3, 4) + 1)}
    assert len(keys) == 3
    assert windows_key(windows.view(3, 4)) in keys
