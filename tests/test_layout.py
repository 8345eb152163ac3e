"""The house: which module may import which, what `slicing` shows, and what is installed with it."""

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import slicing

ROOT = Path(slicing.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "slicing").rglob("*.py")
}
WINGS = ("slicing.report", "slicing.experiment", "slicing")  # each may import itself and those after it


@cache
def imports(name: str) -> frozenset[str]:
    """The modules that a module imports anywhere, also inside functions; of this package those that exist."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = name.rpartition(".")[0] + "." if node.level else ""
            module = start + (node.module or "")
            inner = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner or {module}
    return frozenset(found)


def wing(name: str) -> int:
    return next(i for i, prefix in enumerate(WINGS) if f"{name}.".startswith(f"{prefix}."))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_from_the_report_to_the_experiment_to_the_library(name):
    wrong = [other for other in imports(name) & MODULES.keys() if wing(other) < wing(name)]
    assert not wrong, f"{name} imports {', '.join(wrong)}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("slicing.report.")))
def test_the_report_needs_no_more_of_an_experiment_than_its_results(name):
    needed = {other for other in imports(name) & MODULES.keys() if other.startswith("slicing.experiment.")}
    assert needed <= {f"slicing.experiment.{other}" for other in ("results", "comparison", "names")}


def test_the_report_needs_no_torch():
    report = ", ".join(name for name in MODULES if name.startswith("slicing.report.") and "__main__" not in name)
    code = (
        f"import sys, {report}; print([name for name in ('torch', 'transformers', 'lm_eval') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "[]\n"


def test_no_modules_import_one_another_in_a_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(imports(name) & MODULES.keys()):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(MODULES):
        visit(name, ())


def test_what_is_copied_beside_a_saved_model_imports_torch_transformers_and_itself():
    copied, found = ["slicing.modeling"], set()
    while copied:
        name = copied.pop()
        found.add(name)
        outside = {other.partition(".")[0] for other in imports(name) - MODULES.keys()}
        assert outside - sys.stdlib_module_names <= {"torch", "transformers"}, name
        copied += imports(name) & MODULES.keys()
    assert found == {"slicing.modeling", "slicing.families", "slicing.layouts", "slicing.narrow", "slicing.parts"}


# ---- what is public


def test_dir_shows_the_public_names_and_each_is_there():
    assert {"load_model", "token_windows", "rotate_and_slice", "perplexity", "final_slices"} <= set(dir(slicing))
    for name in dir(slicing):
        assert getattr(slicing, name)
    assert [name for name in dir(slicing) if not name.startswith("__")] == sorted(slicing.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'slice_everything'"):
        slicing.slice_everything  # noqa: B018


# ---- pages that are made of the code


@pytest.mark.parametrize("page", ["options.md", "results_file.md"])
def test_a_page_made_of_the_code_is_up_to_date(page):
    made = runpy.run_path(str(ROOT / "docs" / "tables.py"))["PAGES"][page]()
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == made, "PYTHONPATH=. python docs/tables.py"


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))],
)
def test_links_and_paths_in_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert all(((ROOT / page).parent / link).exists() for link in links), links
    paths = re.findall(r"`((?:slicing|tests|docs)/[\w/.]+)`", text)
    assert all((ROOT / path).exists() for path in paths), paths


# ---- what is installed


def test_every_module_and_the_demo_text_are_installed():
    packages = set(PROJECT["tool"]["setuptools"]["packages"])
    assert {
        name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in MODULES.items()
    } == packages
    (pattern,) = PROJECT["tool"]["setuptools"]["package-data"]["slicing"]
    assert {path.name for path in (ROOT / "slicing").glob(pattern)} >= {"test.txt.xz", "README.md"}


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"].items(), ids=lambda command: command[0])
def test_a_command_is_a_function_of_an_installed_module(command):
    module, _, function = command[1].partition(":")
    assert module in MODULES or module in PROJECT["tool"]["setuptools"]["py-modules"]
    assert callable(getattr(import_module(module), function))


def test_the_pinned_versions_are_those_of_the_dependencies_and_within_their_ranges():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {pin.name: pin for pin in map(Requirement, (line for line in lines if not line.startswith("#")))}
    ranges = {given.name: given.specifier for given in map(Requirement, PROJECT["project"]["dependencies"])}
    assert pinned.keys() == ranges.keys()
    for name, pin in pinned.items():
        (exact,) = pin.specifier
        assert exact.operator == "==", name
        assert exact.version in ranges[name], name


def test_the_version_stands_in_one_place_and_in_the_list_of_changes():
    assert "version" not in PROJECT["project"]
    assert f"## {slicing.__version__}" in (ROOT / "CHANGELOG.md").read_text()
