"""Write docs/options.md from the code: the fields of the options.

PYTHONPATH=. python docs/tables.py
"""

from pathlib import Path

import calculate_LR
from slicing.experiment.options import Options
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


def options() -> str:
    """docs/options.md."""
    return OPTIONS.format(lr="\n".join(table(calculate_LR.Options)), sweep="\n".join(table(Options)))


PAGES = {"options.md": options}

if __name__ == "__main__":
    for name, text in PAGES.items():
        Path(__file__).with_name(name).write_text(text(), encoding="utf-8")
