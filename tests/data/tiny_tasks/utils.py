"""Loader of the tasks in this folder: `custom_dataset: !function utils.load` in each YAML file."""

import json
from pathlib import Path
from typing import Any

import datasets


def load(data_files: dict[str, str], **_metadata: Any) -> datasets.DatasetDict:
    """Read JSON lines, one file a split, beside this module."""
    splits = {}
    for split, name in data_files.items():
        lines = (Path(__file__).resolve().parent / name).read_text(encoding="utf-8").splitlines()
        splits[split] = datasets.Dataset.from_list([json.loads(line) for line in lines])
    return datasets.DatasetDict(splits)


def process(documents: datasets.Dataset) -> datasets.Dataset:
    """Put a word before each question."""
    return documents.map(lambda document: {"question": f"Question: {document['question']}"})
