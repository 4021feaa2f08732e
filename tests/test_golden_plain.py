"""The golden cache of format 1, read without emkum: by zarr, tensorstore, dask and a plain reader."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import zarr
from golden import make_golden as golden
from golden import reader
from zarr.errors import ZarrUserWarning

GOLDEN = Path(__file__).parent / "golden" / "format-1"
ARRAYS = [
    (field, array)
    for field in golden.FIELDS
    for array in [*golden.arrays(field), *(["mean", "std"] if golden.FIELDS[field].storage == "int8" else [])]
]


def walk(group: zarr.Group) -> Iterator[tuple[str, zarr.Group | zarr.Array]]:
    for name, node in group.members():
        yield name, node
        if isinstance(node, zarr.Group):
            yield from ((f"{name}/{below}", deeper) for below, deeper in walk(node))


# --- zarr-python ----------------------------------------------------------------------------------------------------


def test_zarr_walks_down_from_the_root_to_every_array():
    root = zarr.open_group(GOLDEN, mode="r")
    assert root.attrs["emkum"] == {"format": 1, "uuid": golden.UUID, "rows_per_block": 16}
    # `_emkum` is a folder in a Zarr group that is not a Zarr node; zarr says so when it lists the root, and only there.
    with pytest.warns(ZarrUserWarning, match="Object at _emkum is not recognized") as caught:
        top = dict(root.members())
    assert len(caught) == 1
    assert sorted(top) == ["image", "teacher", "text", "views"]
    nodes = {f"{name}/{below}": node for name, group in top.items() for below, node in walk(group)} | top

    found = {path for path, node in nodes.items() if isinstance(node, zarr.Array)}
    assert found == {f"{field}/{array}" for field, array in ARRAYS}
    groups = {path: dict(node.attrs) for path, node in nodes.items() if isinstance(node, zarr.Group)}
    fields = {path: attributes for path, attributes in groups.items() if attributes}
    assert set(fields) == set(golden.FIELDS)
    for field, attributes in fields.items():
        record = json.loads((GOLDEN / "_emkum/fields" / f"{field}.json").read_text("utf-8"))
        assert attributes == {"emkum": {"field": field, "fingerprint_digest": record["fingerprint_digest"]}}


@pytest.mark.parametrize(("field", "array"), ARRAYS)
def test_zarr_reads_every_number_and_the_fill_value_elsewhere(field: str, array: str):
    node = zarr.open_group(GOLDEN, mode="r")[f"{field}/{array}"]
    expected = golden.expected_array(field, array)
    assert node.shape == expected.shape
    assert node.dtype == expected.dtype
    assert dict(node.attrs) == {}
    np.testing.assert_array_equal(node[...], expected)
    np.testing.assert_array_equal(node.fill_value, golden.fill_value(expected.dtype.name))


@pytest.mark.parametrize(
    ("path", "names", "shard", "chunk"),
    [
        ("image/tiny@2/tokens/values", ("image_row", "view", "token", "channel"), (16, 1, 5, 8), (1, 1, 5, 8)),
        ("views/center-1.0/boxes/values", ("image_row", "view", "parameter"), None, (16, 1, 10)),
        ("text/tiny-tokenizer/ids/values", ("text_row", "position"), None, (16, 32)),
        ("text/tiny-tokenizer/ids/length", ("text_row",), None, (16,)),
        ("teacher/tiny/image/cls/values", ("image_row", "view", "channel"), None, (16, 1, 8)),
        ("teacher/tiny/image/patches/values", ("image_row", "view", "token", "channel"), (16, 1, 4, 8), (1, 1, 4, 8)),
        ("teacher/tiny/image/patches/scale", ("image_row", "view", "token"), None, (16, 1, 4)),
        ("teacher/tiny/image/patches/mean", ("channel",), None, (8,)),
        ("teacher/tiny/text/layers/values", ("text_row", "position", "channel"), (16, 32, 8), (1, 16, 8)),
        ("teacher/tiny/text/layers/length", ("text_row",), None, (16,)),
    ],
)
def test_zarr_sees_names_chunks_and_shards(path: str, names: tuple, shard: tuple | None, chunk: tuple):
    node = zarr.open_array(GOLDEN / path, mode="r")
    assert node.metadata.dimension_names == names
    assert (node.shards, node.chunks) == (shard, chunk)


def test_the_golden_holds_what_it_says():
    tokens = golden.expected_array("image/tiny@2/tokens", "values")
    assert np.isnan(tokens[7]).all()  # quarantined
    assert np.isnan(tokens[20:32]).all()  # padding
    assert np.isnan(tokens[32:, 1]).all()  # val has one view
    assert (tokens[3] == 0).all()
    assert np.nanmin(tokens) < 0 < np.nanmax(tokens)
    assert golden.missing("teacher/tiny/image/cls", "train") == [(1, 0), (1, 1)]
    assert np.isnan(golden.expected_array("teacher/tiny/image/cls", "values")[16:32]).all()
    assert {golden.length_of(row) for row in range(48, 57)} >= {16, 17, 32}
    train, val = golden.SEGMENTS
    assert (len(golden.captions(train)), len(golden.captions(val))) == (37, 9)
    with_captions = {(line["tar"], line["key"]) for line in golden.captions(val)}
    assert [s["key"] for s in golden.samples(val) if (s["tar"], s["key"]) not in with_captions] == ["k05"]
    assert [c["key"] for c in golden.captions(val) if c["image_row"] is None] == ["k02"]


# --- tensorstore and dask -------------------------------------------------------------------------------------------

# In a process of its own: tensorstore's threads must not be alive in a test session that may fork later.
READ_WITH_TENSORSTORE = """
import sys
import numpy as np
import tensorstore as ts
for number, path in enumerate(sys.argv[2:]):
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}, read=True).result()
    print(*array.domain.labels)
    np.save(f"{sys.argv[1]}/{number}.npy", array.read().result())
"""


def test_tensorstore_reads_every_array_equal(tmp_path: Path):
    paths = [str(GOLDEN / field / array) for field, array in ARRAYS]
    command = [sys.executable, "-c", READ_WITH_TENSORSTORE, str(tmp_path), *paths]
    labels = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    for number, (field, array) in enumerate(ARRAYS):
        expected = golden.expected_array(field, array)
        got = np.load(tmp_path / f"{number}.npy")
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected, err_msg=f"{field}/{array}")
        assert tuple(labels[number].split()) == zarr.open_array(paths[number], mode="r").metadata.dimension_names


def test_dask_reads_the_tokens_block_by_block():
    import dask.array

    path = "image/tiny@2/tokens"
    array = dask.array.from_zarr(str(GOLDEN), component=f"{path}/values", chunks=(16, 1, 5, 8))
    assert array.numblocks == (3, 2, 1, 1)
    expected = golden.expected_array(path, "values")
    np.testing.assert_array_equal(array.compute(scheduler="synchronous"), expected)
    means = dask.array.nanmean(array.astype("float32"), axis=(0, 1, 2)).compute(scheduler="synchronous")
    np.testing.assert_allclose(means, np.nanmean(expected.astype("float32"), axis=(0, 1, 2)), rtol=1e-6)


# --- the plain reader -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", golden.FIELDS)
def test_the_plain_reader_gives_the_same_numbers(field: str):
    cache = reader.open_cache(GOLDEN)
    f = golden.FIELDS[field]
    assert [(b, v) for name, b, v in sorted(cache.receipts) if name == field] == golden.committed(field)
    for block, view in golden.committed(field):
        for array in golden.arrays(field):
            whole = golden.expected_array(field, array)
            for within, got in enumerate(reader.read_block(cache, field, array, block, view)):
                row = block * 16 + within
                if got is None:
                    assert not golden.is_valid(field, row, view)
                else:
                    np.testing.assert_array_equal(got, whole[row, view] if f.space == "image" else whole[row])
    for split in ("train", "val"):
        for view in range(f.num_views):
            rows = reader.valid_rows(cache, field, split, view)
            assert rows == golden.valid_rows(field, split, view)
            for row in rows[::5]:
                got = reader.read_values(cache, field, row, view)
                np.testing.assert_array_equal(got, golden.expected_values(field, row, view))
                assert np.isfinite(got).all()


def test_the_plain_reader_refuses_a_row_that_is_not_valid():
    cache = reader.open_cache(GOLDEN)
    for field, row, view in [
        ("image/tiny@2/tokens", 7, 0),  # quarantined
        ("image/tiny@2/tokens", 20, 0),  # padding
        ("image/tiny@2/tokens", 32, 1),  # no such view in val
        ("teacher/tiny/image/cls", 16, 0),  # not extracted yet
        ("views/center-1.0/boxes", 0, 0),  # rows of another policy
    ]:
        with pytest.raises(reader.BadCacheError, match="is not valid"):
            reader.read_values(cache, field, row, view)


def test_samples_and_captions_are_as_stated():
    cache = reader.open_cache(GOLDEN)
    for segment in golden.SEGMENTS:
        lines = golden.samples(segment)
        assert reader.read_table(cache, segment.number, "samples.parquet").to_pylist() == lines
        captions = golden.captions(segment)
        assert reader.read_table(cache, segment.number, "captions.parquet").to_pylist() == captions
        image_rows = [line["image_row"] for line in lines if line["image_row"] is not None]
        first_row, rows = segment.span("image")
        assert image_rows == list(range(first_row, first_row + rows))
        first_row, rows = segment.span("text")
        assert [line["text_row"] for line in captions] == list(range(first_row, first_row + rows))


def test_statistics_error_and_quarantine_in_the_receipts_agree_with_the_numbers():
    cache = reader.open_cache(GOLDEN)
    for (field, block, view), receipt in cache.receipts.items():
        f = golden.FIELDS[field]
        rows = [row for row in range(block * 16, block * 16 + receipt["rows"]) if golden.is_valid(field, row, view)]
        values = [golden.expected_values(field, row, view) for row in rows]
        if f.space == "text":
            values = [v[: golden.length_of(row)] for row, v in zip(rows, values, strict=True)]
        flat = np.concatenate([v.reshape(-1) for v in values]).astype(np.float64)
        assert receipt["statistics"] == {"min": flat.min(), "max": flat.max(), "mean": flat.mean()}
        assert (receipt["error"] is None) == (f.storage in ("float32", "int32", "uint8"))
        assert [q["row"] for q in receipt["quarantined"]] == ([7] if f.space == "image" and block == 0 else [])
        for q in receipt["quarantined"]:
            assert q == {"row": 7, "tar": "train-000.tar", "key": "bär-07", "reason": "truncated JPEG"}


def test_the_int8_numbers_are_those_of_the_stated_encoder():
    field = "teacher/tiny/image/patches"
    for row in golden.valid_rows(field, "train"):
        z = (golden.expected_values(field, row) - golden.channel_mean()) / golden.channel_std()
        scale = np.abs(z).max(-1) / 127
        scale[scale == 0] = 1
        np.testing.assert_array_equal(scale, golden.expected_row(field, "scale", row))
        np.testing.assert_array_equal(np.rint(z / scale[:, None]), golden.expected_row(field, "values", row))


# --- checksums and bytes --------------------------------------------------------------------------------------------


def test_every_object_is_in_one_record_and_agrees_with_its_digest():
    cache = reader.open_cache(GOLDEN)  # checks the digests of segments, fingerprints and receipts
    entries = [entry for receipt in cache.receipts.values() for entry in receipt["objects"]]
    entries += [entry for record in cache.fields.values() for entry in record.get("statistics", {}).values()]
    for entry in entries:
        reader.read_object(cache, entry)
    on_disk = {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("c.*")}
    assert sorted(entry["path"] for entry in entries) == sorted(on_disk)


def test_a_flipped_bit_is_noticed_by_the_plain_reader_and_by_zarr(tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(GOLDEN, copy)
    flipped = copy / "image/tiny@2/tokens/values/c.0.0.0.0"
    data = bytearray(flipped.read_bytes())
    data[100] ^= 1
    flipped.write_bytes(data)
    with pytest.raises(reader.BadCacheError, match="SHA-256"):
        reader.read_block(reader.open_cache(copy), "image/tiny@2/tokens", "values", 0)
    with pytest.raises(reader.BadCacheError, match="chunk 1: crc32c"):
        reader.inner_chunks(bytes(data), 16, "flipped")
    array = zarr.open_array(copy / "image/tiny@2/tokens/values", mode="r")
    array[0, 0]
    with pytest.raises(ValueError, match="checksum"):
        array[1, 0]


def test_the_model_folder_holds_weights_architecture_and_tokenizer():
    from tokenizers import Tokenizer

    folder = GOLDEN / "_emkum/models/tiny"
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    assert {name: array.shape for name, array in weights.items()} == {"embedding.weight": (5, 8), "norm.weight": (8,)}
    model = json.loads((folder / "model.json").read_text("utf-8"))
    assert model["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("w0 w91").ids == [4, 95]


def test_json_files_are_sorted_objects_in_utf8():
    files = [path for path in GOLDEN.rglob("*.json") if not path.name.startswith(".")]
    assert files
    for path in files:
        content = json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
        assert isinstance(content, dict), path
        assert json.dumps(content) == json.dumps(content, sort_keys=True), path


def test_a_regenerated_golden_equals_the_committed_one(tmp_path: Path):
    command = [sys.executable, str(Path(golden.__file__)), str(tmp_path / "again")]
    subprocess.run(command, check=True, timeout=120)
    again = tmp_path / "again"
    paths = {path.relative_to(GOLDEN) for path in GOLDEN.rglob("*") if path.is_file()}
    assert paths == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    assert sum((GOLDEN / path).stat().st_size for path in paths) < 300_000
    for path in sorted(paths):
        if path.suffix == ".parquet":
            continue  # its bytes name the version of pyarrow; the lines are compared below
        if path.name == "segment.json":  # holds the SHA-256 of the Parquet files
            old, new = (json.loads((folder / path).read_text("utf-8")) for folder in (GOLDEN, again))
            assert {k: v for k, v in old.items() if k not in ("parquet", "digest")} == {
                k: v for k, v in new.items() if k not in ("parquet", "digest")
            }
            continue
        assert (GOLDEN / path).read_bytes() == (again / path).read_bytes(), path
    old_cache, new_cache = reader.open_cache(GOLDEN), reader.open_cache(again)
    for segment in golden.SEGMENTS:
        for name in ("samples.parquet", "captions.parquet"):
            assert reader.read_table(old_cache, segment.number, name).equals(
                reader.read_table(new_cache, segment.number, name)
            )
