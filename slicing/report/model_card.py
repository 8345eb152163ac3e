"""The README.md of a saved sliced model: what it was made of and how, what it scores, how it is loaded."""

import json
from pathlib import Path
from typing import Any

from slicing.files import local_path, replacing
from slicing.loading import DEMO

_TEMPLATE = """\
---
{front_matter}---

# {name}, sliced by {percent:g} %

The decoder layers of {origin} on a narrower hidden state: rotated onto its principal components (SliceGPT, Ashkboos
et al. 2024), with a width for each layer by its redundancy (dynamic slicing, EMNLP 2024 Findings).

{table}

Widths, layer by layer: {widths}.

## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("path/of/this/folder", trust_remote_code=True)
```

`trust_remote_code=True` runs the Python files beside this one, `modeling.py`, `families.py` and `layouts.py`;
read them first. They need Transformers {transformers} or newer. lm-eval evaluates it with
`lm_eval run --model hf --model_args pretrained=path/of/this/folder,trust_remote_code=True --tasks ...`.

The terms of {origin} hold for this model too.

GGUF converters (llama.cpp, Ollama) can't read this folder: their formats have one hidden size for all layers and no
shortcuts. vLLM has not been tried.

## Made with

```
{command}
```
"""

_OLDEST_TRANSFORMERS = "5.17"
_DEMO_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def write_model_card(
    folder: str | Path,
    *,
    model_name: str,
    revision: str | None,
    slice_percentage: float,
    slice_base: float | None,
    widths: list[int],
    rotations: int,
    calibration: str,
    perplexity: dict[str, Any],
    parameters: tuple[int, int],
    command: str,
) -> Path:
    """Write README.md into the folder of a saved sliced model and return its path.

    model_name, revision: of the model that was sliced: a hub name, a local path or "demo"; a commit, or None.
    slice_percentage, slice_base: SP and SB in [0, 1]; SB None where the widths come from no schedule.
    widths: L hidden sizes.
    rotations: 1 or 2 bases a layer.
    calibration: the text of the calibration, in words.
    perplexity: "data" (in words), "dense" and "sliced"; a value may be None where it was not measured.
    parameters: of the dense and of the sliced model, shortcuts and head included, a tied table once.
    command: the line that made the model.
    """
    dense, sliced = parameters
    scores = [f"{model} {_number(perplexity[model])}" for model in ("dense", "sliced")]
    rows = [
        ("model that was sliced", f"{model_name} (revision {revision})" if revision else model_name),
        ("mean cut over the layers (SP)", f"{slice_percentage:.2%}"),
        ("part of the cut that every layer gets (SB)", "none" if slice_base is None else f"{slice_base:.2%}"),
        ("bases a layer", str(rotations)),
        ("calibrated on", calibration),
        (f"perplexity on {perplexity['data']}", ", ".join(scores)),
        ("parameters", f"dense {dense:,}, sliced {sliced:,}"),
        ("true cut of the parameters", f"{1 - sliced / dense:.2%}"),
    ]
    card = _TEMPLATE.format(
        front_matter=_front_matter(model_name),
        name=model_name.rstrip("/").rpartition("/")[2],
        percent=100 * slice_percentage,
        origin=model_name,
        table="\n".join(["| | |", "|---|---|", *(f"| {_cell(what)} | {_cell(value)} |" for what, value in rows)]),
        widths=", ".join(map(str, widths)),
        transformers=_OLDEST_TRANSFORMERS,
        command=command,
    )
    path = Path(folder) / "README.md"
    with replacing(path) as partial:
        partial.write_text(card, encoding="utf-8", errors="backslashreplace")  # a file's name may be no UTF-8
    return path


def _front_matter(model_name: str) -> str:
    """YAML for the hub, which takes names of its models only: of a local path, the last part."""
    base = _DEMO_ON_THE_HUB if model_name == DEMO else model_name
    if local_path(base).exists():
        base = local_path(base).resolve().name
    lines = [f"base_model: {json.dumps(base)}", "library_name: transformers", "pipeline_tag: text-generation"]
    return "".join(f"{line}\n" for line in [*lines, "tags:", "- sliced", "- slicegpt"])


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    """Text that a Markdown table takes."""
    return " ".join(text.split()).replace("|", "\\|")
