"""Plain values, as JSON holds them, checked against types before anybody believes them."""

import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

ANY_CHARACTERS = 40  # of a wrong value that a message shows
NAMES = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "true or false"}
NAMES |= {int: "a whole number", float: "a finite number", type(None): "null"}


def parse_json(text: str | bytes, kind: Any = Any) -> Any:
    """Return what JSON text holds; ValueError, in one line, where it is no JSON or not of a type.

    NaN and infinity are no JSON. For the types see `find_misfit`.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if misfit := find_misfit(value, kind):
        raise ValueError(misfit)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def find_misfit(value: Any, kind: Any, place: str = "it") -> str | None:
    """Return in a few words which part of a plain value is not of a type; None where all of it is.

    Types: Any, None, bool, int, float, str, dict, Literal, unions, `list[X]`, `tuple[X, ...]`, `tuple[X, Y]`,
    `dict[str, X]`, TypedDict (with other keys beside), and Annotated with an object that `holds` numbers,
    such as a Range. Lists stand for tuples and tuples for lists; whole numbers stand for float, bool for
    neither. A float is finite.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return None
    if typing.is_typeddict(kind):
        return _misfit_of_keys(value, kind, place)
    if origin is Annotated:
        return find_misfit(value, arguments[0], place) or _misfit_of_range(value, arguments[1:], place)
    if origin in (typing.Union, types.UnionType):
        misfits = [find_misfit(value, argument, place) for argument in arguments]
        return None if None in misfits else misfits[0]
    if origin is Literal:
        is_one = any(type(value) is type(one) and value == one for one in arguments)
        return None if is_one else f"{place} is {_show(value)}, not one of {', '.join(map(str, arguments))}"
    kind, plain = type(None) if kind is None else kind, origin or kind
    if not _is_of(value, plain):
        return f"{place} is {_show(value)}, not {NAMES[plain]}"
    if plain is dict and arguments:
        parts = [(item, arguments[1], f"{place}[{_show(key)}]") for key, item in value.items()]
        parts += [(key, arguments[0], f"a key of {place}") for key in value]
    elif plain in (list, tuple) and arguments:
        repeated = plain is list or (len(arguments) == 2 and arguments[1] is Ellipsis)
        if not repeated and len(value) != len(arguments):
            return f"{place} has {len(value)} values, not {len(arguments)}"
        kinds = arguments[:1] * len(value) if repeated else arguments
        parts = [(item, kinds[index], f"{place}[{index}]") for index, item in enumerate(value)]
    else:
        return None
    return next((misfit for part in parts if (misfit := find_misfit(*part))), None)


def _misfit_of_keys(value: Any, kind: Any, place: str) -> str | None:
    if not isinstance(value, Mapping):
        return f"{place} is {_show(value)}, not {NAMES[dict]}"
    for key, of_key in typing.get_type_hints(kind, include_extras=True).items():
        if key not in value:
            if key in kind.__required_keys__:
                return f"{key} is missing" if place == "it" else f"{place} has no {key}"
        elif misfit := find_misfit(value[key], of_key, key if place == "it" else f"{place}.{key}"):
            return misfit
    return None


def _misfit_of_range(value: Any, markers: tuple[Any, ...], place: str) -> str | None:
    if not isinstance(value, int | float):
        return None
    ranges = [marker for marker in markers if hasattr(marker, "holds") and not marker.holds(value)]
    return f"{place} is {_show(value)}, not a number {ranges[0]}" if ranges else None


def _is_of(value: Any, plain: type) -> bool:
    if plain in (list, tuple):
        return isinstance(value, list | tuple)
    if plain is float:
        try:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        except OverflowError:  # a whole number beyond floats
            return False
    if plain is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, plain)


def _show(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return f"{NAMES[type(value)]} of {len(value)}"
    text = ascii(value) if not isinstance(value, int) or abs(value) < 2**63 else "a huge number"
    return text if len(text) <= ANY_CHARACTERS else f"{text[:ANY_CHARACTERS]}..."
