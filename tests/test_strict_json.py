"""JSON of a cache is read as if somebody hostile had written it."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from emkum.shards import strict_json


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', r"the key 'a' comes twice"),
        (b'{"x": [{"deep": 1, "deep": 1}]}', r"the key 'deep' comes twice"),
        (b"[NaN]", "NaN is no JSON"),
        (b"[Infinity]", "Infinity is no JSON"),
        (b"[-Infinity]", "-Infinity is no JSON"),
        (b"[1e999]", "1e999 is too large"),
        (b"[9223372036854775808]", "does not fit 64 bits"),
        (b"[" + b"9" * 100_000 + b"]", "does not fit 64 bits"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
        (b"[" * 200_000 + b"]" * 200_000, "nested deeper than 64"),
        (b'["\\ud800"]', "surrogates not allowed"),
        (b'{"\\udc80": 1}', "surrogates not allowed"),
        (b'["\xff"]', "can't decode byte"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"a": 1}'.encode("utf-16"), "can't decode byte"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b'["a\nb"]', "control character"),
        (b"[" + b"0," * 4_000_000 + b"0]", "values in one JSON file"),
    ],
)
def test_what_no_honest_writer_writes_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        strict_json.loads(data)


def test_what_a_character_of_four_bytes_costs_is_within_the_promise() -> None:
    text = b'"' + b"a" * 1_000_000 + "\U0001f600".encode() + b'"'
    many = b"[" + b'"", ' * 100_000 + b"{}, " * 100_000 + b"0]"
    for data, promised in ((text, 10 * len(text)), (many, 10 * len(many) + 120 * 200_001)):
        tracemalloc.start()
        try:
            strict_json.loads(data)
            assert tracemalloc.get_traced_memory()[1] < promised
        finally:
            tracemalloc.stop()


def test_a_file_that_is_too_large_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="11 bytes of JSON, more than 10"):
        strict_json.loads(b'"123456789"')


def test_everything_else_is_read_as_by_json() -> None:
    value = {"a": [1, -2.5, 1e-300, None, True, "ü\U0001f600", {}], "b": -(2**63), "c": 2**63 - 1}
    for deep in ([], {"a": 1}):
        for _ in range(63):
            deep = [deep]
        assert strict_json.loads(json.dumps(deep).encode()) == deep
    assert strict_json.loads(json.dumps(value).encode()) == value
    assert strict_json.loads(json.dumps(value, ensure_ascii=False, indent=1).encode()) == value
