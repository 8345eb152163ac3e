"""From the name of a data set, or a text file, to windows of tokens (N, S)."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slicing.families import InputError
from slicing.files import local_path
from slicing.text_files import FILES, file_kind, file_text

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo_text"
SPLITS = ("train", "validation", "test")

# English has about four characters a token, so a drawn text holds about four times the tokens that its windows need,
# and they seldom overlap.
CHARACTERS_A_TOKEN = 16


@dataclass(frozen=True)
class HubText:
    """A data set of the Hugging Face hub, in Parquet or JSON lines: nothing of it is executed."""

    repo: str
    revision: str  # a commit, so that a result can be had again
    files: dict[str, str]  # split -> file in the repo; a large split has only its first shard here
    column: str = "text"
    joiner: str = "\n\n"  # between documents, as the papers that report on this set have it
    drawn: bool = False  # many independent documents: random windows come from a random part of them
    in_order: int | None = None  # documents that `count=None` reads, where nobody uses the whole split


# Where the joiners are from: GPTQ (Frantar et al., 2023) and SliceGPT (Ashkboos et al., 2024) join WikiText-2 by
# "\n\n"; GPTQ's second evaluation and SparseGPT join PTB's test split and C4's first 1,100 validation documents by " ".
HUB: dict[str, HubText] = {
    "wikitext2": HubText(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in SPLITS},
    ),
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        "refs/convert/parquet",  # the hub's own Parquet copy of a set that is a script; a branch, no commit is known
        {split: f"penn_treebank/{split}/0000.parquet" for split in SPLITS},
        column="sentence",
        joiner=" ",
    ),
    "c4": HubText(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        joiner=" ",
        drawn=True,
        in_order=1100,
    ),
    "alpaca": HubText(
        "tatsu-lab/alpaca",
        "dce01c9b08f87459cf36a430d809084718273017",
        dict.fromkeys(SPLITS, "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"),  # the only one: `_part` splits it
        drawn=True,
    ),
    "pg19": HubText(
        "emozilla/pg19",
        "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
        {
            "train": "data/train-00000-of-00023-5263dc4323e881d2.parquet",
            "validation": "data/validation-00000-of-00001-0f92e2337f79aeac.parquet",
            "test": "data/test-00000-of-00001-29a571947c0b5ccc.parquet",
        },
        drawn=True,
    ),
}


def check_source(source: str, split: str, text_column: str | None = None) -> None:
    """Raise what `token_windows` would raise for this source, as far as it shows without a tokenizer or a network.

    A file is read whole; of a data set of the hub only the name and the split are checked.

    Raises:
        InputError: unknown data set or split; a file that is missing, empty, damaged, of unknown kind, not UTF-8, or
            without the column.
    """
    if not _is_hub(source, split):
        file_text(file_of(source, split), text_column)


def token_windows(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    split: str,
    length: int,
    count: int | None = None,
    stride: int | None = None,
    seed: int = 42,
    text_column: str | None = None,
) -> torch.Tensor:
    """Windows of one length, without padding, out of a text: int64 (N, S) with S = `length`, on the CPU.

    The documents are joined to one text and the tokenizer is called once on it with its default special tokens, as GPTQ
    and SliceGPT do: a tokenizer that puts a token at the beginning (Llama's) puts one before the whole text, not one
    before each window.

    Args:
        source: a data set ("demo" or a name in `HUB`) or a file: `.txt`, `.jsonl` (both also `.gz`, `.xz`) or
            `.parquet`, documents joined by a blank line. "{split}" in a file's name stands for the split, and `.gz` is
            added or taken off where only that file is there. A file without it is the same text for every split.
        split: "train", "validation" or "test".
        count: None for all windows, in the order of the text, the last tokens left out where they fill no window. A
            number without `stride` for so many windows that start at random tokens, each start once where the text has
            that many. A number with `stride` for so many distinct windows of the grid of stride, drawn at random and
            returned in the order of the text.
        stride: tokens from one window of the grid to the next; None for `length`: no overlap.
        seed: of the random draws. They come from generators of their own.
        text_column: the field of a `.jsonl` or `.parquet` file that holds the text ("text" if None).

    Raises:
        InputError: what `check_source` raises; a number below 1; a text shorter than one window; fewer windows in the
            grid than `count`; a hub that can't be reached.
    """
    for name, value in (("length", length), ("count", count), ("stride", stride)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; a number of windows or tokens must be at least 1")
    step = stride or length
    if _is_hub(source, split):
        text = _hub_text(source, split, None if count is None else count * step * CHARACTERS_A_TOKEN, seed)
    else:
        text = file_text(file_of(source, split), text_column)

    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)  # (T,)
    if len(tokens) < length:
        raise InputError(
            f"the text {source!r} ({split}) has {len(tokens)} tokens and one window needs {length}: "
            "take a longer text or shorter windows"
        )
    if count is None:
        return tokens.unfold(0, length, step).contiguous()
    generator = torch.Generator().manual_seed(seed)
    if stride is None:
        places = len(tokens) - length + 1
        if count <= places:
            starts = torch.randperm(places, generator=generator)[:count]
        else:
            starts = torch.randint(places, (count,), generator=generator)
    else:
        places = (len(tokens) - length) // stride + 1
        if count > places:
            raise InputError(
                f"the text {source!r} ({split}) has {places} windows of {length} tokens, one every {stride}, and "
                f"{count} were asked for: ask for fewer, take a smaller stride or a longer text"
            )
        starts = torch.randperm(places, generator=generator)[:count].sort().values * stride
    return tokens[starts[:, None] + torch.arange(length)]


def _is_hub(source: str, split: str) -> bool:
    """Whether the source is a data set of the hub (else "demo" or a file), its name and split checked."""
    if is_file(source):
        return False
    if source != DEMO and source not in HUB:
        known = [DEMO, *HUB]
        near = difflib.get_close_matches(source, known, n=1)
        raise InputError(
            f"unknown data set {source!r}{f' (did you mean {near[0]!r}?)' if near else ''}; known are "
            f"{', '.join(known)}, and files that end in {FILES}"
        )
    splits = tuple(HUB[source].files) if source in HUB else SPLITS
    if split not in splits:
        raise InputError(f"the data set {source!r} has no split {split!r}; it has {', '.join(splits)}")
    return source in HUB


def is_file(source: str) -> bool:
    """Whether a source is meant as a file, not as the name of a data set."""
    if source == DEMO or source in HUB:
        return False
    return "/" in source or file_kind(source) is not None or local_path(source).exists()


def file_of(source: str, split: str) -> Path:
    """The file that a split of the demo text or of a file is in."""
    if source == DEMO:
        return DEMO_FOLDER / f"{split}.txt.xz"
    path = local_path(source.replace("{split}", split))
    if "{split}" in source and not path.exists():
        other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(path.name + ".gz")
        path = other if other.exists() else path
    return path


def _hub_text(name: str, split: str, characters: int | None, seed: int) -> str:
    """The joined documents of a split; of a `drawn` set with `characters` given, a random part at least that long."""
    hub = HUB[name]
    rows = _hub_rows(name, split)
    if len(set(hub.files.values())) == 1:
        rows = _part(rows, split)
    if not hub.drawn or characters is None:
        return hub.joiner.join(rows[: hub.in_order or len(rows)][hub.column])
    documents: list[str] = []
    for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
        documents.append(rows[index][hub.column])
        characters -= len(documents[-1])
        if characters <= 0:
            break
    return hub.joiner.join(documents)


def _part(rows: "Dataset", split: str) -> "Dataset":
    """The split of a set that has only one: 80, 10 and 10 %, by the calls that SliceGPT's code makes for Alpaca."""
    parts = rows.train_test_split(test_size=0.2, seed=42)
    rest = parts["test"].train_test_split(test_size=0.5, seed=42)
    return {"train": parts["train"], "test": rest["train"], "validation": rest["test"]}[split]


def _hub_rows(name: str, split: str) -> "Dataset":
    """The rows of one file of the hub, downloaded once into the hub's cache and then found there without a network."""
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download

    hub = HUB[name]
    try:
        path = hf_hub_download(hub.repo, hub.files[split], repo_type="dataset", revision=hub.revision)
        builder = "parquet" if path.endswith(".parquet") else "json"
        return load_dataset(builder, data_files=path, split="train")  # "train" is what `datasets` calls a lone file
    except Exception as error:  # the errors of the hub's client, of its HTTP library and of `datasets` share no class
        raise InputError(
            f"the data set {name!r} can't be had from {hub.repo} on the hub ({' '.join(str(error).split())[:200]}): "
            "check the network and HF_HUB_OFFLINE, log in with `hf auth login` if it is gated, or use a local file"
        ) from error
