"""A table as text, Markdown or LaTeX."""

from collections.abc import Sequence

from slicing.experiment.results import Point, Results
from slicing.report.column import GAP, Column

FORMATS = ("text", "markdown", "latex", "csv")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"} | {"±": r"$\pm$", "<": r"$<$", ">": r"$>$", "…": r"\ldots{}"}


def text_header(columns: Sequence[Column]) -> str:
    """Three lines above the rows."""
    lines = [GAP.join(column.pad(column.titles[i]) for column in columns).rstrip() for i in (0, 1)]
    return "\n".join([*lines, "-" * max(map(len, lines))])


def text_row(columns: Sequence[Column], point: Point, results: Results) -> str:
    """A line of fixed width."""
    return GAP.join(column.pad(column.cell(point, results)) for column in columns).rstrip()


def text(columns: Sequence[Column], runs: Sequence[Results]) -> list[str]:
    """For a terminal."""
    return [text_header(columns), *(text_row(columns, point, run) for group in _groups(runs) for point, run in group)]


def _groups(runs: Sequence[Results]) -> list[list[tuple[Point, Results]]]:
    """The rows of each run; a dense model that an earlier run has, to the last digit, has its row there."""
    shown: list[object] = []
    groups = []
    for run in runs:
        group = []
        for point in run.points:
            same = run.model.name, point.key, point.nll, point.tasks
            if point.kind == "dense" and same in shown:
                continue
            shown += [same] if point.kind == "dense" else []
            group.append((point, run))
        groups.append(group)
    return [group for group in groups if group]


def markdown(columns: Sequence[Column], runs: Sequence[Results]) -> list[str]:
    """For GitHub and its like."""
    marks = ["---" if column.width < 0 else "---:" for column in columns]
    rows = [[column.cell(point, run) for column in columns] for group in _groups(runs) for point, run in group]
    head = [column.title for column in columns]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in [head, marks, *rows]]


def latex(columns: Sequence[Column], runs: Sequence[Results]) -> list[str]:
    """A tabular with the rules of the package booktabs, to be set between \\begin{table} and \\end{table}, with a rule
    before each run and below a dense model."""
    places = "".join("l" if column.width < 0 else "r" for column in columns)
    lines = [f"\\begin{{tabular}}{{{places}}}", r"\toprule"]
    lines += [_latex_row([column.titles[i] for column in columns]) for i in (0, 1)]
    for group in _groups(runs):
        lines.append(r"\midrule")
        for i, (point, run) in enumerate(group):
            if i > 0 and group[i - 1][0].kind == "dense":
                lines.append(r"\midrule")
            lines.append(_latex_row([column.cell(point, run) for column in columns]))
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join("--" if cell == "-" else _escaped(cell) for cell in cells) + r" \\"


def _escaped(cell: str) -> str:
    """Text as LaTeX prints it; signs of numbers as those of formulas."""
    found = "".join(_LATEX.get(sign, sign) for sign in cell)
    return f"${found[0]}${found[1:]}" if found[:1] in ("+", "-") and found[1:2].isdigit() else found
