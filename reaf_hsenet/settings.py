"""Settings as dataclasses. A field's annotation says the kind of its value, `setting` the range; JSON is
held to both.
"""

import dataclasses
import math
import sys
import typing
from dataclasses import MISSING, dataclass, fields, is_dataclass

from reaf_hsenet.errors import InputError


@dataclass(frozen=True)
class Range:
    """Numbers more than `above`, at least `least`, at most `most`, whichever of these is given."""

    above: float | None = None
    least: float | None = None
    most: float | None = None

    def expected(self, value) -> str:
        """What is wrong with a number, or with one of a tuple or list, in words; empty when nothing is."""
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
    default=MISSING, *, above: float | None = None, least: float | None = None, most: float | None = None
):
    """A dataclass field of one number or several, which must lie in this range. least: -inf allows that
    too.
    """
    held = {"range": Range(above, least, most)}
    return (
        dataclasses.field(metadata=held)
        if default is MISSING
        else dataclasses.field(default=default, metadata=held)
    )


def ranges(cls) -> dict[str, Range]:
    """The ranges of a dataclass's fields, by name."""
    return {field.name: field.metadata["range"] for field in fields(cls) if "range" in field.metadata}


def check_ranges(config) -> None:
    """Raise InputError, naming the field, for a number out of its range. To be called by __post_init__."""
    for name, held in ranges(config).items():
        if expected := held.expected(value := getattr(config, name)):
            raise InputError(f"{name} of {type(config).__name__} is {value!r:.60}; expected {expected}")


def to_dict(config) -> dict:
    """The JSON form of a dataclass and of those in it."""
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
    """Lists as tuples, and objects as the dataclass that an annotation names."""
    if isinstance(value, list):
        parts = typing.get_args(hint)
        return tuple(_rebuilt(x, parts[0] if parts else None, source) for x in value)
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if is_dataclass(kind)]
    return from_dict(kinds[0], value, source) if kinds and isinstance(value, dict) else value


def _fits(value, hint) -> bool:
    """Whether a value is of an annotation: a class, a tuple, a Literal, or a union of these."""
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
