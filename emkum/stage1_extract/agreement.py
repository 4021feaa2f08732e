"""What the fields of an extraction must agree with in the cache, and what is said where they do not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from emkum.models.passes import TARGETS
from emkum.models.targets import recorded_rule, rule_as_text
from emkum.shards.fingerprint import Fingerprint, differing, require_same
from emkum.shards.layout import FieldSpec
from emkum.shards.writer import CacheWriter
from emkum.stage1_extract.fields import EXACT, PlannedField


def check_record(writer: CacheWriter, field: PlannedField) -> None:
    """Refuses a field that the cache holds with another fingerprint, before anything is changed."""
    record = writer.field_record(field.spec.name)
    if record is not None:
        cached = record["fingerprint"]
        asked = replace(field.fingerprint, statistics=cached.get("statistics"))
        require_same(field.spec.name, cached, asked, writer.store.url, _way_back(field.spec, cached, asked))


_BESIDE = "give the teacher another name with --name, or write to another folder with --cache"


def _way_back(spec: FieldSpec, cached: dict[str, Any], asked: Fingerprint) -> str:
    """The flag that goes on with a field which differs from this run's in that alone; "" where there is none."""
    keys = set(differing(cached, asked.to_json()))
    if not keys or not keys <= {"layers", "output", "row_shape"}:
        return ""
    if "layers" in keys:
        modality = spec.name.split("/")[2]
        return (
            f"go on with the rule of the cache: --layers {rule_as_text(recorded_rule(cached, modality), modality)}; "
            f"or {_BESIDE}"
        )
    if spec.kind == "top_logits" and "row_shape" in keys:
        return f"go on with as many as the cache has: --logits-top {cached['row_shape'][0] - 1}; or {_BESIDE}"
    if asked.output == f"{cached.get('output')}{EXACT}":
        return f"they were rounded to {asked.compute} by emkum 0.2 and are not any more: {_BESIDE}"
    return ""


def new_defaults(writer: CacheWriter, fields: dict[str, PlannedField], new: Collection[str]) -> list[str]:
    """A line for every target that nobody named and that is new beside others of the same network: defaults change."""
    lines = []
    for name, field in fields.items():
        before = name.rpartition("/")[0]
        if name not in new or field.wanted is None or field.wanted.what in ("tokens", "top_logits"):
            continue
        others = {other: writer.field_record(f"{before}/{other}") for other in TARGETS}
        weights = field.fingerprint.weights
        there = [o for o, record in others.items() if record and record["fingerprint"].get("weights") == weights]
        if "logits-top" in there and name.endswith("/logits"):
            top = (others["logits-top"] or {})["fingerprint"]["row_shape"][0] - 1
            lines.append(f"new field {name} beside the {top} largest; --logits-top {top} goes on with those alone")
        elif there:
            now = [other.rpartition("/")[2] for other in fields if other.startswith(f"{before}/")]
            lines.append(
                f"new field {name} beside {', '.join(there)}: the default targets of {field.wanted.network} are now "
                f"{', '.join(now)}; --targets {','.join(there)} goes on with what is there"
            )
    return lines
