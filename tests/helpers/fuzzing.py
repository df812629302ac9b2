"""Hypothesis strategies that damage valid input: bytes, JSON, text."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.sampled_from([0, -1, 1, 2, 8.0, 0.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")])
TEXT = st.text(max_size=8) | st.sampled_from(["", "8", "nan", "null", "..", "/", "a\0b", "\u2028", "\ud800", "é" * 300])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
"""Any value that Python's JSON module can write, including NaN and infinity."""


DEEP = "[" * 10_000 + "]" * 10_000
HOW_OFTEN = st.sampled_from([1, 1, 1, 2, 4])


@st.composite
def damaged_bytes(draw: st.DrawFn, sound: bytes, within: int | None = None) -> bytes:
    """Flip, cut, delete, insert and repeat some bytes of `sound`.

    Args:
        within: start every change at or before this position.
    """
    data = sound
    for _ in range(draw(HOW_OFTEN)):
        place = draw(st.integers(0, min(len(data), within or len(data))))
        length = draw(st.integers(1, 16))
        rest = data[place + length :]
        change = draw(st.sampled_from(["flip", "cut", "delete", "insert", "replace", "repeat"]))
        if change == "flip" and place < len(data):
            data = data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
        elif change == "cut":
            data = data[:place]
        elif change == "delete":
            data = data[:place] + rest
        elif change == "insert":
            data = data[:place] + draw(st.binary(max_size=16)) + data[place:]
        elif change == "replace":
            data = data[:place] + draw(st.binary(min_size=length, max_size=length)) + rest
        elif change == "repeat":
            data = data[:place] + data[place : place + length] * 2 + rest
    return data


@st.composite
def damaged_text(draw: st.DrawFn, sound: str, pieces: st.SearchStrategy[str]) -> str:
    """Insert some pieces of text into `sound`, or replace text with them."""
    text = sound
    for _ in range(draw(HOW_OFTEN)):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(pieces) + text[place + draw(st.integers(0, 8)) :]
    return text


@st.composite
def damaged_json(draw: st.DrawFn, sound: Any) -> str:
    """Return the JSON text of `sound` with some values replaced, nudged, removed, renamed, repeated or nested."""
    values = copy.deepcopy(sound)
    for _ in range(draw(HOW_OFTEN)):
        places = list(_places(values))
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "nudge", "nudge", "remove", "rename"]))
        if change == "replace":
            container[key] = draw(JUNK)
        elif change == "nudge":
            container[key] = draw(st.sampled_from(_neighbours(container[key])))
        elif change == "rename" and isinstance(container, dict):
            container[draw(TEXT)] = container.pop(key)
        else:
            del container[key]
    text = json.dumps(values)
    extra = draw(st.sampled_from(["", "", "", "", "", "", "twice", "deep"]))
    if extra and isinstance(values, dict) and values:
        name = json.dumps(draw(st.sampled_from(list(values))))
        text = f"{{{name}: {DEEP if extra == 'deep' else 1}, {text[1:]}"
    return text


def _neighbours(value: Any) -> list[Any]:
    """Return values that resemble `value`, some of which may be valid."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [2 * value, value + 1, value - 1, -value, 0, str(value), 1.0 * min(value, 10**9)]
    if isinstance(value, list):
        return [value[1:], value * 2, value[::-1], []]
    if isinstance(value, str):
        return [value.upper(), f" {value}", value[:-1], [value]]
    return [[value], value]


def _places(values: Any) -> Any:
    """Yield every (container, key or index) in nested lists and dictionaries."""
    keys = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    for key in keys:
        yield values, key
        yield from _places(values[key])
