"""The cache's reader and writer against the golden cache, which another program wrote from docs/format.md alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from golden import make_golden as golden
from golden import reader as plain

from emkum import errors
from emkum.shards.codec import Encoded, Summary, decode_int8, encode, encode_int8
from emkum.shards.fingerprint import Fingerprint, differences
from emkum.shards.layout import FieldSpec, array_metadata, object_path
from emkum.shards.reader import Cache
from emkum.shards.tars import PictureMember, SourceSample, SourceTar
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter
from tests.tiny_cache import make_cache

GOLDEN = Path(__file__).parent / "golden" / "format-1"
FIELDS = sorted(golden.FIELDS)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "cache")
    return tmp_path / "cache"


# --- reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_golden_cache_reads_as_its_writer_meant(name: str) -> None:
    field = Cache.open(GOLDEN).field(name)
    expected = golden.FIELDS[name]
    for split in ("train", "val"):
        for view in range(expected.num_views):
            rows = field.rows(split, view)
            assert rows.tolist() == list(golden.valid_rows(name, split, view))
            if len(rows):
                values = field.values(rows, view)
                np.testing.assert_array_equal(values, [golden.expected_values(name, int(r), view) for r in rows])
        if field.kind != "boxes":
            assert field.missing(split) == list(golden.missing(name, split))


def test_samples_captions_and_splits_of_the_golden_cache() -> None:
    cache = Cache.open(GOLDEN)
    assert cache.splits == ["train", "val"]
    for segment in golden.SEGMENTS:
        assert cache.samples(segment.split).to_pylist() == golden.samples(segment)
        assert cache.captions(segment.split).to_pylist() == golden.captions(segment)
    assert cache.models == ["tiny"]


def test_rows_in_any_order_repeated_and_from_many_threads() -> None:
    field = Cache.open(GOLDEN).field("image/tiny@2/tokens")
    rows = field.rows("train")
    draw = np.random.default_rng(0)
    wrong: list[str] = []

    def work(seed: int) -> None:
        chosen = np.random.default_rng(seed).choice(rows, 64)
        want = np.stack([golden.expected_values(field.name, int(r), 1) for r in chosen])
        if not np.array_equal(field.values(chosen, 1), want):
            wrong.append(f"seed {seed}")

    threads = [threading.Thread(target=work, args=(int(draw.integers(1e9)),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_rows_of_different_views_in_one_read() -> None:
    field = Cache.open(GOLDEN).field("image/tiny@2/tokens")
    rows, views = field.rows("train")[:6], np.array([0, 1, 0, 1, 1, 0])
    want = [golden.expected_values(field.name, int(r), int(v)) for r, v in zip(rows, views, strict=True)]
    np.testing.assert_array_equal(field.values(rows, views), want)


def test_a_row_that_is_not_committed_is_refused_by_name() -> None:
    field = Cache.open(GOLDEN).field("teacher/tiny/image/cls")
    block, view = field.missing("train")[0]
    with pytest.raises(
        errors.IncompleteCache, match=rf"row {block * 16} view {view} \(block {block}\) is not committed"
    ):
        field.read(np.array([block * 16]), view)


@pytest.mark.parametrize("name", ["image/tiny@2/tokens", "views/crop-0.9-1.0-seed-0/boxes"])
def test_a_quarantined_row_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(errors.IncompleteCache, match=r"row 7 .* is quarantined: truncated JPEG"):
        Cache.open(GOLDEN).field(name).read(np.array([7]))


def test_a_field_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(errors.MissingField, match=r"no field teacher/x.*it has: image/tiny@2/tokens"):
        Cache.open(GOLDEN).field("teacher/x")


def test_a_folder_that_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(errors.NotACache, match=r"no zarr\.json"):
        Cache.open(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(errors.NotACache, match="not an emkum cache"):
        Cache.open(tmp_path)


def test_a_newer_format_is_refused_with_what_to_install(copy: Path) -> None:
    root = json.loads((copy / "zarr.json").read_text())
    root["attributes"]["emkum"]["format"] = 2
    (copy / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(errors.NewerFormat, match="has cache format 2; this emkum reads up to 1") as caught:
        Cache.open(copy)
    assert caught.value.exit_code == 2
    assert "pip install" in caught.value.way_out


def _first_receipt(copy: Path, field: str) -> tuple[Path, dict]:
    path = sorted((copy / "_emkum/receipts" / field).glob("[0-9]*.json"))[0]
    return path, json.loads(path.read_text())


@pytest.mark.parametrize("name", [n for n in FIELDS if n != "teacher/tiny/image/cls"])
@pytest.mark.parametrize("damage", ["deleted", "emptied", "one byte short", "one byte long", "a bit flipped"])
def test_a_damaged_object_is_an_error_never_zeros(copy: Path, name: str, damage: str) -> None:
    _, receipt = _first_receipt(copy, name)
    for committed in receipt["objects"]:
        path = copy / committed["path"]
        data = path.read_bytes()
        changed = {
            "deleted": None,
            "emptied": b"",
            "one byte short": data[:-1],
            "one byte long": data + b"\0",
            "a bit flipped": bytes([data[0] ^ 1]) + data[1:],
        }[damage]
        if changed is None:
            path.unlink()
        else:
            path.write_bytes(changed)
        field = Cache.open(copy).field(name)
        rows = field.rows("train") if len(field.rows("train")) else field.rows("val")
        with pytest.raises(errors.CorruptCache, match=r"object|chunk|index"):
            _read_everything(field, rows)
        path.write_bytes(data)
        _read_everything(Cache.open(copy).field(name), rows)


def _read_everything(field, rows: np.ndarray) -> None:
    field.values(rows)
    if field.spec.has_length:
        field.lengths(rows)


def test_an_altered_receipt_segment_or_field_record_is_noticed(copy: Path) -> None:
    for pattern in ("_emkum/receipts/**/*.json", "_emkum/segments/*/segment.json", "_emkum/fields/**/*.json"):
        for path in copy.glob(pattern):
            good = path.read_text()
            path.write_text(
                good.replace("train", "trainx")
                .replace('"float', '"xfloat')
                .replace('16"', '17"')
                .replace('"rows": ', '"rows": 1')
            )
            if path.read_text() != good:
                with pytest.raises(errors.CorruptCache):
                    _open_everything(copy)
            path.write_text(good)


def _open_everything(path: Path) -> None:
    cache = Cache.open(path)
    for split in cache.splits:
        cache.samples(split)


def test_an_altered_parquet_is_noticed(copy: Path) -> None:
    path = copy / "_emkum/segments/0/captions.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(errors.CorruptCache, match=r"captions.parquet .*sha256"):
        Cache.open(copy).captions("train")


def test_a_snapshot_does_not_see_later_receipts(copy: Path) -> None:
    path, receipt = _first_receipt(copy, "image/tiny@2/tokens")
    hidden = path.read_bytes()
    path.unlink()
    before = Cache.open(copy).field(receipt["field"])
    path.write_bytes(hidden)
    assert (receipt["block"], receipt["view"]) in before.missing("train")
    assert (receipt["block"], receipt["view"]) not in Cache.open(copy).field(receipt["field"]).missing("train")


def test_a_forked_child_reads_what_its_parent_has_open() -> None:
    field = Cache.open(GOLDEN).field("image/tiny@2/tokens")
    rows = field.rows("train")
    want = field.values(rows)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(field.values(rows), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- writing -------------------------------------------------------------------------------------------


def _tar(name: str, pictures: int, captions: int, sha256: str = "0" * 64) -> SourceTar:
    samples = tuple(
        SourceSample(f"k{i}", PictureMember(512 + 4096 * i, 100, "jpg"), ("a caption",) * captions, "json", None, None)
        for i in range(pictures)
    )
    return SourceTar(f"{name}", name, 10240, sha256, samples, {}, 0)


POLICY = ViewPolicy(crop=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, jitter=0.0, seed=0, count=1)


def _write(path: Path, field: FieldSpec, values: np.ndarray, statistics=None, length=None, bad: tuple[int, ...] = ()):
    """A one-segment cache of S = 16 with one field; `values` float32 or the stored integers, rows in order."""
    writer = CacheWriter(path, rows_per_block=16)
    if not writer.segments:
        writer.append_segment("train", POLICY, [_tar("a.tar", pictures=len(values), captions=1)])
    segment = writer.segments[0]
    writer.declare_field(field, Fingerprint(field.kind, field.storage, field.row_shape), {}, statistics)
    writer.grow_field(field, 1)
    for block in segment.span(field.space).blocks(16):
        first, rows = segment.span(field.space).block_rows(block, 16)
        with writer.block(field, segment, block, 0) as out:
            for row in range(first, first + rows):
                if row in bad:
                    out.quarantine("a.tar", f"k{row}", "broken")
                    continue
                cut = slice(row, row + 1)
                lengths = None if length is None else length[cut]
                if field.storage in ("uint8", "int32"):
                    out.append(Encoded(values[cut], None, lengths, Summary()))
                else:
                    encoded = encode(values[cut], field.storage, *(statistics or ()), length=lengths)
                    classes = CLASSES[None] + row if field.kind == "top_logits" else None
                    out.append(dataclasses.replace(encoded, classes=classes))
            out.commit()
    return writer


CLASSES = np.arange(8, dtype=np.int32)[::-1]  # of row 0
KINDS = {
    "tokens": FieldSpec("image/e@0/tokens", "tokens", "float16", (5, 8)),
    "tokens-int8": FieldSpec("teacher/t/image/patches", "tokens", "int8", (4, 8)),
    "pooled": FieldSpec("teacher/t/image/cls", "pooled", "float32", (8,)),
    "top-logits": FieldSpec("teacher/t/image/logits-top", "top_logits", "float16", (9,)),
    "pooled-int8": FieldSpec("teacher/t/image/logits", "pooled", "int8", (8,)),
    "ragged": FieldSpec("teacher/t/text/layers", "ragged", "float16", (32, 8)),
    "ragged-int8": FieldSpec("teacher/t/text/patches", "ragged", "int8", (32, 8)),
    "text-pooled": FieldSpec("teacher/t/text/cls", "text_pooled", "float16", (8,)),
    "crops": FieldSpec("image/crops-6", "crops", "uint8", (6, 6, 3)),
    "ids": FieldSpec("text/t/ids", "ids", "int32", (32,)),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_written_is_read_back_and_agrees_with_plain_zarr_and_the_plain_reader(
    kind: str, tmp_path: Path
) -> None:
    import zarr

    field = KINDS[kind]
    draw = np.random.default_rng(3)
    values = draw.normal(0, 2, (21, *field.row_shape)).astype(np.float32)
    values[2] = 0  # an all-zero row is a row
    if field.storage in ("uint8", "int32"):
        values = draw.integers(0, 250, (21, *field.row_shape)).astype(field.storage)
    length = draw.integers(1, 33, 21).astype(np.int32) if field.has_length else None
    statistics = (np.full(8, 0.5, np.float32), np.full(8, 2.0, np.float32)) if field.storage == "int8" else None
    bad = (4, 17) if field.space == "image" else ()
    _write(tmp_path / "c", field, values, statistics, length, bad)

    ours = Cache.open(tmp_path / "c").field(field.name)
    rows = ours.rows("train")
    assert rows.tolist() == [r for r in range(21) if r not in bad]
    got = ours.values(rows)
    want = values[rows].astype(np.float32)
    if length is not None:
        np.testing.assert_array_equal(ours.lengths(rows), length[rows])
        if field.has_length:
            want[np.arange(32) >= length[rows][:, None]] = 0
    tolerance = {"float16": 5e-3, "int8": 0.1}.get(field.storage, 0)
    np.testing.assert_allclose(got, want, atol=tolerance)

    independent = plain.open_cache(tmp_path / "c")
    for row in rows[:5]:
        theirs = np.asarray(plain.read_values(independent, field.name, int(row), 0), dtype=np.float32)
        mine = ours.values(np.array([row]))[0]
        assert np.array_equal(np.nan_to_num(theirs), mine)
    group = zarr.open_group(tmp_path / "c", mode="r")
    array = group[f"{field.name}/values"]
    if field.kind == "top_logits":
        np.testing.assert_array_equal(ours.classes(rows), CLASSES + rows[:, None])
        np.testing.assert_array_equal(group[f"{field.name}/classes"][0:21][rows, 0], CLASSES + rows[:, None])
    whole = array[0:21]
    stored = ours.read(rows)
    picked = (whole[:, 0] if field.has_views else whole)[rows]
    if length is not None and field.kind == "ragged":
        picked = np.where((np.arange(32) < length[rows][:, None])[..., None], picked, 0)
    np.testing.assert_array_equal(picked, stored)


def test_a_shard_is_a_plain_array_that_memmap_reads(tmp_path: Path) -> None:
    field = KINDS["tokens"]
    values = np.random.default_rng(0).normal(size=(16, *field.row_shape)).astype(np.float32)
    _write(tmp_path / "c", field, values)
    path = tmp_path / "c" / object_path(field, field.array("values"), 0, 0)
    rows = np.memmap(path, dtype=[("row", "<f2", field.row_shape), ("crc32c", "<u4")], mode="r", shape=16)
    np.testing.assert_array_equal(rows["row"], Cache.open(tmp_path / "c").field(field.name).read(np.arange(16)))


@pytest.mark.parametrize("name", FIELDS)
def test_our_metadata_is_the_golden_one(name: str) -> None:
    field = golden.FIELDS[name]
    spec = FieldSpec(name, field.kind, field.storage, tuple(field.row_shape))
    for array in spec.arrays:
        theirs = json.loads((GOLDEN / name / array.name / "zarr.json").read_text())
        ours = array_metadata(spec, array, field.num_blocks, field.num_views, 16)
        assert ours | {"attributes": {}} == theirs
        assert list(ours["attributes"]["emkum"]) == ["digest"]


@pytest.mark.parametrize("name", [n for n in FIELDS if golden.FIELDS[n].kind in ("tokens", "pooled", "ragged")])
def test_our_writer_makes_the_golden_objects_byte_for_byte(name: str, tmp_path: Path) -> None:
    theirs = golden.FIELDS[name]
    spec = FieldSpec(name, theirs.kind, theirs.storage, tuple(theirs.row_shape))
    block, view = golden.committed(name)[0]
    rows = [r for r in golden.valid_rows(name, "train", view) if r // 16 == block]
    values = np.zeros((16, *spec.row_shape), np.float32)
    values[rows] = [golden.expected_values(name, r, view) for r in rows]
    length = None
    if spec.has_length:
        length = np.array([golden.length_of(r) for r in range(16)], np.int32)
    statistics = (golden.channel_mean(), golden.channel_std()) if spec.storage == "int8" else None
    _write(tmp_path / "c", spec, values, statistics, length, tuple(set(range(16)) - set(rows)))
    for array in spec.arrays:
        if array.per_row:
            ours = (tmp_path / "c" / object_path(spec, array, 0, 0)).read_bytes()
            assert ours == golden.object_bytes(name, array.name, block, view), array.name


def test_a_block_without_commit_leaves_no_trace(tmp_path: Path) -> None:
    writer = _write(tmp_path / "c", KINDS["pooled"], np.ones((4, 8), np.float32))
    field = KINDS["tokens"]
    writer.declare_field(field, Fingerprint(field.kind, field.storage, field.row_shape), {})
    before = {p for p in (tmp_path / "c").rglob("*") if p.is_file()}
    with writer.block(field, writer.segments[0], 0, 0) as out:
        out.append(encode(np.ones((2, 5, 8), np.float32), "float16"))
    assert {p for p in (tmp_path / "c").rglob("*") if p.is_file()} == before
    assert len(Cache.open(tmp_path / "c").field(field.name).rows("train")) == 0


def test_new_tars_make_a_new_segment_on_the_grid_and_leave_old_bytes_alone(tmp_path: Path) -> None:
    writer = _write(tmp_path / "c", KINDS["tokens"], np.ones((5, 5, 8), np.float32))
    objects = {p: p.read_bytes() for p in (tmp_path / "c").rglob("c.*")}
    segment = writer.append_segment("val", POLICY, [_tar("b.tar", 3, 2)])
    assert (segment.image.first_row, segment.image.rows) == (16, 3)
    assert (segment.text.first_row, segment.text.rows) == (16, 6)
    writer.grow_field(KINDS["tokens"], 2)
    assert {p: p.read_bytes() for p in (tmp_path / "c").rglob("c.*")} == objects
    cache = Cache.open(tmp_path / "c")
    assert cache.field(KINDS["tokens"].name).missing("val") == [(1, 0)]
    assert cache.field(KINDS["tokens"].name).rows("train").tolist() == [0, 1, 2, 3, 4]


def test_another_fingerprint_is_refused_in_words_and_nothing_changes(tmp_path: Path) -> None:
    writer = _write(tmp_path / "c", KINDS["pooled"], np.ones((4, 8), np.float32))
    before = {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()}
    other = Fingerprint("pooled", "float32", (8,), weights="a" * 64, size=112)
    with pytest.raises(errors.FingerprintMismatch) as caught:
        writer.declare_field(KINDS["pooled"], other, {})
    assert "weights with sha256 None in the cache, aaaaaaaaaaaa... asked for" in caught.value.what
    assert "crop size None in the cache, 112 asked for" in caught.value.what
    assert caught.value.exit_code == 5
    assert "--cache" in caught.value.way_out
    assert {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()} == before


def test_every_entry_of_the_fingerprint_is_told_apart() -> None:
    base = Fingerprint("tokens", "float16", (5, 8))
    for entry in dataclasses.fields(Fingerprint):
        changed = dataclasses.replace(base, **{entry.name: "other" if entry.name != "row_shape" else (5, 9)})
        assert changed.digest != base.digest, entry.name
        assert len(differences(base.to_json(), changed.to_json())) == 1, entry.name


def test_a_tar_that_changed_under_its_name_is_refused(tmp_path: Path) -> None:
    from emkum.shards.segments import new_sources

    writer = _write(tmp_path / "c", KINDS["pooled"], np.ones((4, 8), np.float32))
    with pytest.raises(errors.SourceChanged, match=r"a\.tar is not the a\.tar that segment 0"):
        new_sources(writer.segments, "train", [_tar("a.tar", 4, 1, "1" * 64)])
    with pytest.raises(errors.IdentityMismatch, match="as split 'train'; this run asks for split 'val'"):
        new_sources(writer.segments, "val", [_tar("a.tar", 4, 1)])
    assert new_sources(writer.segments, "train", [_tar("a.tar", 4, 1)]) == []


def test_another_crop_on_the_same_split_is_refused(tmp_path: Path) -> None:
    writer = _write(tmp_path / "c", KINDS["pooled"], np.ones((4, 8), np.float32))
    wide = ViewPolicy(crop=(0.08, 1.0), ratio=(0.75, 4 / 3), flip=False, jitter=0.0, seed=0, count=1)
    with pytest.raises(errors.IdentityMismatch, match=r"views center-1\.0; this run asks for crop-0\.08-1\.0-seed-0"):
        writer.append_segment("train", wide, [_tar("b.tar", 4, 1)])


def test_a_folder_with_other_things_in_it_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(errors.NotACache, match="not empty"):
        CacheWriter(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_says_so_with_exit_7(tmp_path: Path) -> None:
    import resource
    import signal

    writer = _write(tmp_path / "c", KINDS["pooled"], np.ones((4, 8), np.float32))
    field = FieldSpec("image/e@0/tokens", "tokens", "float16", (64, 64))
    writer.declare_field(field, Fingerprint(field.kind, field.storage, field.row_shape), {})
    old_limits, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old_limits[1]))
        with pytest.raises(errors.StorageFailure, match="no room to write") as caught:
            _write_one_block(writer, field)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert caught.value.exit_code == 7
    assert not list((tmp_path / "c").rglob("*.tmp"))


def _write_one_block(writer: CacheWriter, field: FieldSpec) -> None:
    with writer.block(field, writer.segments[0], 0, 0) as out:
        out.append(encode(np.ones((4, *field.row_shape), np.float32), "float16"))
        out.commit()


# --- codec ---------------------------------------------------------------------------------------------


def test_int8_keeps_its_stated_error_and_its_zeros() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(0, 1, (6, 4, 64)).astype(np.float32) * np.exp(draw.normal(0, 1.5, 64)).astype(np.float32)
    values[0, 0] = 0
    mean, std = values.mean((0, 1)), values.std((0, 1))
    stored, scale = encode_int8(values, mean, std)
    decoded = decode_int8(stored, scale, mean, std)
    assert (np.abs(decoded - values) <= 0.5001 * scale[..., None] * std + 1e-6).all()
    encoded = encode(values, "int8", mean, std)
    error = np.linalg.norm(decoded - values) / np.linalg.norm(values)
    assert encoded.summary.relative_l2 == pytest.approx(error, rel=1e-5)
    assert error < 0.01


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 70000.0])
def test_what_a_storage_type_cannot_hold_is_refused(bad: float) -> None:
    values = np.ones((2, 3), np.float32)
    values[1, 1] = bad
    with pytest.raises(ValueError, match=r"finite|65504"):
        encode(values, "float16")


def test_a_shard_that_was_swapped_with_its_sibling_is_refused_at_first_touch(tmp_path: Path) -> None:
    """Same length, every checksum right, rows of another block."""
    cache = make_cache(tmp_path / "cache").path
    for name in ("image/tinyvit@2/tokens", "teacher/tinybert/text/layers", "teacher/tinyvit/image/cls"):
        folder = cache / name / "values"
        one, two = sorted(p for p in folder.iterdir() if p.name.startswith("c."))[:2]
        two.rename(folder / "aside")
        one.rename(two)
        (folder / "aside").rename(one)
        field = Cache.open(cache).field(name)
        with pytest.raises(errors.CorruptCache, match=r"of another block|has \d+ bytes|bytes that its record"):
            field.read(field.rows("train")[:1])
