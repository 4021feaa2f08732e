"""Every byte of a cache is checked: whatever is damaged is found, named, dropped, and redone to the same content."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forwarding import ForwardingReader
from tiny_cache import make_cache

from emkum import errors
from emkum.cli import run
from emkum.shards import verify as verify_module
from emkum.shards.audit import report_json, report_table
from emkum.shards.claims import CLAIMS, Claims
from emkum.shards.codec import Encoded, Summary
from emkum.shards.digest import digest
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import canonical_json, pretty_json
from emkum.shards.ledger import with_digest
from emkum.shards.reader import Cache
from emkum.shards.repair import repair
from emkum.shards.segments import SAMPLES, segment_digest
from emkum.shards.store import LocalStore, RangeReader
from emkum.shards.verify import Finding, Report, sample_keys
from emkum.shards.writer import CacheWriter

GOLDEN = Path(__file__).parent / "golden"
QUARANTINED = 3
HINTS = "_emkum/hints/scans.json"
MINUTES = float(os.environ.get("EMKUM_TORTURE_MINUTES") or 0)
TOKENS, CLS, IDS, LAYERS = (
    "image/tinyvit@1/tokens",
    "teacher/tinyvit/image/cls",
    "text/tinybert/ids",
    "teacher/tinybert/text/layers",
)


def verify(path: Path) -> Report:
    return verify_module.verify(LocalStore(path), threads=1)


def paths(report: Report) -> list[str]:
    return [finding.path for finding in report.findings]


def files_of(root: Path) -> list[str]:
    found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return sorted(path for path in found if not path.startswith(CLAIMS))


@pytest.fixture(scope="module")
def float16_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("float16"), "float16")


@pytest.fixture(scope="module")
def int8_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("int8"), "int8")


def make(root: Path, storage: str) -> Path:
    """Two segments, views, a padded block, a quarantined row, ragged text, both networks, a hint: a few kB."""
    make_cache(
        root,
        pictures=18,
        val_pictures=2,
        captions=1,
        storage=storage,
        views=2,
        cut=1,
        fields=("tokens", "cls", "ids", "text_layers"),
        quarantined=(QUARANTINED,),
    )
    LocalStore(root).write(HINTS, pretty_json(with_digest({"scans": {"/data/train.tar": [1, 2, 3, "0" * 64]}})))
    return root


@pytest.fixture(params=["int8", "float16"])
def pristine(request: pytest.FixtureRequest) -> Path:
    """Both, for the tests that go through every file."""
    return request.getfixturevalue(f"{request.param}_cache")


@pytest.fixture
def copied(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


@pytest.fixture
def cache(float16_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(float16_cache, tmp_path / "cache"))


def extract_again(pristine: Path, damaged: Path) -> None:
    """What the same extract command does: declare, and write just the blocks and networks that are not there."""
    good, writer = Cache.open(pristine), CacheWriter(damaged)
    for name, field in good.fields.items():
        values = {f.name: field.fingerprint.get(f.name) for f in dataclasses.fields(Fingerprint)}
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        statistics = (field.mean, field.std) if field.storage == "int8" else None
        writer.declare_field(field.spec, Fingerprint(**values), field.record["environment"], statistics)
        writer.grow_field(field.spec, field.num_views)
        committed = writer.receipts(name)
        for (block, view), receipt in field.receipts.items():
            if (block, view) in committed:
                continue
            bad = {q.row: q for q in receipt.quarantined}
            with writer.block(field.spec, writer.segments[receipt.segment], block, view) as out:
                for row in range(receipt.first_row, receipt.first_row + receipt.rows):
                    if row in bad:
                        out.quarantine(bad[row].tar, bad[row].key, bad[row].reason)
                        continue
                    rows = np.array([row])
                    scale = field.read_scale(rows, view) if field.storage == "int8" else None
                    length = field.lengths(rows) if field.spec.has_length else None
                    out.append(Encoded(field.read(rows, view), scale, length, Summary()))
                out.commit()
    for name in good.models:
        folder = good.model_dir(name)
        kept = sorted(p for p in folder.iterdir() if p.name != "files.json")
        writer.keep_network(name, {p.name: p.read_bytes() for p in kept})


# --- a whole cache -------------------------------------------------------------------------------------


def test_a_whole_cache_is_whole(pristine: Path) -> None:
    report = verify(pristine)
    assert report.findings == ()
    assert report.notes == ()
    assert report.sealed
    assert report.incomplete == {}
    counts = report.segments, report.fields, report.networks
    assert counts == (2, 4, 2)
    objects = [p for p in files_of(pristine) if "/c." in p and "/mean/" not in p and "/std/" not in p]
    assert report.objects == len(objects)


def test_every_file_of_a_cache_is_known(pristine: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pristine, tmp_path / "cache"))
    (copy / "thesis.txt").write_text("precious")
    (copy / "image/.c.0.tmp").write_text("half")
    report = verify(copy)
    assert report.findings == ()
    assert len(report.notes) == 2
    assert "1 unfinished writes, which the next extract sweeps: image/.c.0.tmp" in report.notes
    assert "1 files are not of the format and were not checked: thesis.txt" in report.notes


def test_verify_changes_nothing(cache: Path) -> None:
    before = {path: (cache / path).stat().st_mtime_ns for path in files_of(cache)}
    verify(cache)
    assert {path: (cache / path).stat().st_mtime_ns for path in files_of(cache)} == before


# --- every file, every damage ----------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "emptied": lambda data: b"",
    "cut by one byte": lambda data: data[:-1],
    "one byte longer": lambda data: data + b"\0",
    "a space longer": lambda data: data + b" ",
}


def put(path: Path, data: bytes | None) -> None:
    """Not in place: the file may be a hard link."""
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_found_and_named(damage: str, copied: Path) -> None:
    unseen = []
    for path in files_of(copied):
        good = (copied / path).read_bytes()
        put(copied / path, DAMAGES[damage](good))
        if path not in paths(verify(copied)) and (path, damage) != (HINTS, "deleted"):  # a hint may be missing
            unseen.append(path)
        put(copied / path, good)
    assert unseen == []
    assert verify(copied).findings == ()


def test_swapped_files_are_found_each_pair_once(copied: Path) -> None:
    """Files of one folder; with EMKUM_TORTURE_MINUTES also files of one name in two folders."""
    everything = [path.rpartition("/") for path in files_of(copied)]
    pairs = [
        ("".join(a), "".join(b))
        for i, a in enumerate(everything)
        for b in everything[i + 1 :]
        if a[0] == b[0] or (MINUTES and a[2] == b[2])
    ]
    unseen, num_pairs = [], 0
    for a, b in pairs:
        first, second = (copied / a).read_bytes(), (copied / b).read_bytes()
        if first == second:
            continue
        num_pairs += 1
        put(copied / a, second)
        put(copied / b, first)
        if not {a, b} & set(paths(verify(copied))):
            unseen.append((a, b))
        put(copied / a, first)
        put(copied / b, second)
    print(f"{num_pairs} pairs")
    assert unseen == []
    assert num_pairs > 50


def test_every_damage_that_can_be_repaired_is_redone_to_the_same_digest(pristine: Path, copied: Path) -> None:
    """And the rest is said to be beyond repair, and is left as it is."""
    want = digest(pristine)
    repaired, left = [], []
    everything = list(enumerate(files_of(pristine)))
    for number, path in everything if MINUTES else everything["int8" in str(pristine) :: 4]:
        damage = list(DAMAGES.values())[number % len(DAMAGES)]
        put(copied / path, damage((copied / path).read_bytes()))
        before = {p: (copied / p).read_bytes() for p in files_of(copied)}
        done = repair(LocalStore(copied))
        if done.left:
            left.append(path)
            assert done.left[0].way_out.startswith("restore it from a copy")
            touched = {p for p in before if p not in files_of(copied) or (copied / p).read_bytes() != before[p]}
            assert touched <= set(done.removed) | set(done.rewritten)
            shutil.rmtree(copied)
            shutil.copytree(pristine, copied)
            continue
        repaired.append(path)
        kept = {p: before[p] for p in before if p not in done.removed and p not in done.rewritten}
        assert {p: (copied / p).read_bytes() for p in kept} == kept
        assert verify(copied).findings == () or all(not f.drop and not f.rewrite for f in verify(copied).findings)
        extract_again(pristine, copied)
        assert verify(copied).findings == ()
        assert digest(copied) == want, path
    beyond = [p for p in left if "/segments/" not in p and p != "zarr.json"]
    int8 = "int8" in str(pristine)
    allowed = ("/mean/c.0", "/std/c.0", ".json")
    assert all(int8 and p.endswith(allowed) and "zarr.json" not in p and "receipts" not in p for p in beyond)
    assert len(repaired) > 3 * len(left)
    assert not list(copied.glob(f"{CLAIMS}/*"))


@pytest.mark.parametrize("of", ["bytes", "files"])
def test_every_flipped_bit_is_found(of: str, copied: Path) -> None:
    """400 flips in all; with EMKUM_TORTURE_MINUTES as many as that time allows, and other ones each time."""
    everything = files_of(copied)
    sizes = [(copied / path).stat().st_size for path in everything]
    draw = random.Random(None if MINUTES else 7)
    end, flips, unseen = time.monotonic() + 60 * MINUTES / 4, 0, []
    while flips < 100 or (MINUTES and time.monotonic() < end):
        (path,) = draw.choices(everything, sizes if of == "bytes" else None)
        good = (copied / path).read_bytes()
        bad = bytearray(good)
        place, bit = draw.randrange(len(bad)), draw.randrange(8)
        bad[place] ^= 1 << bit
        put(copied / path, bytes(bad))
        if path not in paths(verify(copied)):
            unseen.append((path, place, bit))
        put(copied / path, good)
        flips += 1
    print(f"{flips} flips, {flips - len(unseen)} found")
    assert unseen == []


# --- which rows, which samples -----------------------------------------------------------------------------


def only(report: Report) -> Finding:
    assert len(report.findings) == 1, report.findings
    return report.findings[0]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    put(path, bytes(data))


def test_a_bad_chunk_names_its_row_and_sample(cache: Path) -> None:
    field = Cache.open(cache).field(TOKENS)
    stride = int(np.prod(field.row_shape)) * np.dtype(field.storage).itemsize + 4
    shard = f"{TOKENS}/values/c.0.1.0.0"
    flip(cache / shard, 5 * stride + 7)  # the sixth chunk: row 3 is quarantined and has none
    flip(cache / shard, 9 * stride)
    found = only(verify(cache))
    assert (found.path, found.what) == (shard, "has 2 chunks that fail the checksum")
    assert list(found.row_numbers()) == [6, 10]
    assert sample_keys(LocalStore(cache), [found]) == [[("train.tar", "train0006"), ("train.tar", "train0010")]]
    assert (found.field, found.block, found.view) == (TOKENS, 0, 1)
    with pytest.raises(errors.CorruptCache):
        field.read(np.array([6]), 1)


def test_a_bad_tile_of_text_names_its_caption(cache: Path) -> None:
    flip(cache / f"{LAYERS}/values/c.1.0.0", 3)
    found = only(verify(cache))
    assert list(found.row_numbers()) == [16]
    assert sample_keys(LocalStore(cache), [found]) == [[("train.tar", "train0016")]]


@pytest.mark.parametrize("name", [CLS, IDS])
def test_a_chunk_of_many_rows_names_them_all_but_padding_and_quarantined(name: str, cache: Path) -> None:
    path = f"{name}/values/c.1" + (".0.0" if name == CLS else ".0")
    flip(cache / path, 0)
    found = only(verify(cache))
    assert found.rows == ((16, 18),)
    flip(cache / path, 0)
    first = path.replace("c.1", "c.0")
    flip(cache / first, 0)
    assert only(verify(cache)).rows == (((0, 3), (4, 16)) if name == CLS else ((0, 16),))


def test_swapped_views_are_whole_files_in_the_wrong_place(cache: Path) -> None:
    a, b = (cache / f"{TOKENS}/values/c.1.{view}.0.0" for view in (0, 1))
    first, second = a.read_bytes(), b.read_bytes()
    put(a, second)
    put(b, first)
    report = verify(cache)
    assert [finding.what[:37] for finding in report.findings] == ["holds other bytes than were committed"] * 2


def test_a_lost_receipt_is_damage_unless_somebody_works_on_the_block(cache: Path) -> None:
    receipt = f"_emkum/receipts/{CLS}/000001-0.json"
    (cache / receipt).unlink()
    found = only(verify(cache))
    assert found.path == receipt
    assert found.rows == ((16, 18),)
    assert all(path.startswith(f"{CLS}/") for path in found.drop)
    with Claims(LocalStore(cache)) as claims:
        claim = claims.take("image-000001-0")
        assert claim is not None
        report = verify(cache)
        assert report.findings == ()
        assert report.incomplete == {CLS: 1}
        assert report.notes[0].startswith(f"{CLS} block 1-0 is unfinished: {CLS}/")
        claim.release()
    assert only(verify(cache)).path == receipt


def test_a_block_not_extracted_yet_is_no_damage(tmp_path: Path) -> None:
    make_cache(
        tmp_path / "c", pictures=20, val_pictures=0, captions=1, skipped_blocks=[("cls", 1)], fields=("cls", "ids")
    )
    report = verify(tmp_path / "c")
    assert [f.path for f in report.findings] == []
    assert report.incomplete == {CLS: 1}


def test_the_last_segment_is_missed_by_its_receipts(cache: Path) -> None:
    shutil.rmtree(cache / "_emkum/segments/1")
    found = next(f for f in verify(cache).findings if f.path == "_emkum/segments/1")
    assert "receipts belong to it, the first _emkum/receipts/" in found.what
    assert not found.repairable


def test_a_damaged_root_stops_the_check_and_nothing_is_repaired(cache: Path) -> None:
    good = (cache / "zarr.json").read_bytes()
    for bad in (good.replace(b'"rows_per_block": 16', b'"rows_per_block": 32'), b"{", b"", None):
        put(cache / "zarr.json", bad)
        done = repair(LocalStore(cache))
        assert paths(done.report) == ["zarr.json"]
        assert done.report.findings[0].what.endswith("nothing else was checked")
        assert done.removed == done.rewritten == ()
        assert len(done.left) == 1


def test_a_newer_format_is_refused_and_not_called_damage(cache: Path) -> None:
    root = json.loads((cache / "zarr.json").read_bytes())
    root["attributes"]["emkum"] = with_digest({"format": 2, "uuid": "0" * 32, "rows_per_block": 16})
    put(cache / "zarr.json", pretty_json(root))
    with pytest.raises(errors.NewerFormat, match="format 2; this emkum reads up to 1"):
        verify(cache)


def test_a_folder_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for command in (verify_module.verify, repair):
        with pytest.raises(errors.NotACache):
            command(LocalStore(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_caches_of_the_first_release_are_checked_as_far_as_their_digests_go(tmp_path: Path) -> None:
    report = verify(GOLDEN / "format-1")
    assert report.findings == ()
    assert not report.sealed
    assert report.incomplete == {"teacher/tiny/image/cls": 2}
    assert "fewer digests" in report.notes[0]
    copy = Path(shutil.copytree(GOLDEN / "format-1", tmp_path / "c"))
    unseen = []
    for path in files_of(copy):
        if "/." in path or path.endswith(".tmp"):
            continue
        good = (copy / path).read_bytes()
        put(copy / path, good[:-2])
        if path not in paths(verify(copy)):
            unseen.append(path)
        put(copy / path, good)
    # No record of such a cache lists them.
    assert unseen == ["_emkum/models/tiny/model.safetensors", "_emkum/models/tiny/tokenizer.json"]


# --- what an attacker writes: digests prove nothing ----------------------------------------------------------


def reseal(path: Path, change: Callable[[dict], object]) -> None:
    """Changes a record and gives it a digest that fits."""
    record = json.loads(path.read_bytes())
    key = "record_digest" if "record_digest" in record else "digest"
    del record[key]
    change(record)
    put(path, pretty_json(record | {key: with_digest(record)["digest"]}))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["objects"][0].update(path="../../../etc/passwd"),
        lambda r: r["objects"][0].update(path="/etc/passwd"),
        lambda r: r["objects"][0].update(path=f"{CLS}/values/c.1.1.0"),
        lambda r: r["objects"].append(r["objects"][0]),
        lambda r: r["objects"].clear(),
        lambda r: r["objects"][0].update(bytes=2**61),
        lambda r: r["objects"][0].update(bytes="516"),
        lambda r: r["objects"][0].update(sha256="A" * 64),
        lambda r: r.update(block=2**61),
        lambda r: r.update(view=1),
        lambda r: r.update(segment=7),
        lambda r: r.update(segment=1),
        lambda r: r.update(first_row=0),
        lambda r: r.update(rows=16),
        lambda r: r.update(rows=2**61),
        lambda r: r.update(rows=True),
        lambda r: r.update(fingerprint_digest="0" * 64),
        lambda r: r.update(field="../" + CLS),
        lambda r: r.update(statistics={"min": "a", "max": 1.0, "mean": 0.0}),
        lambda r: r.update(statistics=[1]),
        lambda r: r.update(quarantined=[{"row": 40, "tar": "train.tar", "key": "train0016", "reason": "x"}]),
        lambda r: r.update(quarantined=[{"row": 16, "tar": "train.tar", "key": "train0017", "reason": "x"}]),
        lambda r: r.update(quarantined=[{"row": 16, "tar": 1, "key": None, "reason": []}]),
        lambda r: r.update(quarantined=[{"row": 16}]),
        lambda r: r.clear(),
    ],
)
def test_a_forged_receipt_is_found_and_dropped(change: Callable[[dict], object], cache: Path) -> None:
    receipt = f"_emkum/receipts/{CLS}/000001-0.json"
    reseal(cache / receipt, change)
    report = verify(cache)
    if report.findings and report.findings[0].path.startswith("_emkum/segments"):
        assert "receipts belong to it" in report.findings[0].what
        return
    found = next(f for f in report.findings if CLS in f.path)
    assert found.repairable
    assert {p for p in found.drop if not p.startswith(f"{CLS}/")} == {receipt}
    assert all((cache / path).is_file() for path in found.drop)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(kind="pooled"),
        lambda r: r.update(space="text"),
        lambda r: r.update(field="../x/y"),
        lambda r: r["arrays"]["values"].update(dtype="object"),
        lambda r: r["arrays"]["values"].update(row_shape=[2**40, 2**40]),
        lambda r: r["arrays"]["values"].update(row_shape=[0]),
        lambda r: r["arrays"]["values"].update(row_shape=[[1]]),
        lambda r: r["arrays"].update(more={"dtype": "int8", "row_shape": []}),
        lambda r: r.update(statistics={"mean": {"path": "../../etc/passwd", "bytes": 1, "sha256": "0" * 64}}),
        lambda r: r.update(fingerprint=[]),
        lambda r: r.update(environment=None),
        lambda r: r.clear(),
    ],
)
def test_a_forged_field_record_is_found(change: Callable[[dict], object], cache: Path) -> None:
    path = f"_emkum/fields/{TOKENS}.json"
    reseal(cache / path, change)
    found = next(f for f in verify(cache).findings if f.path == path)
    assert found.repairable == (not list(cache.glob("**/scale")))
    assert found.drop == ((path,) if found.repairable else ())


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["image"].update(rows=2**60),
        lambda r: r["image"].update(rows=17),
        lambda r: r["text"].update(first_row=16),
        lambda r: r["sources"][0].update(samples=2**60),
        lambda r: r["sources"][0].update(samples=-1),
        lambda r: r["sources"].append(r["sources"][0]),
        lambda r: r["sources"][0].update(tar="other.tar"),
        lambda r: r.update(split="../x"),
        lambda r: r["views"].update(count=2**62),
        lambda r: r.update(parquet={}),
    ],
)
def test_a_forged_segment_is_found(change: Callable[[dict], object], cache: Path) -> None:
    def forge(record: dict) -> None:
        change(record)
        if record.get("parquet"):
            record["digest"] = segment_digest(record)

    reseal(cache / "_emkum/segments/0/segment.json", forge)
    report = verify(cache)
    if not report.findings:  # the number of views says what is missing, and nothing else
        assert report.incomplete[TOKENS] > 2**60
        return
    assert any(path.startswith("_emkum/segments/0/") for path in paths(report))
    assert not any(f.drop for f in report.findings if f.path.startswith("_emkum/segments/"))


@pytest.mark.parametrize(("value", "name"), [(np.nan, CLS), (np.inf, TOKENS), (-np.inf, LAYERS)])
def test_numbers_that_cannot_be_are_damage_though_all_digests_fit(value: float, name: str, tmp_path: Path) -> None:
    make_cache(tmp_path / "c", pictures=4, val_pictures=0, captions=1, storage="float32", cut=1)
    writer = CacheWriter(tmp_path / "c")
    field = Cache.open(tmp_path / "c").field(name)
    rows = np.arange(4)
    values, length = field.read(rows), field.lengths(rows) if field.spec.has_length else None
    values[2, 0] = value
    (tmp_path / "c" / f"_emkum/receipts/{name}/000000-0.json").unlink()
    with writer.block(field.spec, writer.segments[0], 0, 0) as out:
        out.append(Encoded(values, None, length, Summary()))
        out.commit()
    found = only(verify(tmp_path / "c"))
    assert found.what == "holds numbers that cannot be"
    assert list(found.row_numbers()) == [2]


def test_lengths_that_differ_between_ids_and_layers_are_found(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", pictures=4, val_pictures=0, captions=1, storage="float32", fields=("ids", "text_layers"))
    for name in (IDS, LAYERS):
        reseal(tmp_path / f"c/_emkum/fields/{name}.json", lambda r: _tokenizer(r, "a" * 64))
        record = json.loads((tmp_path / f"c/_emkum/fields/{name}.json").read_bytes())
        for receipt in (tmp_path / f"c/_emkum/receipts/{name}").iterdir():
            reseal(receipt, lambda r, d=record["fingerprint_digest"]: r.update(fingerprint_digest=d))
        group = tmp_path / f"c/{name}/zarr.json"
        put(group, _GROUP.sub(record["fingerprint_digest"].encode(), group.read_bytes()))
    assert verify(tmp_path / "c").findings == ()
    field = Cache.open(tmp_path / "c").field(IDS)
    ids, length = field.read(np.arange(4)), field.lengths(np.arange(4)).copy()
    length[1] -= 1
    writer = CacheWriter(tmp_path / "c")
    (tmp_path / f"c/_emkum/receipts/{IDS}/000000-0.json").unlink()
    with writer.block(field.spec, writer.segments[0], 0, 0) as out:
        out.append(Encoded(ids, None, length, Summary()))
        out.commit()
    found = only(verify(tmp_path / "c"))
    assert "state different lengths of the same captions" in found.what


_GROUP = re.compile(rb"[0-9a-f]{64}")


def _tokenizer(record: dict, sha256: str) -> None:
    record["fingerprint"]["tokenizer"] = sha256
    record["fingerprint_digest"] = hashlib.sha256(canonical_json(record["fingerprint"])).hexdigest()


def _parquet_segment(cache: Path, name: str, table: pa.Table | bytes, rows: int | None = None) -> None:
    """Replaces a table of segment 0 and makes every digest fit."""
    data = table
    if not isinstance(table, bytes):
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True, max_rows_per_page=1 << 30)
        data = sink.getvalue()
    put(cache / f"_emkum/segments/0/{name}", data)

    def change(record: dict) -> None:
        record["parquet"][name] = hashlib.sha256(data).hexdigest()
        if rows is not None:
            record["sources"][0]["samples"] = record["image"]["rows"] = rows
        record["digest"] = segment_digest(record)

    reseal(cache / "_emkum/segments/0/segment.json", change)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("samples.parquet", {"image_row": 5}, "not numbered one after the other"),
        ("samples.parquet", {"key": "train0000"}, "comes twice"),
        ("samples.parquet", {"tar": "val.tar"}, "not the next of train.tar"),
        ("samples.parquet", {"offset": None}, "half a picture"),
        ("captions.parquet", {"text_row": 0}, "is numbered 0"),
        ("captions.parquet", {"image_row": 0}, "belongs to picture 0"),
        ("captions.parquet", {"key": "train9999"}, "which is not there"),
    ],
)
def test_tables_that_do_not_fit_their_segment_are_found(name: str, change: dict, why: str, cache: Path) -> None:
    lines = pq.read_table(cache / f"_emkum/segments/0/{name}").to_pylist()
    lines[7] |= change
    schema = pq.read_schema(cache / f"_emkum/segments/0/{name}")
    _parquet_segment(cache, name, pa.Table.from_pylist(lines, schema))
    found = next(f for f in verify(cache).findings if f.path == f"_emkum/segments/0/{name}")
    assert why in found.what


def test_a_parquet_of_few_bytes_that_claims_many_rows_is_refused_before_it_is_read(cache: Path) -> None:
    rows = 1_500_000
    columns = {f.name: pa.repeat(pa.scalar("k" if f.type == pa.string() else 7, f.type), rows) for f in SAMPLES}
    _parquet_segment(cache, "samples.parquet", pa.table(columns, schema=SAMPLES), rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = verify(cache)
    found = next(f for f in report.findings if f.path == "_emkum/segments/0/samples.parquet")
    assert "it claims 1500000 lines in" in found.what
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_garbage_instead_of_parquet_is_found(cache: Path) -> None:
    for data in (b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", b"\0" * 1000):
        _parquet_segment(cache, "captions.parquet", data)
        assert "_emkum/segments/0/captions.parquet" in paths(verify(cache))


# --- what a check costs, and what stops it -----------------------------------------------------------------


class CountingStore(LocalStore):
    """Notes what is read whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[str] = []

    def read(self, path: str) -> bytes:
        self.reads.append(path)
        return super().read(path)


@pytest.mark.parametrize("remote", [False, True])
def test_every_receipt_is_read_once_and_every_table_for_its_names_once(cache: Path, remote: bool) -> None:
    for path in (cache / "_emkum/receipts/image").rglob("000002-*.json"):
        left_out = {"row": 32, "tar": "val.tar", "key": "val0000", "reason": "forged"}
        reseal(path, lambda record, left_out=left_out: record["quarantined"].append(left_out))
    for path in (cache / f"_emkum/receipts/{CLS}").glob("000002-*.json"):
        left_out = {"row": 32, "tar": "val.tar", "key": "val0001", "reason": "forged"}
        reseal(path, lambda record, left_out=left_out: record["quarantined"].append(left_out))
    store = CountingStore(cache)
    store.local = None if remote else store.local
    found = {f.path: f.what for f in verify_module.verify(store, threads=1).findings}
    assert found[f"_emkum/receipts/{CLS}/000002-0.json"].endswith(
        "it calls row 32 val.tar/val0001; that row is val.tar/val0000"
    )
    assert not any(path.startswith("_emkum/receipts/image") for path in found)
    receipts = [path for path in store.reads if path.startswith("_emkum/receipts/")]
    assert len(receipts) == len(set(receipts)) > 10
    tables = [path for path in store.reads if path.endswith(".parquet")]
    # Once to be checked; those of pictures again, for the names of what two fields leave out of both segments.
    again = {path for path in tables if tables.count(path) == 2}
    assert again == {"_emkum/segments/0/samples.parquet", "_emkum/segments/1/samples.parquet"}
    assert len(tables) == 6


def test_the_tables_are_read_once_for_all_findings(cache: Path) -> None:
    for name, objects in ((CLS, ("c.0.0.0", "c.0.1.0", "c.1.0.0")), (IDS, ("c.0.0", "c.1.0"))):
        for place in objects:
            flip(cache / f"{name}/values/{place}", 0)
    report = verify(cache)
    assert len(report.findings) == 5
    store = CountingStore(cache)
    for tell in (report_json, report_table):
        assert "train0017" in str(tell(store, report))
        assert sum(path.endswith(".parquet") for path in store.reads) == 2
        store.reads.clear()


def test_folders_that_are_links_are_noted_and_not_followed(cache: Path) -> None:
    for number in range(4):
        (cache / f"image/loop{number}").symlink_to(cache)
    report = verify(cache)
    assert report.findings == ()
    assert "image/loop3 is a link to a folder: what no record names was not looked for in it" in report.notes
    moved = cache.parent / "moved"
    (cache / "_emkum/receipts").rename(moved)
    (cache / "_emkum/receipts").symlink_to(moved)
    found = next(finding for finding in verify(cache).findings if finding.path == "_emkum/receipts")
    assert "is a link to a folder: the records in it were not checked" in found.what
    assert not found.repairable


class BadSectors(LocalStore):
    """A disk that cannot read some files, or nothing at all."""

    bad: tuple[str, ...] = ()
    number = errno.EIO

    def _refuse(self, path: str) -> None:
        if path in self.bad or "*" in self.bad:
            raise errors.StorageFailure(f"{path} cannot be read") from OSError(self.number, os.strerror(self.number))

    def read(self, path: str) -> bytes:
        self._refuse(path)
        return super().read(path)

    def open(self, path: str) -> RangeReader:
        reader = super().open(path)

        class Reader(ForwardingReader):
            def read_into(_, buffers: Sequence[memoryview], offset: int) -> int:  # noqa: N805
                self._refuse(path)
                return reader.read_into(buffers, offset)

        return Reader(reader)


def test_a_sector_that_cannot_be_read_is_damage_of_its_file_alone(pristine: Path) -> None:
    store = BadSectors(pristine)
    files = [path for path in files_of(pristine) if path != "zarr.json"]
    for path in files:
        store.bad = (path,)
        report = verify_module.verify(store, threads=1)
        found = next((finding for finding in report.findings if finding.path == path), None)
        if not (found and found.what.startswith("cannot be read: Input/output error")):
            assert path.endswith(("model.safetensors", "tokenizer.json")), (path, report.findings)
            assert found or report.notes
    store.bad = (f"{CLS}/values/c.1.0.0",)
    found = only(verify_module.verify(store, threads=2))
    assert (found.rows, found.repairable) == (((16, 18),), True)


def test_a_root_a_disk_or_a_permission_that_fails_ends_the_check(cache: Path) -> None:
    store = BadSectors(cache)
    for bad in ("zarr.json", "*"):
        store.bad = (bad,)
        with pytest.raises(errors.StorageFailure):
            verify_module.verify(store, threads=1)

    class DyingDisk(BadSectors):
        def open(self, path: str) -> RangeReader:
            if path.endswith("c.1.0.0"):
                self.bad = ("*",)
            return super().open(path)

    with pytest.raises(errors.StorageFailure, match=r"zarr\.json cannot be read"):
        verify_module.verify(DyingDisk(cache), threads=1)
    store.bad, store.number = (f"{CLS}/values/c.1.0.0",), errno.EACCES
    with pytest.raises(errors.StorageFailure):
        verify_module.verify(store, threads=1)


def test_a_pipe_in_the_place_of_an_object_is_damage(cache: Path) -> None:
    (cache / f"{CLS}/values/c.1.0.0").unlink()
    os.mkfifo(cache / f"{CLS}/values/c.1.0.0")
    assert only(verify(cache)).what == "cannot be read: it is not a file"


# --- repair ------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_go_and_changes_nothing(cache: Path) -> None:
    flip(cache / f"{CLS}/values/c.1.0.0", 0)
    before = {path: (cache / path).read_bytes() for path in files_of(cache)}
    said: list[str] = []
    done = repair(LocalStore(cache), dry_run=True, say=said.append)
    assert said[0] == f"would be removed: _emkum/receipts/{CLS}/000001-0.json"
    assert len(said) == len(done.removed) >= 2
    assert {path: (cache / path).read_bytes() for path in files_of(cache)} == before
    assert not (cache / CLAIMS).exists()


def test_repair_never_runs_beside_a_writer(cache: Path) -> None:
    with Claims(LocalStore(cache)) as claims, claims.planning(join=False), pytest.raises(errors.AnotherWriter):
        repair(LocalStore(cache))


def test_repair_that_stops_halfway_goes_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(cache / f"{IDS}/values/c.1.0", 0)
    removed: list[str] = []

    def stop(self: LocalStore, path: str) -> None:
        if path.startswith(("text/", "_emkum/receipts")):
            if removed:
                raise errors.StorageFailure("the disk went away")
            removed.append(path)
        original(self, path)

    original = LocalStore.remove
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "remove", stop)
        with pytest.raises(errors.StorageFailure):
            repair(LocalStore(cache))
    assert removed == [f"_emkum/receipts/{IDS}/000001-0.json"]
    assert only(verify(cache)).path == removed[0]
    assert repair(LocalStore(cache)).left == ()
    assert verify(cache).findings == ()


# --- the door ----------------------------------------------------------------------------------------------


def test_the_command_line_says_what_is_damaged_and_how_to_go_on(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cache", "verify", str(cache)]) == 0
    assert capsys.readouterr().out.endswith("no damage\n")
    flip(cache / f"{CLS}/values/c.1.0.0", 0)
    assert run(["cache", "verify", str(cache)]) == 4
    said = capsys.readouterr()
    assert f"DAMAGED {CLS}/values/c.1.0.0: fails its checksum\n" in said.out
    assert "image rows 16 to 17: train.tar/train0016, train.tar/train0017\n" in said.out
    assert said.err == f"emkum: CorruptCache: {cache}: 1 thing is damaged | next: emkum cache repair {cache}\n"
    assert run(["cache", "verify", str(cache), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)["findings"]
    assert found[0]["rows"] == [16, 17]
    assert found[0]["samples"] == [["train.tar", "train0016"], ["train.tar", "train0017"]]
    assert run(["cache", "digest", str(cache)]) == 4
    assert "emkum cache verify" in capsys.readouterr().err
    assert run(["cache", "repair", str(cache)]) == 0
    said = capsys.readouterr()
    assert f"removed: _emkum/receipts/{CLS}/000001-0.json\n" in said.err
    assert f"to be redone: {CLS}, 1 block\n" in said.out
    assert "next: the same `emkum extract` command of split train again" in said.out
    assert run(["cache", "verify", str(cache)]) == 0
    assert f"incomplete: {CLS} lacks 1 blocks" in capsys.readouterr().out
    (cache / "_emkum/segments/1/captions.parquet").unlink()
    assert run(["cache", "repair", str(cache), "--json"]) == 4
    said = capsys.readouterr()
    assert json.loads(said.out)["left"] == ["_emkum/segments/1/captions.parquet"]
    assert "1 thing is damaged beyond repair | restore it from a copy of the cache" in said.err


def test_many_rows_are_capped_on_a_screen_and_whole_in_json(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(cache / f"{IDS}/values/c.0.0", 0)
    run(["cache", "verify", str(cache)])
    assert "train0007 and 8 more: --json lists all" in capsys.readouterr().out
    run(["cache", "verify", str(cache), "--json"])
    assert len(json.loads(capsys.readouterr().out)["findings"][0]["samples"]) == 16


def test_names_from_the_data_cannot_move_the_cursor(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "thesis\x1b[2J.txt").write_text("precious")
    run(["cache", "verify", str(cache)])
    out = capsys.readouterr().out
    assert "thesis\\x1b[2J.txt" in out
    assert "\x1b" not in out


def test_reasons_from_the_data_cannot_move_the_cursor_in_info(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (cache / "_emkum/receipts").rglob("000000-*.json"):
        reseal(path, lambda record: [q.update(reason="broken\x1b[2J\nno damage") for q in record["quarantined"]])
    assert run(["cache", "info", str(cache)]) == 0
    out = capsys.readouterr().out
    assert "broken\\x1b[2J\\nno damage\n" in out
    assert "\x1b" not in out


def test_quarantined_samples_are_listed_and_exported(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cache", "quarantine", str(cache)]) == 0
    out = capsys.readouterr().out
    assert f"train image row 3: train.tar/train0003, byte 3,584, 100 bytes: broken ({TOKENS}, {CLS})\n" in out
    assert out.endswith("1 x broken\n1 quarantined\n")
    assert run(["cache", "quarantine", str(cache), "--json"]) == 0
    want = {
        "split": "train", "tar": "train.tar", "key": "train0003", "space": "image", "row": 3, "reason": "broken",
        "fields": [TOKENS, CLS], "offset": 3584, "size": 100,
    }  # fmt: skip
    assert json.loads(capsys.readouterr().out) == {"quarantined": [want], "reasons": {"broken": 1}}
    for ending in ("csv", "json", "parquet"):
        assert run(["cache", "quarantine", str(cache), "--out", str(tmp_path / f"q.{ending}")]) == 0
    assert json.loads((tmp_path / "q.json").read_text())["quarantined"] == [want]
    assert pq.read_table(tmp_path / "q.parquet").to_pylist() == [want]
    (line,) = csv.DictReader((tmp_path / "q.csv").read_text().splitlines())
    assert line == {key: " ".join(v) if isinstance(v, list) else str(v) for key, v in want.items()}
    assert run(["cache", "quarantine", str(cache), "--out", str(tmp_path / "q.xlsx")]) == 2
