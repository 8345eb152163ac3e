"""Options of a script: each a field of a frozen dataclass that says all there is to say of its flag.

The parser, the checks of limits, the tables of docs/options.md and the keys of results are made from the fields.
"""

from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from slicing.command_line import Parser, path
from slicing.families import InputError

DEMO = "demo"

Options = TypeVar("Options")


@dataclass(frozen=True)
class Flag:
    """What is to be said of a flag besides its name, type and default.

    default: in words, where the value doesn't say it. for_demo: the default with the demo model.
    low, high: the least and the greatest number that it takes. enters: of which keys its value is a part, "point" (the
    points' and the run's) or "run"; "" where it leaves the numbers as they are, or they have what it names by content.
    added: later than the first keys, so it enters none where it has its default: those keys stay as they were.
    """

    help: str
    default: str | None = None
    for_demo: str | None = None
    choices: tuple[str | int, ...] | None = None
    low: int | None = None
    high: int | None = None
    metavar: str | None = None
    is_path: bool = False
    positional: bool = False
    enters: str = ""
    added: bool = False


def flag(value: Any = MISSING, **said: Any) -> Any:
    """A field with a flag. `value`: its default; a flag without one must be given. The rest is what a `Flag` takes."""
    return field(default=value, metadata={"flag": Flag(**said)})


def parse(
    options: type[Options], description: str | None, argv: Sequence[str] | None, *, program: str | None = None
) -> Options:
    """The options on a command line; those with a default of their own for the demo model get it there. `program`: how
    the command is called, where that is not the file's name."""
    parser = Parser(description)
    parser.prog = program or parser.prog
    for each in _fields(options):
        name, arguments = _argument(each)
        parser.add_argument(name, **arguments)
    given = vars(parser.parse_args(argv))
    for each in _fields(options):
        value = given[each.name]
        if value is None and each.default is not MISSING:
            demo = said(each).for_demo if given.get("model") == DEMO else None
            given[each.name] = demo or each.default
        elif isinstance(value, list):
            given[each.name] = tuple(value)
    return options(**given)


def check_limits(options: Any) -> None:
    """InputError where a number is not within its flag's limits."""
    for each in _fields(type(options)):
        given, low, high = getattr(options, each.name), said(each).low, said(each).high
        for value in given if isinstance(given, tuple) else (given,):
            if value is None or low is None or low <= value <= (value if high is None else high):
                continue
            limits = f"be at least {low}" if high is None else f"lie in [{low}, {high}]"
            raise InputError(f"{spelled(each)} is {value}: it must {limits}")


def values_for(options: Any, *keys: str) -> dict[str, Any]:
    """The options that enter one of these keys, by name."""
    return {
        each.name: getattr(options, each.name)
        for each in _fields(type(options))
        if said(each).enters in keys and not (said(each).added and getattr(options, each.name) == each.default)
    }


def table(options: type) -> list[str]:
    """A Markdown table of the flags."""
    rows = ["| option | meaning | default |", "|---|---|---|"]
    for each in _fields(options):
        about = said(each)
        taken = f" ({', '.join(map(str, about.choices))})" if about.choices else ""
        default = "must be given" if each.default is MISSING else _default(each) or "off"
        rows.append(f"| `{spelled(each)}` | {about.help}{taken} | {default} |")
    return rows


def said(each: "Field[Any]") -> Flag:
    """What a field says of its flag."""
    found: Flag = each.metadata["flag"]
    return found


def spelled(each: "Field[Any]") -> str:
    """The flag as it is typed."""
    return each.name if said(each).positional else "--" + each.name.replace("_", "-")


def _fields(options: type) -> "tuple[Field[Any], ...]":
    return fields(options)


def _default(each: "Field[Any]") -> str:
    about = said(each)
    if about.default is not None or any(each.default is off for off in (MISSING, None, False, ())):  # 0 is not off
        return about.default or ""
    return f"{each.default}" + (f"; {about.for_demo} for the demo model" if about.for_demo else "")


def _argument(each: "Field[Any]") -> tuple[str, dict[str, Any]]:
    """Name and keywords for argparse. The default is None for it: `parse` puts in the field's."""
    about, default = said(each), _default(each)
    arguments: dict[str, Any] = {"help": about.help + (f" (default: {default})" if default else "")}
    if each.type is bool:
        return spelled(each), arguments | {"action": "store_const", "const": True}
    parts = [part for part in get_args(each.type) if part is not NoneType] or [each.type]
    several = tuple in (get_origin(each.type), *map(get_origin, parts))
    kind = get_args(each.type if get_args(each.type)[-1] is Ellipsis else parts[0])[0] if several else parts[0]
    arguments |= {"type": path if about.is_path else kind, "choices": about.choices, "metavar": about.metavar}
    if several:
        arguments["nargs"] = "+"
    if not about.positional:
        arguments["required"] = each.default is MISSING
    return spelled(each), arguments
