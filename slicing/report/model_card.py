"""The README.md of a saved sliced model: what it was made of and how, what it scores, how it is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from slicing.experiment.comparison import dense_point
from slicing.experiment.results import Point, Results, Text
from slicing.files import read_json, replacing
from slicing.layouts import SHORTCUTS
from slicing.report.origin import Origin, origin_of, public_command, public_name
from slicing.task_scores import TaskScore

_TEMPLATE = """\
---
{front_matter}
---

# {title}

The decoder layers of {origin} on a narrower hidden state: rotated onto its principal components (SliceGPT, Ashkboos
et al. 2024), with a width for each layer by its redundancy (dynamic slicing, EMNLP 2024 Findings).

{table}

Widths, layer by layer: {widths}.
{tasks}
{use}

## Licence

{licence}

## Made with

```
{command}
```
"""

_SLICED = """\
## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/of/this/folder", trust_remote_code=True)
```

`trust_remote_code=True` runs the Python files beside this one: `modeling.py` and what it imports, `families.py`,
`layouts.py`, `narrow.py` and `parts.py`; read them first. They need Transformers {transformers} or newer. lm-eval
runs it by `lm_eval run --model hf --model_args pretrained=path/of/this/folder,trust_remote_code=True --tasks ...`.

GGUF converters (llama.cpp, Ollama) can't read this folder: their formats have one hidden size for all layers and no
shortcuts. Where all widths above are the full one and only the MLPs are cut, `examples/to_gguf.py` of the code that
made it writes a GGUF file.

## Four bits

Quantise the linear layers of attention and MLP, and leave the rest alone: the shortcuts, which carry the whole hidden
state from one layer's basis to the next one's, ruin the model where they are quantised with the others.

```python
keep = {keep}
BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=keep)  # bitsandbytes
TorchAoConfig(Int4WeightOnlyConfig(group_size=32), modules_to_not_convert=keep)  # torchao
QuantoConfig(weights="int4", modules_to_not_convert=keep)  # quanto
GPTQModifier(targets="Linear", scheme="W4A16", ignore=[f"re:{{name}}" for name in keep])  # llm-compressor
```

Kernels for four bits want widths that their groups divide: `--round-interval 64` or 128 makes such a model."""

_PLAIN = """\
## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
```

This is a plain checkpoint of its family, with MLPs of another inner width and the hidden size as it was: it has no code
and no shortcuts, so it loads, is quantised and is converted as the model that it was made of."""

_OLDEST_TRANSFORMERS = "5.17"
# Regular expressions from the beginning of a module's or a weight's name: the one form that all four tools understand.
UNQUANTISED = [*(f".*{name}" for name in SHORTCUTS), "lm_head"]


def write_model_card(
    folder: str | Path,
    *,
    origin: Origin,
    slice_percentage: float,
    slice_base: float | None,
    widths: Sequence[int],
    rotations: int,
    calibration: str,
    text: Text,
    perplexity: tuple[float | None, float],
    tasks: Mapping[str, TaskScore],
    parameters: tuple[int, int],
    command: str,
    solved: str = "",
) -> Path:
    """Write README.md into the folder of a saved sliced model and return its path.

    origin: the model that was sliced.
    slice_percentage, slice_base: SP and SB in [0, 1]; SB None where the widths come from no schedule.
    widths: L hidden sizes.
    rotations: 1 or 2 bases a layer.
    calibration: the text of the calibration, in words.
    text: of the perplexity; its source a name, no path.
    perplexity: of the dense model, None where it was not measured, and of the sliced one.
    tasks: the scores of the sliced model.
    parameters: of the dense and of the sliced model, shortcuts and head included, a tied table once.
    command: the line that made the model, as anybody may read it.
    solved: what was done besides rotating and slicing, in words.
    """
    dense, sliced = parameters
    title = f"{origin.name}, sliced by {100 * slice_percentage:g} %"
    named = origin.hub or origin.name
    scores = f"dense {_number(perplexity[0])}, sliced {_number(perplexity[1])}"
    where = f"{text.source} ({text.split}), windows of {text.length}"
    rows = [
        ("model that was sliced", f"{named} (revision {origin.revision})" if origin.revision else named),
        ("mean cut over the layers (SP)", f"{slice_percentage:.2%}"),
        ("part of the cut that every layer gets (SB)", "none" if slice_base is None else f"{slice_base:.2%}"),
        ("bases a layer", str(rotations)),
        *([("besides", solved)] if solved else []),
        ("calibrated on", calibration),
        (f"perplexity on {where}", scores),
        ("parameters", f"dense {dense:,}, sliced {sliced:,}"),
        ("true cut of the parameters", f"{1 - sliced / dense:.2%}"),
    ]
    card = _TEMPLATE.format(
        front_matter=_front_matter(origin, title, text, perplexity[1], tasks),
        title=title,
        origin=named,
        table=_table([("", ""), *rows]),
        widths=", ".join(map(str, widths)),
        tasks=_task_scores(tasks),
        use=_PLAIN if _is_plain(folder) else _SLICED.format(transformers=_OLDEST_TRANSFORMERS, keep=UNQUANTISED),
        licence=_licence(origin),
        command=command,
    )
    path = Path(folder) / "README.md"
    with replacing(path) as partial:
        partial.write_text(card, encoding="utf-8")
    return path


def write_card(folder: str | Path, point: Point, results: Results) -> Path:
    """Write the card of a sliced point that a run has saved."""
    model, test, calibration = results.model, results.data.perplexity, results.data.calibration
    assert calibration is not None
    assert point.mean is not None
    assert point.widths is not None
    assert point.rotations is not None
    windows = f"{calibration.windows} windows of {calibration.length} tokens"
    once = ", by the dense model's signals" if point.calibration == "once" else ""
    dense = dense_point(results)
    return write_model_card(
        folder,
        origin=origin_of(model.name, model.revision),
        slice_percentage=point.mean,
        slice_base=point.base,
        widths=point.widths,
        rotations=point.rotations,
        calibration=f"{windows} of {public_name(calibration.source)} (train){once}",
        text=replace(test, source=public_name(test.source)),
        perplexity=(None if dense is None else dense.perplexity, point.perplexity),
        tasks=point.tasks,
        parameters=(model.parameters, point.parameters),
        command=public_command(),
        solved="; ".join(_solved(point)),
    )


def _is_plain(folder: str | Path) -> bool:
    """Whether a folder's config is a family's own, so that Transformers opens it without code."""
    path = Path(folder) / "config.json"
    return path.is_file() and read_json(path).get("model_type") != "sliced"


def _solved(point: Point) -> Iterator[str]:
    if point.metric == "gradient":
        yield "bases in the gradient metric"
    if point.refit:
        yield "writers solved anew against the dense stream"
    if point.inner_widths and point.inner_mean:
        yield f"inner widths cut by {point.inner_mean:.2%} in the mean: {', '.join(map(str, point.inner_widths))}"


def _front_matter(origin: Origin, title: str, text: Text, perplexity: float, tasks: Mapping[str, TaskScore]) -> str:
    """YAML for the hub, with the scores as its `model-index`."""
    from huggingface_hub import EvalResult, ModelCardData

    from slicing.text import HUB

    generation: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text Generation"}
    hub = HUB.get(text.source)
    results = [
        EvalResult(
            **generation,
            dataset_type=hub.repo if hub else "text",
            dataset_name=text.source,
            dataset_split=text.split,
            metric_type="perplexity",
            metric_value=round(perplexity, 4),
            metric_args={"window": text.length},
        )
    ]
    for task, score in tasks.items():
        if score.value is not None:
            stderr = score.stderr
            results.append(
                EvalResult(
                    **generation,
                    dataset_type=task,
                    dataset_name=task,
                    metric_type="accuracy" if str(score.metric).startswith("acc") else str(score.metric),
                    metric_name=str(score.metric),
                    metric_value=round(score.value, 4),
                    metric_args=None if stderr is None else {"stderr": round(stderr, 4)},
                )
            )
    data = ModelCardData(
        base_model=origin.hub,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sliced", "slicegpt"],
        model_name=title,
        eval_results=results,
        **origin.licence,
    )
    return str(data.to_yaml(line_break="\n"))


def _licence(origin: Origin) -> str:
    named = origin.hub or origin.name
    if not origin.licence:
        return f"The terms of {named} hold for this model too; it does not say them where this card could read them."
    name = origin.licence.get("license_name") or origin.licence["license"]
    return f"The terms of {named} ({name}) hold for this model too."


def _task_scores(tasks: Mapping[str, TaskScore]) -> str:
    if not tasks:
        return ""
    rows = [("task", "metric", "score")]
    for task, score in tasks.items():
        error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        rows.append((task, str(score.metric), f"{_number(score.value, 4)}{error}"))
    return f"\n{_table(rows)}\n"


def _table(rows: list[Any]) -> str:
    """Markdown; the first row is the head."""
    head, *body = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _number(value: float | None, digits: int = 3) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _cell(text: str) -> str:
    """Text that a Markdown table takes."""
    return " ".join(text.split()).replace("|", "\\|")
