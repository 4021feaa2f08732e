"""What statistic of what: the request, the name it is kept under, its fingerprint, the command that makes it."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from dataclasses import dataclass
from typing import Any, Literal

from emkum.errors import UsageError
from emkum.shards.layout import canonical_json
from emkum.shards.reader import Cache
from emkum.shards.statistics.vectors import split_blocks

What = Literal["channels", "pca", "codebook", "duplicates"]
WHATS: tuple[What, ...] = ("channels", "pca", "codebook", "duplicates")
STARTS = ("k-means++", "rows")
METHODS: dict[What, int] = {"channels": 1, "pca": 1, "codebook": 1, "duplicates": 1}  # raised when numbers change


@dataclass(frozen=True)
class StatisticRequest:
    """One statistic. Settings of other kinds of statistic are ignored.

    components: pca. codes, seed, start, iterations: codebook. threshold, a cosine: duplicates.
    """

    field: str
    what: What
    split: str = "train"
    components: int = 256
    codes: int = 1024
    seed: int = 0
    start: Literal["k-means++", "rows"] = "k-means++"
    iterations: int = 20
    threshold: float = 0.95

    def __post_init__(self) -> None:
        def require(good: bool, flag: str, way_out: str) -> None:
            if not good:
                raise UsageError(f"{flag} cannot work", way_out)

        require(self.what in WHATS, f"--what {self.what}", f"choose one of: {', '.join(WHATS)}")
        require(self.components > 0, f"--components {self.components}", "give 1 or more")
        require(1 < self.codes <= 1 << 20, f"--codes {self.codes}", "give 2 or more")
        require(0 <= self.seed < 1 << 63, f"--seed {self.seed}", "give 0 or more")
        require(self.start in STARTS, f"--start {self.start}", f"choose one of: {', '.join(STARTS)}")
        require(self.iterations > 0, f"--iterations {self.iterations}", "give 1 or more")
        require(0 < self.threshold <= 1, f"--threshold {self.threshold}", "give a cosine, 0.9 to 1")

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings that this kind of statistic has."""
        return {name: getattr(self, name) for name in _PARAMETERS[self.what]}

    @property
    def name(self) -> str:
        """FIELD/WHAT and every setting that one would tell two of them apart by: .../cls/codebook-1024."""
        name = self.what + "".join(f"-{getattr(self, one)}" for one in _PARAMETERS[self.what][:1])
        for one in _PARAMETERS[self.what][1:]:
            if getattr(self, one) != _DEFAULTS[one]:
                name += f"-{one}-{getattr(self, one)}".replace("+", "p")
        return f"{self.field}/{name}" + (f"@{self.split}" if self.split != _DEFAULTS["split"] else "")

    def command(self, cache: object) -> str:
        """The command line that makes it."""
        words = ["emkum", "cache", "stats", str(cache), "--field", self.field, "--what", self.what]
        for name in (*_PARAMETERS[self.what], "split"):
            if getattr(self, name) != _DEFAULTS[name]:
                words += [f"--{name}", str(getattr(self, name))]
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        return {"field": self.field, "what": self.what, "split": self.split} | self.parameters

    def fingerprint(self, cache: Cache) -> dict[str, Any]:
        """Everything that can change its numbers: field, committed blocks, settings, method. Raises MissingField."""
        field = cache.field(self.field)
        blocks = split_blocks(cache, field, self.split, self.what == "duplicates")
        digest = hashlib.sha256()
        for place in blocks:
            receipt = field.receipts[place]
            objects = sorted([o.path, o.bytes, o.sha256] for o in receipt.objects)
            left_out = [q.row for q in receipt.quarantined]
            digest.update(canonical_json([*place, receipt.first_row, receipt.rows, objects, left_out]) + b"\n")
        return self.to_json() | {
            "field_fingerprint": field.record["fingerprint_digest"],
            "blocks": len(blocks),
            "blocks_sha256": digest.hexdigest(),
            "method": METHODS[self.what],
        }


_PARAMETERS: dict[What, tuple[str, ...]] = {
    "channels": (),
    "pca": ("components",),
    "codebook": ("codes", "seed", "start", "iterations"),
    "duplicates": ("threshold",),
}
_DEFAULTS: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(StatisticRequest)}


def request_from(record: dict[str, Any]) -> StatisticRequest:
    """From `to_json`. Raises KeyError, TypeError, UsageError for what none can be."""
    known = {one.name for one in dataclasses.fields(StatisticRequest)}
    return StatisticRequest(**{name: value for name, value in record.items() if name in known})
