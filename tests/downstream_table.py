"""Try the tools that people use on a model, and write what was seen into docs/downstream.md.

    PYTHONPATH=. python tests/downstream_table.py --write
    PYTHONPATH=. python tests/downstream_table.py llama.cpp torchao

Each row is one or several tests, run in this Python. What isn't installed here is not tried: with --write its row stays
as it was last seen, with the versions of then (docs/downstream.json), so that tools that need different Pythons stand
in one table.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGE, SEEN = ROOT / "docs" / "downstream.md", ROOT / "docs" / "downstream.json"
BEGIN, END = "<!-- seen: made by tests/downstream_table.py -->", "<!-- end of what was seen -->"
COMMON = ("torch", "transformers")
Seen = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Row:
    """A row of the table: what is tried of a tool, by which tests (of a file, by the beginning of their names, with a
    part in brackets), and the packages whose versions count."""

    what: str
    file: str
    tests: tuple[str, ...]
    packages: tuple[str, ...] = ()


DOWN = "test_downstream.py"
ROWS: dict[str, Row] = {
    "Auto classes": Row(
        "`AutoModelForCausalLM`, `AutoModel`, `AutoModelForSequenceClassification` open the folder, with trusted code"
        " and with this package",
        "test_saved_format.py",
        ("test_auto_classes_open_the_folder",),
    ),
    "vLLM, SGLang: imitated": Row(
        "what their Transformers backends do: flat config, `AutoModel.from_config`, own attention, weights by name",
        "test_saved_format.py",
        ("test_an_engine_with_a_transformers_backend",),
    ),
    "earlier folders": Row(
        "a nested config and weights below `model.` load",
        "test_saved_format.py",
        ("test_folders_of_the_first_versions_load",),
    ),
    "plain checkpoints": Row(
        "equal inner widths: opened without trusted code, the same logits",
        "test_plain.py",
        ("test_equal_inner_widths", "test_a_saved_model_of_any_family", "test_constant_inner_slicing"),
    ),
    "lm-eval": Row(
        "its `hf` model on the folder, with code and plain",
        "test_modeling.py test_plain.py",
        ("test_lm_eval", "test_constant_inner_slicing"),
        ("lm_eval",),
    ),
    "torch.export": Row("dynamic length, `use_cache` passed", DOWN, ("test_torch_export",)),
    "peft": Row(
        "LoRA on all linear layers, shortcuts too, merged, saved, reloaded (`examples/recover.py`)",
        "test_examples.py",
        ("test_recovery",),
        ("peft",),
    ),
    "TRL, SFT": Row(
        "SFTTrainer: full, LoRA, packing; saved and loaded", DOWN, ("test_trl_fine_tunes",), ("trl", "peft", "datasets")
    ),
    "TRL, DPO": Row("DPOTrainer", DOWN, ("test_trl_prefers",), ("trl", "datasets")),
    **{
        name: Row("four bits, the model card's list left alone", DOWN, (f"test_four_bits[{module}]",), (package,))
        for name, module, package in (
            ("bitsandbytes", "bitsandbytes", "bitsandbytes"),
            ("torchao", "torchao", "torchao"),
            ("quanto", "optimum.quanto", "optimum-quanto"),
        )
    },
    "llm-compressor": Row(
        "GPTQ with its default pipeline, the model card's list left alone",
        DOWN,
        ("test_llm_compressor",),
        ("llmcompressor",),
    ),
    "GGUF": Row(
        "inner widths by layer written (`examples/to_gguf.py`)", DOWN, ("test_inner_widths_by_layer",), ("gguf",)
    ),
    "llama.cpp": Row(
        "the same logits from that file, by its Python binding",
        DOWN,
        ("test_llama_cpp",),
        ("llama-cpp-cffi", "llama-cpp-py-sync"),
    ),
}


def outcomes(rows: list[Row]) -> dict[tuple[str, str], str]:
    """passed, failed or skipped by file and test, of all the files of these rows."""
    files = sorted({file for row in rows for file in row.file.split()})
    names = sorted({name.partition("[")[0] for row in rows for name in row.tests})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-k", " or ".join(names)]
        subprocess.run([*command, *(str(TESTS / file) for file in files)], cwd=ROOT, check=False, stdout=sys.stderr)
        cases = ElementTree.parse(report).iter("testcase")
        return {
            (f"{case.get('classname', '').rpartition('.')[2]}.py", case.get("name", "")): _outcome(case)
            for case in cases
        }


def _outcome(case: ElementTree.Element) -> str:
    found = {child.tag for child in case}
    return "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"


def belongs(row: Row, file: str, test: str) -> bool:
    """Whether a test is one of a row's."""
    if file not in row.file.split():
        return False
    return any(
        test.startswith(name.partition("[")[0]) and name.partition("[")[2].rstrip("]") in test for name in row.tests
    )


def seen_now(names: list[str]) -> Seen:
    """What the tests of these rows say here; rows whose every test was skipped are left out."""
    found = outcomes([ROWS[name] for name in names])
    seen: Seen = {}
    for name in names:
        row = ROWS[name]
        count = Counter(outcome for test, outcome in found.items() if belongs(row, *test))
        if not count["passed"] + count["failed"]:
            continue
        result = f"{count['failed']} of {count['passed'] + count['failed']} tests fail" if count["failed"] else "works"
        seen[name] = {"seen": result, "with": ", ".join(filter(None, map(_version, (*row.packages, *COMMON))))}
    return seen


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package).partition('+')[0]}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def table(seen: Seen) -> str:
    """The Markdown table of all rows."""
    lines = ["| tool | what was tried | seen | with |", "|---|---|---|---|"]
    for name, row in ROWS.items():
        entry = seen.get(name, {"seen": "not tried", "with": ""})
        lines.append(f"| {name} | {row.what} | {entry['seen']} | {entry['with']} |")
    return "\n".join(lines)


def page(text: str, seen: Seen) -> str:
    """The page with this table in the place of the one that it has."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(seen)}\n\n{END}{rest.partition(END)[2]}"


def main(argv: list[str] | None = None) -> int:
    """Print what was seen, and write the page. Returns 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", choices=[[], *ROWS], metavar="TOOL", help="rows to try; all by default")
    parser.add_argument("--write", action="store_true", help="write docs/downstream.md and docs/downstream.json")
    options = parser.parse_args(argv)
    found = seen_now(options.tools or list(ROWS))
    for name, entry in found.items():
        print(f"{name}: {entry['seen']} ({entry['with']})")
    if options.write:
        kept = json.loads(SEEN.read_text(encoding="utf-8")) if SEEN.exists() else {}
        seen = {name: (kept | found)[name] for name in ROWS if name in kept | found}
        SEEN.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), seen), encoding="utf-8")
    return int(any(entry["seen"] != "works" for entry in found.values()))


if __name__ == "__main__":
    sys.exit(main())
