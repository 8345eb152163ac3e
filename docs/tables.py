"""Write docs/options.md and docs/results_file.md from the code: the fields of the options and of the results.

PYTHONPATH=. python docs/tables.py
"""

from pathlib import Path

import calculate_LR
import slicing.structure
from slicing.experiment.options import Options
from slicing.experiment.results import Results, VectorFile
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

RESULTS_FILE = """\
# What results.json holds

Made by `docs/tables.py` from the structures of `slicing/experiment/results.py`, which read, check and write the file.
Another key, a missing one or a value of another type is refused, with its place. A key of an object stands after the
object's name and a dot, so does one of a list's items; `*` is any name. "or absent": earlier versions did not write it.
Numbers are finite. Each file in `points/` holds one of the points.

{results}

## The file of calculate_LR.py --output

`--vector-cut` takes it; other keys are left aside.

{vector}
"""


def options() -> str:
    """docs/options.md."""
    return OPTIONS.format(lr="\n".join(table(calculate_LR.Options)), sweep="\n".join(table(Options)))


def results_file() -> str:
    """docs/results_file.md."""
    tables = (slicing.structure.table(kind) for kind in (Results, VectorFile))
    return RESULTS_FILE.format(**dict(zip(("results", "vector"), map("\n".join, tables), strict=True)))


PAGES = {"options.md": options, "results_file.md": results_file}

if __name__ == "__main__":
    for name, text in PAGES.items():
        Path(__file__).with_name(name).write_text(text(), encoding="utf-8")
