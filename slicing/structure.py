"""Structures whose fields say what they hold: JSON becomes one, or an error that names the key; a table lists them.

A field is `name: Annotated[type, "what it holds"]`. One with a default may be absent, as in files of earlier versions.
"""

import re
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from slicing.families import InputError

Kind = TypeVar("Kind")
_WORDS: dict[object, str] = {int: "int", float: "number", str: "str", bool: "bool", NoneType: "null"}
_LISTS: dict[object, str] = {int: "ints", float: "numbers", str: "strs"}


class Structure(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON object of known keys, its fields; they are written in their order."""


def as_json(content: Any) -> Any:
    """A structure, or a list or dictionary of them, as dictionaries and lists for `write_json`."""
    return msgspec.to_builtins(content)


def from_json(content: Any, kind: type[Kind], label: str = "") -> Kind:
    """What a JSON file holds, as this structure (or a list of structures).

    InputError with the key's place below `label` where a key is missing or unknown, or a value has another type.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise InputError(_explained(content, kind, label, str(error))) from error


def table(kind: type) -> list[str]:
    """A Markdown table of the keys of a structure and of those within it."""
    rows = [f"| `{key}` | {kind_of} | {meaning} |" for key, kind_of, meaning in keys(kind)]
    return ["| key | type | meaning |", "|---|---|---|", *rows]


def keys(kind: type, place: str = "") -> Iterator[tuple[str, str, str]]:
    """Each key with its type and meaning; after an object's key those of the object, after a list's those of an item
    of it, with `*` for names of any kind."""
    optional = {field.name for field in msgspec.structs.fields(kind) if not field.required}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        given, meaning = get_args(hint) if get_origin(hint) is Annotated else (hint, "")
        key = f"{place}{name}"
        yield key, _in_words(given) + (" or absent" if name in optional else ""), meaning
        for part in _parts(given):
            if get_origin(part) is dict:
                key, part = f"{key}.*", get_args(part)[1]
            elif get_origin(part) is list:
                part = get_args(part)[0]
            if isinstance(part, type) and issubclass(part, msgspec.Struct):
                yield from keys(part, f"{key}.")


def _parts(hint: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself where it is none."""
    if get_origin(hint) is Annotated:
        return _parts(get_args(hint)[0])
    arguments = get_args(hint)
    return arguments if NoneType in arguments or get_origin(hint) not in (None, dict, list, Literal) else (hint,)


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Annotated:  # a part of a union that says what it is, as do fields
        said = getattr(hint.__metadata__[0], "description", None)
        return said or _in_words(get_args(hint)[0])
    if len(parts := _parts(hint)) > 1:
        return " or ".join(map(_in_words, parts))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return _LISTS.get(get_args(hint)[0], "objects")
    return _WORDS.get(hint, "object")


def _explained(content: Any, kind: Any, label: str, error: str) -> str:
    """msgspec's error in this project's words, with the value and the names of free keys, which it leaves out."""
    message, _, path = error.partition(" - at `$")
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        for part in _parts(kind):
            if name and isinstance(part, type) and issubclass(part, msgspec.Struct):
                content, kind, label = content[name], get_type_hints(part, include_extras=True)[name], f"{label}.{name}"
            elif index == "..." and get_origin(part) is dict:
                kind = get_args(part)[1]
                free = next(key for key, value in content.items() if not _fits(value, kind))
                content, label = content[free], f"{label}.{free}"
            elif index and get_origin(part) is list:
                content, kind, label = content[int(index)], get_args(part)[0], f"{label}[{index}]"
    label = label.lstrip(".")
    if found := re.fullmatch(r"Object missing required field `(.*)`", message):
        return f"{label}.{found[1]} is missing".lstrip(".")
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", message, re.S):
        return f"{label}.{found[1]} is not a known key".lstrip(".")
    given = f"{str(content)[:40]!r} of type {type(content).__name__}"
    return f"{label or 'it'} is {given}: it must be {_in_words(kind)}"


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True
