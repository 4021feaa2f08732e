"""Committed rows are computed again before a run adds to a cache: what a fingerprint cannot see, this finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from emkum.errors import IdentityMismatch
from emkum.shards.reader import Cache, Field
from emkum.stage1_extract.plan import Committed
from emkum.stage1_extract.recompute import Chosen, Compared, Place, Work, holds, recompute, rows_at_hand

CHECKED_ROWS = 8  # of each space, and of pairs, before a run adds to a cache
Say = Callable[[str], None]


def check_committed(held: Committed, say: Say) -> None:
    """Computes CHECKED_ROWS committed rows of each space again, with the networks, tars and settings of this run.

    Does nothing where no row of a tar at hand is committed. Raises IdentityMismatch for rows that do not agree,
    SourceChanged for a tar that holds something else where the picture was.
    """
    names = [name for name, receipts in held.receipts.items() if receipts]
    cache = Cache.open(held.store, only=names)
    compared: list[Compared] = []
    for work in _works(held, names):
        chosen = _spread(cache, work, CHECKED_ROWS)
        compared += recompute(cache, work, chosen, held.config.batch_size, held.config.threads or 2)
    wrong = [found for found in compared if found.problem]
    if wrong:
        raise _mismatch(cache, wrong, compared, held)
    if compared:
        spaces = {name: ("pair" if field.is_of_pairs else field.spec.space) for name, field in held.fields.items()}
        num_rows = len({(found.place, spaces[found.field]) for found in compared})
        cosine = min((found.cosine for found in compared if found.cosine is not None), default=1.0)
        say(f"{num_rows} committed rows computed again agree with the cache (lowest cosine {cosine:.6f})")


def _works(held: Committed, names: Sequence[str]) -> list[Work]:
    config, works = held.config, []
    for space, frozen in (("image", held.image_pass), ("text", held.text_pass)):
        here = (held.fields[name] for name in names)
        wanted = {f.spec.name: f.wanted for f in here if f.spec.space == space and not f.is_of_pairs}
        if wanted and space == "image":
            works.append(Work("image", wanted, frozen, held.paths, size=config.side, kept=held.crops))
        elif wanted:
            assert held.tokenizer is not None
            works.append(Work("text", wanted, frozen, {}, tokenizer=held.tokenizer, max_tokens=config.max_tokens))
    paired = {name: held.fields[name].wanted for name in names if held.fields[name].is_of_pairs}
    if paired:
        assert held.tokenizer is not None
        read = Work("text", paired, None, held.paths, config.side, held.crops, held.tokenizer, config.max_tokens)
        works.append(replace(read, pair_pass=held.pair_pass))
    heard = {name: held.fields[name].wanted for name in names if held.fields[name].spec.space == "audio"}
    if heard:
        sounds = held.audio_pass
        works.append(Work("audio", heard, None, held.paths, audio_pass=sounds, max_seconds=config.max_seconds))
    return works


def _spread(cache: Cache, work: Work, count: int) -> Chosen:
    """`count` rows from blocks spread over those committed, every field's among them; other rows as the cache grows."""
    fields = [cache.field(name) for name in work.wanted]
    random = np.random.default_rng(sum(len(field.receipts) for field in fields))
    every = sorted({block for field in fields for block in field.receipts})
    first = [every[i] for i in np.linspace(0, len(every) - 1, count).astype(int)]
    unseen = [sorted(field.receipts) for field in fields if not set(first) & set(field.receipts)]
    order = list(dict.fromkeys([*(blocks[len(blocks) // 2] for blocks in unseen), *first, *every]))
    at_hand = {view: rows_at_hand(cache, work, view) for view in {view for _, view in every}}
    rows: dict[tuple[int, int], np.ndarray] = {}
    chosen: dict[Place, tuple[str, ...]] = {}
    while len(chosen) < count and order:
        for block in list(order):
            if block not in rows:
                rows[block] = _usable(fields, at_hand[block[1]], *block)
            if not len(rows[block]):
                order.remove(block)
                continue
            at = int(random.integers(len(rows[block])))
            place = Place(int(rows[block][at]), block[1])
            rows[block] = np.delete(rows[block], at)
            chosen[place] = tuple(field.name for field in fields if holds(field, place, cache.rows_per_block))
            if len(chosen) == count:
                break
    return chosen


def _usable(fields: Sequence[Field], at_hand: np.ndarray, block: int, view: int) -> np.ndarray:
    """The rows of a block that some field holds, and whose picture or caption is at hand."""
    receipts = [field.receipts[block, view] for field in fields if (block, view) in field.receipts]
    first, end = np.searchsorted(at_hand, [receipts[0].first_row, receipts[0].first_row + receipts[0].rows])
    bad = [{q.row for q in receipt.quarantined} for receipt in receipts]
    return np.setdiff1d(at_hand[first:end], list(set.intersection(*bad)))


def _mismatch(
    cache: Cache, wrong: Sequence[Compared], compared: Sequence[Compared], held: Committed
) -> IdentityMismatch:
    worst = min(wrong, key=lambda found: -1.0 if found.cosine is None else found.cosine)
    field = cache.field(worst.field)
    then, now = field.record["environment"], held.fields[worst.field].environment
    made = f"; made with {_words(then)}, computed again with {_words(now)}" if then and now else ""
    return IdentityMismatch(
        f"{cache.store.url} field {worst.field}, {worst.name}: {worst.problem} ({len(wrong)} of {len(compared)} "
        f"comparisons disagree){made}",
        "nothing was changed; go on with the versions and the device that the cache was made with, or write to another "
        f"folder with --cache; `emkum cache verify {cache.store.url} --sample 100 --teacher ...` shows how far it goes",
    )


def _words(environment: Mapping[str, Any]) -> str:
    known = ("emkum", "torch", "pillow", "device", "revision")
    return ", ".join(f"{key} {environment[key]}" for key in known if environment.get(key))
