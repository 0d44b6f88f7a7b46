"""Settings as dataclasses. A field says the kind of its value, its range, and its flag on the command line.

JSON files and command lines are held to it: a new setting is a new field.
"""

import argparse
import dataclasses
import math
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass

from reaf_hsenet.errors import InputError


@dataclass(frozen=True)
class Range:
    """Numbers more than `above`, at least `least`, at most `most`, whichever of these is given."""

    above: float | None = None
    least: float | None = None
    most: float | None = None

    def expected(self, value) -> str:
        """Return what a number, or one of a tuple or list, is expected to be; empty when it is."""
        for x in value if isinstance(value, tuple | list) else (value,):
            if type(x) not in (int, float):
                continue
            if self.above is not None and not x > self.above:
                return f"more than {self.above}"
            if self.least is not None and not x >= self.least:
                return f"{self.least} or more"
            if self.most is not None and not x <= self.most:
                return f"{self.most} or less"
        return ""


def setting(
    default=MISSING,
    help: str = "",
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    flag: str = "",
    only: tuple[str, ...] = (),
    changeable: bool = False,
    required: bool = False,
    none: str | None = None,
    bare=MISSING,
    const=MISSING,
    word: Callable | None = None,
    metavar: str | tuple[str, ...] | None = None,
):
    """Return a dataclass field with a range. A field with a `help` is a flag of the command line, too.

    above, least, most: range of a number, or of each of several. least=-inf allows that too.
    flag: its name, when it is not the field's. metavar: as argparse has it. required: it must be given.
    only: stages or tasks that have it, as ("clip2",); none given: all.
    changeable: --resume may give another value; without, a run keeps the value it was started with.
    none: the word for None, as `all` of `--unfreeze-text all`.
    bare: the value of the flag alone, as True of `--resume`, which also takes a word.
    const: the value of a flag that takes no word, as False of `--slices-stay`.
    word: what reads a word, where the annotation does not tell.
    """
    how = {"help": help, "flag": flag, "only": only, "changeable": changeable, "required": required}
    how |= {"none": none, "bare": bare, "const": const, "word": word, "metavar": metavar}
    how["range"] = Range(above, least, most)
    return dataclasses.field(metadata=how, **({} if default is MISSING else {"default": default}))


def check_ranges(config) -> None:
    """Raise InputError, naming the field, for a number out of its range. To be called by __post_init__."""
    for field in fields(config):
        value = getattr(config, field.name)
        if expected := field.metadata.get("range", Range()).expected(value):
            raise InputError(f"{field.name} of {type(config).__name__} is {value!r:.60}; expected {expected}")


def flag_name(field: dataclasses.Field) -> str:
    """Return the name of a field's flag, as argparse stores it; empty where it has none."""
    how = field.metadata
    return how["flag"] or field.name if how.get("help") else ""


def flags(*classes) -> dict[str, tuple[dataclasses.Field, object]]:
    """Return {name of a flag: (field, annotation)} of dataclasses; of two with one name, the first."""
    found = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            if name := flag_name(field):
                found.setdefault(name, (field, hints[field.name]))
    return found


def add_flags(parser, known: dict[str, tuple[dataclasses.Field, object]]) -> None:
    """Add flags to a parser or to a group of it. A flag that is not on the command line leaves no value."""
    for name, (field, hint) in known.items():
        how = field.metadata
        only = f" ({', '.join(how['only'])})" if how["only"] else ""
        options = {"dest": name, "default": argparse.SUPPRESS, "help": how["help"] + only}
        options["required"] = how["required"]
        kind, count, choices = (how["word"], None, []) if how["word"] else _word(hint)
        if how["const"] is not MISSING:
            options |= {"action": "store_const", "const": how["const"]}
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            choices += [how["none"]] if choices and how["none"] else []
            options |= {"type": _reader(kind, how["none"]), "choices": choices or None}
            options |= {"nargs": count, "metavar": how["metavar"]}
            if how["bare"] is not MISSING:
                options |= {"nargs": "?", "const": how["bare"]}
        parser.add_argument("--" + name.replace("_", "-"), **options)


def _word(hint) -> tuple[type, int | str | None, list]:
    """Return (type of a word, number of words, choices) of an annotation, None in a union left out."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return type(parts[0]), None, parts
    if typing.get_origin(hint) is tuple:
        kind, _, choices = _word(parts[0])
        return kind, "+" if parts[-1] is ... else len(parts), choices
    return _word(parts[-1]) if parts else (hint, None, [])


def _reader(kind: type, none: str | None):
    """Return what turns a word into a value; the word for None stays."""

    def read(text: str):
        return text if text == none else kind(text)

    read.__name__ = kind.__name__ if none is None else f"{kind.__name__} or {none}"
    return read


def spelled(name: str, value, known: dict[str, tuple[dataclasses.Field, object]]) -> str:
    """Return a flag as the command line has it: `--lr`, `--no-guidance`."""
    negated = value is False and known[name][0].metadata["const"] is MISSING
    return "--" + "no-" * negated + name.replace("_", "-")


def given(args: argparse.Namespace, known: dict[str, tuple[dataclasses.Field, object]], key: str) -> dict:
    """Return {name: value} of the flags on the command line.

    key: the flag, `stage` or `task`, that says which of them belong together. Raises InputError for a value
    that is out of range, and for a flag of another stage or task.
    """
    found = {}
    for name, value in vars(args).items():
        if name not in known:
            continue
        how, shown = known[name][0].metadata, spelled(name, value, known)
        if expected := how["range"].expected(value):
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"{shown} {value}: expected {expected}")
        if how["only"] and getattr(args, key) not in how["only"]:
            raise InputError(f"{shown}: is an option of --{key} {' and '.join(how['only'])}; leave it out")
        value = None if how["none"] and value == how["none"] else value
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def flag_values(config) -> dict:
    """Return {name of a flag: value} of a dataclass and of those in it."""
    found = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if name := flag_name(field):
            found[name] = value
        elif is_dataclass(value):
            found |= flag_values(value)
    return found


def changed(config, values: dict):
    """Return a dataclass with the values of flags, also in dataclasses in it; other flags are passed over."""
    changes = {}
    for field in fields(config):
        value, name = getattr(config, field.name), flag_name(field)
        if name in values:
            changes[field.name] = values[name]
        elif not name and is_dataclass(value):
            changes[field.name] = changed(value, values)
    return dataclasses.replace(config, **changes)


def to_dict(config) -> dict:
    """Return the JSON form of a dataclass and of those in it."""
    return dataclasses.asdict(config)


def from_dict(cls, values: dict, source: str = "config.json"):
    """Rebuild a dataclass from its JSON form: lists become tuples, objects the dataclasses of the
    annotations.

    A class with `variant(values)` says which of its subclasses the values are of; one with GONE, which
    settings that earlier versions wrote are passed over. Raises InputError, naming `source` and the setting,
    for what is absent, unknown, of another kind or out of range.
    """
    if not isinstance(values, dict):
        raise InputError(f"{source}: {cls.__name__} is {values!r:.60}; expected an object of settings")
    cls = cls.variant(values) if hasattr(cls, "variant") else cls
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}
    values = {name: value for name, value in values.items() if name not in getattr(cls, "GONE", ())}
    if unknown := sorted(set(values) - set(known)):
        raise InputError(
            f"{source}: {cls.__name__} has no setting {', '.join(unknown)[:200]}: written by another version?"
        )
    needed = [
        n for n, field in known.items() if field.default is MISSING and field.default_factory is MISSING
    ]
    if absent := [name for name in needed if name not in values]:
        raise InputError(
            f"{source}: {cls.__name__} lacks {', '.join(absent)}; put the file back as it was written"
        )
    made = {}
    for name, value in values.items():
        made[name] = _rebuilt(value, hints[name], source)
        least = known[name].metadata.get("range", Range()).least
        endless = type(value) is float and value == least == -math.inf
        if not (endless or _fits(made[name], hints[name])):
            kind = getattr(hints[name], "__name__", "") if isinstance(hints[name], type) else ""
            expected = kind or str(hints[name]).replace("typing.", "")
            raise InputError(f"{source}: {name} of {cls.__name__} is {value!r:.60}; expected {expected}")
    try:
        return cls(**made)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _rebuilt(value, hint, source: str):
    """Return lists as tuples, and objects as the dataclass that an annotation names."""
    if isinstance(value, list):
        parts = typing.get_args(hint)
        return tuple(_rebuilt(x, parts[0] if parts else None, source) for x in value)
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if is_dataclass(kind)]
    return from_dict(kinds[0], value, source) if kinds and isinstance(value, dict) else value


def _fits(value, hint) -> bool:
    """Return whether a value is of an annotation: a class, a tuple, a Literal, or a union of these."""
    parts, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        parts = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items()
        )
    if parts:
        return any(_fits(value, part) for part in parts)
    if hint is float:  # a finite one, also where JSON has it as a whole number
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) if is_dataclass(hint) else type(value) is hint
