"""Write docs/options.md, the tables of all options, from the fields that the parsers are made of.

PYTHONPATH=. python docs/options_tables.py docs/options.md
"""

import sys
from pathlib import Path

import calculate_LR
from slicing.experiment.options import Options
from slicing.flags import table

TEXT = """\
# Options

Made from the fields of the options by `docs/options_tables.py`; `--help` shows the same.

## calculate_LR.py

{lr}

## mean_cut_accuracy_experiments.py

{sweep}

Bad input ends with exit code 2 and one line, before a model is loaded where that is possible. Known data sets come from
the Hugging Face hub at fixed commits; [traps.md](traps.md) says what to look out for. `--tasks` with a mean accuracy
counts the tasks that are scored by an accuracy.
"""


def text() -> str:
    """The page."""
    return TEXT.format(lr="\n".join(table(calculate_LR.Options)), sweep="\n".join(table(Options)))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text(), encoding="utf-8")
