"""Write docs/options.md and docs/families.md from the code: the fields of the options, the table of families.

PYTHONPATH=. python docs/tables.py
"""

from pathlib import Path

import calculate_LR
from slicing.experiment.options import Options
from slicing.families import FAMILIES, REFUSED, Family
from slicing.flags import table

OPTIONS = """\
# Options

Made by `docs/tables.py` from the fields of the options; `--help` shows the same.

## calculate_LR.py

{lr}

## mean_cut_accuracy_experiments.py

{sweep}

Bad input ends with exit code 2 and one line, before a model is loaded where that is possible. Known data sets come from
the Hugging Face hub at fixed commits; [traps.md](traps.md) says what to look out for.
"""
FAMILY_PAGE = """\
# Model families

Made by `docs/tables.py` from the table in `slicing/families.py`, which is keyed by the `model_type` in a model's
config. LR is measured for any decoder; these {count} families can be sliced:

| layers | families |
|---|---|
{rows}

Not sliced, with the reason in the message: OPT-350m, encoder-decoders, checkpoints that are quantised already{refused}.

Experts return the width that they read, so the narrower of the two is filled up with zeros: an expert layer between the
widths d and d' has the parameters of max(d, d'), and in the last layer those of D. Where a family's body shapes its
output like its embeddings (GPT-2, GPT-J) an untied table keeps its width and is projected.

[CONTRIBUTING.md](../CONTRIBUTING.md) says how a family is added.
"""


def options() -> str:
    """docs/options.md."""
    return OPTIONS.format(lr="\n".join(table(calculate_LR.Options)), sweep="\n".join(table(Options)))


def families() -> str:
    """docs/families.md."""
    kinds: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        kinds.setdefault(_kind(family), []).append(f"`{name}`")
    rows = "\n".join(f"| {kind} | {', '.join(names)} |" for kind, names in kinds.items())
    return FAMILY_PAGE.format(count=len(FAMILIES), rows=rows, refused="".join(f", `{name}`" for name in REFUSED))


def _kind(family: Family) -> str:
    if any(block.experts for block in family.blocks):
        return "mixture of experts"
    layouts = {block.parallel for block in family.blocks}
    if layouts == {False}:
        return "attention, then MLP"
    return "attention and MLP in parallel" if layouts == {True} else "either, by the config"


PAGES = {"options.md": options, "families.md": families}

if __name__ == "__main__":
    for name, text in PAGES.items():
        Path(__file__).with_name(name).write_text(text(), encoding="utf-8")
