"""Windows out of texts of every kind, and what is refused. The tokenizer's token of the word "7" is 7."""

import gzip
import json
import logging
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from slicing.families import InputError
from slicing.text import DEMO_FOLDER, HUB, SPLITS, check_source, token_windows

WORDS = 1000
BOS = WORDS


def make_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    vocab = {str(number): number for number in range(WORDS)} | {"<s>": BOS, "<unk>": WORDS + 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", model_max_length=8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=False)


def numbers(start: int, stop: int) -> str:
    return " ".join(map(str, range(start, stop)))


@pytest.fixture
def counting(tmp_path: Path) -> str:
    """A file with the words 0 to 99."""
    path = tmp_path / "counting.txt"
    path.write_text(numbers(0, 100))
    return str(path)


def windows(source: str | Path, tokenizer: PreTrainedTokenizerFast, length: int = 10, **options) -> torch.Tensor:
    return token_windows(str(source), tokenizer, **({"split": "test", "length": length} | options))


# Which windows


def test_all_windows_follow_one_another_and_the_rest_is_dropped(counting, tokenizer):
    result = windows(counting, tokenizer, length=30)
    assert result.dtype == torch.int64
    assert torch.equal(result, torch.arange(90).view(3, 30))


def test_a_stride_makes_windows_overlap(counting, tokenizer):
    result = windows(counting, tokenizer, length=30, stride=20)
    assert result[:, 0].tolist() == [0, 20, 40, 60]
    assert torch.equal(result, result[:, :1] + torch.arange(30))


def test_a_text_of_exactly_one_window_gives_it(counting, tokenizer):
    assert windows(counting, tokenizer, length=100).shape == (1, 100)


def test_random_windows_are_whole_and_start_at_different_tokens(counting, tokenizer):
    result = windows(counting, tokenizer, count=20)
    assert torch.equal(result, result[:, :1] + torch.arange(10))
    assert len(set(result[:, 0].tolist())) == 20
    assert result[:, 0].tolist() != sorted(result[:, 0].tolist())
    assert any(start % 10 for start in result[:, 0].tolist())


def test_as_many_random_windows_as_there_are_starts_are_all_of_them(counting, tokenizer):
    assert sorted(windows(counting, tokenizer, count=91)[:, 0].tolist()) == list(range(91))


def test_random_windows_repeat_where_the_text_has_fewer(counting, tokenizer):
    result = windows(counting, tokenizer, count=200)
    assert result.shape == (200, 10)
    assert result.max() < 100


@pytest.mark.parametrize("stride", [None, 5])
def test_the_seed_decides_and_the_global_state_does_not(counting, tokenizer, stride):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = windows(counting, tokenizer, count=8, stride=stride, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(windows(counting, tokenizer, count=8, stride=stride, seed=3), first)
    assert not torch.equal(windows(counting, tokenizer, count=8, stride=stride, seed=4), first)


def test_windows_drawn_from_the_grid_are_distinct_and_in_order(counting, tokenizer):
    starts = windows(counting, tokenizer, count=12, stride=5)[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert all(start % 5 == 0 for start in starts)
    assert len(starts) == 12


def test_the_whole_grid_can_be_drawn_and_not_one_more(counting, tokenizer):
    assert torch.equal(windows(counting, tokenizer, count=10, stride=10), torch.arange(100).view(10, 10))
    with pytest.raises(InputError, match="has 10 windows of 10 tokens, one every 10, and 11 were asked for"):
        windows(counting, tokenizer, count=11, stride=10)


def test_a_token_at_the_beginning_comes_once_before_the_whole_text(counting):
    result = windows(counting, make_tokenizer(bos=True), length=25)
    assert result[0, 0] == BOS
    assert (result == BOS).sum() == 1


def test_a_text_longer_than_the_tokenizers_limit_gives_no_warning(counting, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        windows(counting, tokenizer)
    assert not caplog.records


@pytest.mark.parametrize("option", ["length", "count", "stride"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused(counting, tokenizer, option, value):
    with pytest.raises(InputError, match=f"{option} is {value}"):
        windows(counting, tokenizer, **{option: value})


def test_a_text_shorter_than_a_window_is_refused(counting, tokenizer):
    with pytest.raises(InputError, match="has 100 tokens and one window needs 101"):
        windows(counting, tokenizer, length=101)


# Files


def pack(path: Path, text: str) -> Path:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz", "A.TXT"])
def test_text_files_are_read_plain_and_packed(tmp_path, tokenizer, name):
    path = pack(tmp_path / name, numbers(0, 20))
    check_source(str(path), "test")
    assert windows(path, tokenizer).flatten().tolist() == list(range(20))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_are_joined_by_a_blank_line(tmp_path, tokenizer, name):
    rows = [{"text": numbers(0, 7), "other": 1}, {"text": numbers(7, 20)}]
    path = pack(tmp_path / name, "\n".join(map(json.dumps, rows)) + "\n\n")
    check_source(str(path), "test")
    assert windows(path, tokenizer).flatten().tolist() == list(range(20))
    assert windows(path, tokenizer, length=20).shape == (1, 20)


def test_a_line_end_inside_a_json_string_does_not_end_the_row(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "0 1\u20282 3"}, ensure_ascii=False), encoding="utf-8")
    assert windows(path, tokenizer, length=4).tolist() == [[0, 1, 2, 3]]


def test_parquet_and_its_text_column(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "a.parquet", {"text": [numbers(0, 10)], "story": [numbers(50, 60)]})
    check_source(str(path), "test")
    check_source(str(path), "test", "story")
    assert windows(path, tokenizer)[0, 0] == 0
    assert windows(path, tokenizer, text_column="story")[0, 0] == 50


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_the_split_is_put_into_the_name_of_a_file(tmp_path, tokenizer):
    (tmp_path / "a.train.txt").write_text(numbers(0, 10))
    pack(tmp_path / "a.test.txt.gz", numbers(10, 20))
    for name in ("a.{split}.txt", "a.{split}.txt.gz"):  # .gz is added and taken off
        assert windows(tmp_path / name, tokenizer, split="train")[0, 0] == 0
        assert windows(tmp_path / name, tokenizer, split="test")[0, 0] == 10
        with pytest.raises(InputError, match=r"there is no text file .*a\.validation\.txt"):
            check_source(str(tmp_path / name), "validation")


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + numbers(0, 10).encode())
    assert windows(path, tokenizer)[0, 0] == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n ", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.txt", b"caf\xe9 au lait", r"is not UTF-8 \(byte 3\)"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8"),
        ("a.csv", b"1,2", r"kind of the text file .* is unknown; known are .txt"),
        ("a.parquet.gz", b"1", "is unknown"),
        ("a", b"1", "is unknown"),
        ("a.txt.gz", b"not gzip", "can't be read"),
        ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], "can't be read"),
        ("a.txt.xz", b"not xz", "can't be read"),
        ("a.parquet", b"not parquet", "can't be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"story": "b", "id": 1}', "line 2 of .* has no field 'text' but story, id"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b \\ud800 c"}',
            r"line 2 of .* has '\\ud800' in the field 'text', half of",
        ),
        ("a.jsonl", b'\n{"text": "a", "id": ' + b"1" * 5000 + b"}", "line 2 of .* is not JSON: .* 5000 digits"),
        ("a.jsonl", b'{"text": "a", "more": ' + b"[" * 100_000, "line 1 of .* is not JSON: .*recursion"),
        ("a.jsonl", b'["a"]', "line 1 of .* has no field 'text' but none"),
        ("a.jsonl", b'{"text": 7}', "has int in the field 'text', not text"),
        ("a.jsonl", b'{"text": null}', "has NoneType in the field 'text', not text"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        check_source(str(path), "test")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        windows(path, tokenizer)


def test_a_missing_file_a_folder_and_a_missing_parquet_column_are_refused(tmp_path):
    for missing in (str(tmp_path / "a.txt"), "no_such_file.jsonl", "some/where"):
        with pytest.raises(InputError, match="there is no text file"):
            check_source(missing, "test")
    with pytest.raises(InputError, match="is a folder"):
        check_source(str(tmp_path), "test")
    path = write_parquet(tmp_path / "a.parquet", {"story": ["a"], "numbers": ["1"]})
    with pytest.raises(InputError, match="has no field 'text' but story, numbers"):
        check_source(str(path), "test")
    with pytest.raises(InputError, match=r"row 1 of .* has int in the field 'text'"):
        check_source(str(write_parquet(tmp_path / "b.parquet", {"text": [1]})), "test")
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet' has 2 columns of the name 'text': rename all but one"):
        check_source(str(tmp_path / "c.parquet"), "test")


# Data sets by name


def test_an_unknown_data_set_lists_the_known_and_a_near_one():
    with pytest.raises(
        InputError, match=r"'wikitxt2' \(did you mean 'wikitext2'\?\); known are demo, wikitext2, ptb, c4"
    ):
        check_source("wikitxt2", "test")
    with pytest.raises(InputError, match="unknown data set 'zzzz'; known are"):
        check_source("zzzz", "test")


@pytest.mark.parametrize(("name", "split"), [("c4", "test"), ("wikitext2", "valid"), ("demo", "all")])
def test_an_unknown_split_lists_the_known(name, split):
    with pytest.raises(InputError, match=f"{name!r} has no split {split!r}; it has train, validation"):
        check_source(name, split)


@pytest.mark.parametrize("name", HUB)
def test_every_split_of_every_hub_set_passes_the_check_without_a_network(name):
    for split in HUB[name].files:
        check_source(name, split)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub whose files hold 60 documents of 10 words, document i counting from 10 i; the asked for files are noted."""
    asked = []

    def download(repo: str, file: str, *, repo_type: str, revision: str) -> str:
        hub = next(hub for hub in HUB.values() if hub.repo == repo)
        assert (repo_type, revision) == ("dataset", hub.revision)
        asked.append(file)
        documents = [numbers(10 * index, 10 * index + 10) for index in range(60)]
        if file.endswith(".json.gz"):
            rows = [json.dumps({hub.column: document, "url": ""}) for document in documents]
            return str(pack(tmp_path / "file.json.gz", "\n".join(rows)))
        return str(write_parquet(tmp_path / "file.parquet", {hub.column: documents, "other": list(range(60))}))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return asked


@pytest.mark.parametrize("name", [name for name in HUB if name != "alpaca"])
def test_hub_sets_are_read_in_order(fake_hub, tokenizer, name):
    result = windows(name, tokenizer, split="validation")
    assert torch.equal(result, torch.arange(600).view(60, 10))
    assert fake_hub == [HUB[name].files["validation"]]


def test_alpaca_has_three_parts_without_a_common_document(fake_hub, tokenizer):
    parts = {split: windows("alpaca", tokenizer, split=split)[:, 0].tolist() for split in HUB["alpaca"].files}
    assert {split: len(part) for split, part in parts.items()} == {"train": 48, "validation": 6, "test": 6}
    assert sorted(start for part in parts.values() for start in part) == list(range(0, 600, 10))


def test_drawn_sets_take_only_as_many_documents_as_are_needed(fake_hub, tokenizer):
    text_of_one = len(numbers(0, 10))
    result = windows("pg19", tokenizer, split="validation", length=4, count=3, stride=4)  # 192 characters
    assert len(set((result // 10).flatten().tolist())) <= 192 // text_of_one + 1
    other = windows("pg19", tokenizer, split="validation", length=4, count=3, stride=4, seed=1)
    assert not torch.equal(result, other)


@pytest.mark.parametrize(("name", "joiner"), [("wikitext2", "\n\n"), ("ptb", " "), ("c4", " "), ("pg19", "\n\n")])
def test_documents_are_joined_as_in_the_papers(name, joiner):
    assert HUB[name].joiner == joiner


# The demo text


def test_the_demo_parts_are_small_long_enough_and_of_different_books(tokenizer):
    assert sum(file.stat().st_size for file in DEMO_FOLDER.iterdir()) <= 1_000_000
    texts = {split: lzma.decompress((DEMO_FOLDER / f"{split}.txt.xz").read_bytes()).decode() for split in SPLITS}
    marks = {"Sir Henry Curtis": "train", "Balfour": "validation", "Almayer": "test"}
    for mark, home in marks.items():
        assert [split for split, text in texts.items() if mark in text] == [home]
    for split, words in {"train": 200_000, "validation": 190_000, "test": 60_000}.items():
        check_source("demo", split)
        assert len(texts[split].split()) > words
