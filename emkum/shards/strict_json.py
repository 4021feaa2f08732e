"""JSON of a cache, read as if somebody hostile had written it."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_BYTES = 64_000_000  # a segment of 200,000 tars; a receipt that leaves out all 65,536 rows needs 20 MB
MAX_VALUES = 2_000_000
MAX_DEPTH = 64
_INT64 = range(-(2**63), 2**63)


def loads(data: bytes) -> Any:
    """The one value that `data` holds, whatever is in it in at most 10 bytes for a byte and 120 for a value: 0.9 GB.

    One character beyond 16 bits makes four bytes of each of its string, which is held twice while it is parsed.

    Raises ValueError saying why, for anything but UTF-8 JSON without duplicate keys, NaN, infinities, integers beyond
    64 bits, halves of surrogate pairs, and nesting deeper than MAX_DEPTH.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes of JSON, more than {MAX_BYTES}")
    num_values = 1 + sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if num_values > MAX_VALUES:
        raise ValueError(f"about {num_values} values in one JSON file, more than {MAX_VALUES}")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except RecursionError as error:
        raise ValueError(f"JSON nested deeper than {MAX_DEPTH}") from error
    _check([value])
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!a} comes twice")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or int(text) not in _INT64:
        raise ValueError(f"the integer {text[:40]} does not fit 64 bits")
    return int(text)


def _check(value: list[Any]) -> None:
    """Depth and text, level by level rather than by recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):  # and the list around it
        below: list[Any] = []
        for container in level:
            for item in container if isinstance(container, list) else (*container, *container.values()):
                if isinstance(item, (dict, list)):
                    below.append(item)
                elif isinstance(item, str) and not item.isascii():
                    item.encode("utf-8")  # refuses halves of surrogate pairs, which no file or terminal can take
        level = below
    if level:
        raise ValueError(f"JSON nested deeper than {MAX_DEPTH}")
