"""One digest of everything committed: the same for the same content, another for any other."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from golden import make_golden as golden
from golden import reader as plain
from tiny_cache import make_cache

from emkum import errors
from emkum.cli import run
from emkum.shards.codec import encode
from emkum.shards.digest import digest
from emkum.shards.layout import pretty_json
from emkum.shards.ledger import with_digest
from emkum.shards.reader import Cache
from emkum.shards.store import LocalStore
from emkum.shards.verify import verify
from emkum.shards.writer import CacheWriter

OLD, SEALED = (Path(__file__).parent / "golden" / name for name in ("format-1", "format-1-digests"))
DIGESTS = {
    OLD: "0bb992eb955f3ba437f6d8f365e1ec52f4ed7d7bf19648904bf734eb2fbb187d",
    SEALED: "c4a43cea10411acb8fd00ea15ce9a5b8e231535c8e90bf75b779b5175923e4dc",
}
CLS = "teacher/tinyvit/image/cls"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache") / "c"
    make_cache(root, pictures=20, val_pictures=3, captions=1, storage="int8", cut=1, quarantined=(3,))
    return root


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


# --- the golden cache with digests --------------------------------------------------------------------------


def test_the_golden_cache_with_digests_is_what_the_script_writes(tmp_path: Path) -> None:
    golden.write_golden(tmp_path / "g")
    golden.seal(tmp_path / "g")
    names = sorted(p.relative_to(SEALED) for p in SEALED.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "g") for p in (tmp_path / "g").rglob("*") if p.is_file())
    for name in names:
        if name.suffix != ".parquet":  # their bytes are pyarrow's affair
            assert (SEALED / name).read_bytes() == (tmp_path / "g" / name).read_bytes(), name


def test_the_golden_cache_with_digests_is_whole_and_sealed() -> None:
    report = verify(LocalStore(SEALED))
    assert report.findings == ()
    assert report.sealed
    assert report.incomplete == {"teacher/tiny/image/cls": 2}


def test_both_golden_caches_hold_the_same_numbers() -> None:
    old, new = Cache.open(OLD), Cache.open(SEALED)
    assert new.segments[0].sources[1].truncated == new.segments[0].sources[1].bytes
    independent = plain.open_cache(SEALED)
    for name, field in new.fields.items():
        for split in new.splits:
            rows = field.rows(split)
            np.testing.assert_array_equal(field.values(rows), old.fields[name].values(rows))
            for row in rows[:2]:
                theirs = np.asarray(plain.read_values(independent, name, int(row), 0), np.float32)
                np.testing.assert_array_equal(np.nan_to_num(theirs), field.values(np.array([row]))[0])
        for array in golden.arrays(name):
            node = zarr.open_array(SEALED / name / array, mode="r")
            np.testing.assert_array_equal(node[...], golden.expected_array(name, array))
            assert list(node.attrs) == ["emkum"]


# --- the digest ---------------------------------------------------------------------------------------------


def digest_by_the_book(root: Path) -> str:
    """docs/format.md, section 8, with json and hashlib alone."""

    def read(path: Path) -> dict:
        return json.loads(path.read_text("utf-8"))

    records = root / "_emkum"
    rows_per_block = read(root / "zarr.json")["attributes"]["emkum"]["rows_per_block"]
    lines: list[dict] = [{"format": 1, "rows_per_block": rows_per_block}]
    segments = [read(p) for p in sorted((records / "segments").glob("*/segment.json"))]
    lines += [{"segment": number, "digest": segment["digest"]} for number, segment in enumerate(segments)]
    fields = {read(p)["field"]: read(p) for p in (records / "fields").rglob("*.json")}
    for name in sorted(fields):
        keys = ("field", "kind", "arrays", "fingerprint_digest", "statistics")
        lines.append({key: fields[name][key] for key in keys})
        receipts = [read(p) for p in (records / "receipts" / name).glob("*.json")]
        for r in sorted(receipts, key=lambda r: (r["block"], r["view"])):
            line = {key: r[key] for key in ("field", "block", "view", "segment", "rows")}
            line["objects"] = sorted([o["path"], o["bytes"], o["sha256"]] for o in r["objects"])
            line["quarantined"] = [[q["row"], q["tar"], q["key"], q["reason"]] for q in r["quarantined"]]
            lines.append(line)
    for folder in sorted((records / "models").iterdir()):
        files = [folder / name for name in ("model.safetensors", "tokenizer.json") if (folder / name).exists()]
        content = [[p.name, p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()] for p in files]
        lines.append({"network": folder.name, "files": content})
    return hashlib.sha256(b"".join(golden.canonical(line) + b"\n" for line in lines)).hexdigest()


@pytest.mark.parametrize("root", [OLD, SEALED], ids=["old", "sealed"])
def test_the_digest_of_a_golden_cache_never_changes(root: Path) -> None:
    assert digest(root) == digest(root, trust_receipts=True) == digest_by_the_book(root) == DIGESTS[root]


def test_the_digest_of_a_cache_is_that_of_the_book(made: Path) -> None:
    assert digest(made, threads=1) == digest(made, threads=3) == digest_by_the_book(made)


def test_two_runs_give_one_digest_whenever_wherever_and_with_other_uuids(made: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "again", pictures=20, val_pictures=3, captions=1, storage="int8", cut=1, quarantined=(3,))
    assert Cache.open(made).uuid != Cache.open(tmp_path / "again").uuid
    assert digest(tmp_path / "again") == digest(made)


def test_the_order_of_blocks_and_fields_does_not_matter(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "a", pictures=40, val_pictures=0, captions=1, fields=("cls", "ids")).path
    parts = make_cache(
        tmp_path / "b", pictures=40, val_pictures=0, captions=1, fields=("cls", "ids"), skipped_blocks=[("cls", 0)]
    ).path
    assert digest(parts) != digest(whole)
    source, writer = Cache.open(whole).field(CLS), CacheWriter(parts)
    with writer.block(source.spec, writer.segments[0], 0, 0) as out:
        out.append(encode(source.values(np.arange(16)), "float32"))
        out.commit()
    assert digest(parts) == digest(whole)


def test_what_is_for_people_is_not_part_of_it(cache: Path, made: Path) -> None:
    record = cache / f"_emkum/fields/{CLS}.json"
    _rewrite(record, lambda r: r["environment"].update(torch="9.9"))
    _rewrite(cache / f"_emkum/receipts/{CLS}/000000-0.json", lambda r: r.update(statistics=None, error=None))
    shape = cache / CLS / "values/zarr.json"
    shape.write_bytes(shape.read_bytes().replace(b'"shape"', b'"shape" '))
    (cache / "_emkum/claims").mkdir(exist_ok=True)
    (cache / "_emkum/claims/writer-0.json").write_text("{}")
    assert digest(cache) == digest(made)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (f"_emkum/receipts/{CLS}/000000-0.json", lambda r: r["quarantined"][0].update(reason="other")),
        (f"_emkum/receipts/{CLS}/000000-0.json", lambda r: r["objects"][0].update(sha256="0" * 64)),
        (f"_emkum/fields/{CLS}.json", lambda r: r["statistics"]["mean"].update(sha256="0" * 64)),
    ],
)
def test_what_is_committed_is_part_of_it(path: str, change: Callable[[dict], object], cache: Path, made: Path) -> None:
    _rewrite(cache / path, change)
    assert digest(cache, trust_receipts=True) != digest(made, trust_receipts=True)


def test_a_block_less_is_another_digest(cache: Path, made: Path) -> None:
    (cache / f"_emkum/receipts/{CLS}/000001-0.json").unlink()
    assert digest(cache) != digest(made)


@pytest.mark.parametrize(
    "path",
    [
        f"{CLS}/values/c.0.0.0",
        f"{CLS}/scale/c.1.0",
        f"{CLS}/mean/c.0",
        "_emkum/segments/1/captions.parquet",
        "_emkum/models/tinyvit/model.safetensors",
        "_emkum/models/tinybert/tokenizer.json",
    ],
)
def test_objects_are_read_again_unless_the_receipts_are_trusted(path: str, cache: Path, made: Path) -> None:
    data = bytearray((cache / path).read_bytes())
    data[len(data) // 2] ^= 1
    (cache / path).write_bytes(bytes(data))
    assert digest(cache, trust_receipts=True) == digest(made)
    with pytest.raises(errors.CorruptCache, match=path.rpartition("/")[2]) as caught:
        digest(cache)
    assert caught.value.way_out == f"see all that is damaged: emkum cache verify {cache}"
    (cache / path).unlink()
    with pytest.raises(errors.CorruptCache, match=path.rpartition("/")[2]):
        digest(cache)


def test_the_command_prints_the_digest_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "digest", str(made)]) == 0
    assert capsys.readouterr().out == digest(made) + "\n"
    assert run(["cache", "digest", str(made), "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(made), "digest": digest(made), "quick": True}


def _rewrite(path: Path, change: Callable[[dict], object]) -> None:
    record = json.loads(path.read_bytes())
    del record["digest"]
    change(record)
    path.write_bytes(pretty_json(with_digest(record)))
