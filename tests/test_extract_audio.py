"""`emkum extract` of sounds: from tars to an audio row space, read back by emkum and by plain zarr."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from PIL import Image

from emkum.errors import (
    CorruptCache,
    FingerprintMismatch,
    IdentityMismatch,
    NoData,
    RefusedTeacher,
    SourceChanged,
    TooManyBadSamples,
    UnsupportedNetwork,
    UsageError,
)
from emkum.models.audio_pass import AudioPass
from emkum.models.network import load_saved, save_network
from emkum.models.passes import Wanted
from emkum.models.targets import LayersRule
from emkum.shards import tars
from emkum.shards.audit import describe, left_out, table
from emkum.shards.digest import digest
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import TEXT_TILE, FieldSpec, field_from_record
from emkum.shards.reader import Cache
from emkum.shards.repair import repair
from emkum.shards.segments import Segment, Span, read_segments
from emkum.shards.sounds import decode_sound
from emkum.shards.store import open_store
from emkum.shards.tars import scan_tar
from emkum.shards.verify import Report
from emkum.shards.verify import verify as verify_store
from emkum.stage1_extract import sounds
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract
from emkum.stage1_extract.live_check import SampleConfig, check_sample, load_teachers, require_agreement
from emkum.stage1_extract.plan import Task
from tests.extraction import Running, content, save_teacher
from tests.sound_files import RATE, WIDTH, encoded, noise, save_ear, sine, sounds_tar, write_tar

FIELDS = ("teacher/ear/audio/mean", "teacher/ear/audio/layers", "teacher/ear/audio/patches")
MAX_SECONDS = 0.8


@pytest.fixture(scope="module")
def ear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ear(tmp_path_factory.mktemp("networks") / "ear")


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sounds_tar(tmp_path_factory.mktemp("data") / "a.tar", 40)


def config(teacher: Path | str, data: Path | str, cache: Path, **changes: Any) -> ExtractConfig:
    common: dict[str, Any] = {
        "targets": ("mean", "layers", "patches"),
        "storage": "float32",
        "compute": "float32",
        "rows_per_block": 16,
        "max_seconds": MAX_SECONDS,
        "batch_size": 5,
        "threads": 2,
        "device": "cpu",
    }
    return ExtractConfig(teacher=(str(teacher),), data=(str(data),), cache=cache, **(common | changes))


def verify(cache: Path) -> Report:
    return verify_store(open_store(cache))


def run(*arguments: Any, **changes: Any) -> list[str]:
    lines: list[str] = []
    extract(config(*arguments, **changes), lines.append)
    return lines


@pytest.fixture(scope="module")
def made(ear: Path, tar: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    cache = tmp_path_factory.mktemp("made") / "cache"
    return cache, run(ear, tar, cache)


@pytest.fixture
def cache(made: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of the cache, to be damaged or continued."""
    return Path(shutil.copytree(made[0], tmp_path / "cache"))


def alone(ear: Path, data: bytes, ext: str, max_seconds: float = MAX_SECONDS) -> list[np.ndarray]:
    """What the teacher says of one sound by itself: mean, layers, patches."""
    frozen = AudioPass([load_saved(ear)], [Wanted("ear", w) for w in ("mean", "layers", "patches")], "float32", "cpu")
    wave = decode_sound(data, ext, RATE, max_seconds).samples_S
    return [values[0].numpy() for values in frozen.sounds(torch.from_numpy(wave)[None], [len(wave)])]


# --- what is in the cache -------------------------------------------------------------------------------------------


def test_every_row_is_what_the_teacher_says_of_that_sound_alone(
    made: tuple[Path, list[str]], ear: Path, tar: Path
) -> None:
    cache = Cache.open(made[0])
    scanned = scan_tar(str(tar))
    data = tar.read_bytes()
    assert cache.field(FIELDS[1]).row_shape == (48, WIDTH)  # 39 frames in 0.8 s, in tiles of 16
    lines = cache.sounds("train").to_pylist()
    assert [line["audio_row"] for line in lines] == list(range(40))
    for line, sample in zip(lines, scanned.samples, strict=True):
        assert sample.sound is not None
        assert (line["key"], line["ext"], line["image_row"]) == (sample.key, sample.sound.ext, None)
        row = np.array([line["audio_row"]])
        said = alone(ear, data[line["offset"] : line["offset"] + line["size"]], line["ext"])
        for name, expected in zip(FIELDS, said, strict=True):
            field = cache.field(name)
            values = field.values(row)[0]
            if name != FIELDS[0]:
                length = int(field.lengths(row)[0])
                assert length == len(expected)
                assert not values[length:].any()
                values = values[:length]
            np.testing.assert_allclose(values, expected, atol=1e-4)
    assert {field.space for field in cache.fields.values()} == {"audio"}
    assert all(field.num_views == 1 for field in cache.fields.values())


def test_the_run_says_what_it_does(made: tuple[Path, list[str]]) -> None:
    lines = made[1]
    assert lines[0] == "split train: 0 pictures, 40 captions and 40 sounds in 1 tars"
    cut = int(next(line for line in lines if "were cut there" in line).split()[0])
    assert 0 < cut < 40
    assert f"{cut} sounds last longer than 0.8 s and were cut there (--max-seconds)" in lines
    assert "seen 40 = 40 ok + 0 quarantined + 0 filtered (sounds)" in lines
    assert not any("emkum train" in line for line in lines)


def test_the_same_command_does_nothing(cache: Path, ear: Path, tar: Path) -> None:
    before = content(cache)
    assert run(ear, tar, cache)[-1].startswith("nothing to do")
    assert content(cache) == before


def test_plain_zarr_reads_it(made: tuple[Path, list[str]]) -> None:
    cache = Cache.open(made[0])
    rows = np.arange(40)
    for name in FIELDS:
        field = cache.field(name)
        group = zarr.open_group(made[0] / name, mode="r")
        values = group["values"]
        assert isinstance(values, zarr.Array)
        assert values.metadata.dimension_names[0] == "audio_row"
        found = values[:40]
        if name == FIELDS[0]:
            np.testing.assert_array_equal(found, field.values(rows))
            continue
        lengths = np.asarray(group["length"][:40])
        np.testing.assert_array_equal(lengths, field.lengths(rows))
        for row in range(40):
            np.testing.assert_array_equal(
                found[row, : lengths[row]], field.values(rows[row : row + 1])[0, : lengths[row]]
            )
            tiles = -(-int(lengths[row]) // TEXT_TILE) * TEXT_TILE
            assert np.isnan(found[row, tiles:]).all()  # not stored


def test_batches_hold_few_seconds_or_few_rows(
    made: tuple[Path, list[str]], tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sounds, "BATCH_SECONDS", 2)
    store = open_store(made[0])
    (segment,) = read_segments(store)
    tasks = [Task(segment, 0, 0, (), 0, 16), Task(segment, 1, 0, (), 16, 16)]
    ears = sounds.Ears({"a.tar": str(tar)}, RATE, MAX_SECONDS, 400)
    stream = sounds.SoundStream(store, tasks, ears, 4, 2)
    batches = list(stream)
    stream.close()
    assert [row.clip.row for batch in batches for row in batch.rows] == list(range(32))
    sizes = [len(batch.rows) for batch in batches]
    seconds = [len(b.rows) * max(len(r.sound.samples_S) for r in b.rows if r.sound) / RATE for b in batches]
    assert max(sizes) == 4
    assert max(seconds) <= 2.0
    assert min(sizes) < 4  # or seconds had no part in it
    assert [batch.task.block for batch in batches if batch.last] == [0, 1]


def test_float16_and_int8(ear: Path, tar: Path, tmp_path: Path, made: tuple[Path, list[str]]) -> None:
    exact = Cache.open(made[0])
    rows = np.arange(40)
    for storage, worst in (("float16", 1e-3), ("int8", 0.02)):
        run(ear, tar, tmp_path / storage, storage=storage)
        stored = Cache.open(tmp_path / storage)
        for name in FIELDS:
            ours, other = stored.field(name).values(rows), exact.field(name).values(rows)
            assert np.linalg.norm(ours - other) < worst * np.linalg.norm(other)
        assert not verify(tmp_path / storage).findings


def test_info_verify_and_digest_know_sounds(made: tuple[Path, list[str]], ear: Path, tar: Path, tmp_path: Path) -> None:
    described = describe(Cache.open(made[0]))
    assert described["splits"]["train"]["sounds"] == 40
    assert described["fields"][FIELDS[1]]["kind"] == "audio_ragged"
    assert described["fields"][FIELDS[1]]["fingerprint"]["max_seconds"] == MAX_SECONDS
    assert "split train: 0 pictures, 40 captions, 40 sounds, 1 tars in 1 segments" in table(described)
    report = verify(made[0])
    assert not report.findings
    assert (report.fields, report.blocks) == (3, 9)
    run(ear, tar, tmp_path / "again", batch_size=32)
    assert [s.digest for s in Cache.open(tmp_path / "again").segments] == [
        s.digest for s in Cache.open(made[0]).segments
    ]
    assert digest(made[0]) == digest(shutil.copytree(made[0], tmp_path / "copy"))


def test_a_sample_of_the_cache_agrees_with_the_live_teacher(cache: Path, ear: Path) -> None:
    asked = SampleConfig(rows=6, teacher=(str(ear),), device="cpu")
    report = check_sample(cache, asked, load_teachers(cache, asked))
    require_agreement(report)
    assert {sample.field: sample.rows for sample in report.fields} == dict.fromkeys(FIELDS, 6)


def test_another_target_later_computes_only_that(ear: Path, tar: Path, tmp_path: Path) -> None:
    run(ear, tar, tmp_path / "cache", targets=("mean",))
    before = content(tmp_path / "cache")
    lines = run(ear, tar, tmp_path / "cache", targets=("mean", "layers"))
    assert any("8 committed rows computed again agree with the cache" in line for line in lines)
    after = content(tmp_path / "cache")
    assert {path: after[path] for path in before} == before
    assert set(Cache.open(tmp_path / "cache").fields) == set(FIELDS[:2])


def test_more_tars_append_rows(cache: Path, ear: Path, tar: Path, tmp_path: Path) -> None:
    second = sounds_tar(tmp_path / "b.tar", 5, seed=9)
    before = content(cache)
    extract(dataclasses.replace(config(ear, tar, cache), data=(str(tar), str(second))), lambda line: None)
    after = content(cache)
    assert all(after[path] == data for path, data in before.items() if "receipts" in path or "/c." in path)
    opened = Cache.open(cache)
    assert opened.field(FIELDS[0]).rows("train").tolist() == [*range(40), *range(48, 53)]
    assert opened.segments[1].audio == Span(48, 5)
    assert not verify(cache).findings


# --- pictures, captions and sounds side by side ----------------------------------------------------------------------


def mixed_tar(path: Path) -> Path:
    members: dict[str, bytes] = {}
    for i in range(12):
        if i % 3 != 1:
            buffer = io.BytesIO()
            Image.fromarray(np.full((64, 64, 3), 20 * i, np.uint8)).save(buffer, "JPEG")
            members[f"m{i:02d}.jpg"] = buffer.getvalue()
        if i % 2:
            members[f"m{i:02d}.wav"] = encoded(noise(0.3, seed=i), RATE, "WAV")
        members[f"m{i:02d}.json"] = json.dumps({"caption": f"sample {i}", "label": i}).encode()
    return write_tar(path, members)


def test_mixed_samples_keep_their_rows_apart_and_their_names_together(ear: Path, tmp_path: Path) -> None:
    tar, cache = mixed_tar(tmp_path / "mixed.tar"), tmp_path / "cache"
    eye = save_teacher(tmp_path / "eye")
    both = dataclasses.replace(
        config(ear, tar, cache, targets=("cls", "mean"), size=64, text_encoder="none"), teacher=(str(eye), str(ear))
    )
    lines: list[str] = []
    extract(both, lines.append)
    opened = Cache.open(cache)
    (segment,) = opened.segments
    assert (segment.image.rows, segment.text.rows, segment.audio.rows) == (8, 12, 6)
    heard, samples = opened.sounds("train").to_pylist(), opened.samples("train").to_pylist()
    of_key = {sample["key"]: sample["image_row"] for sample in samples}
    assert [line["key"] for line in heard] == [f"m{i:02d}" for i in range(1, 12, 2)]
    assert [line["image_row"] for line in heard] == [of_key[line["key"]] for line in heard]
    assert {line["image_row"] for line in heard} >= {None}
    assert len(opened.field("teacher/ear/audio/mean").rows("train")) == 6
    assert len(opened.field("teacher/wide/image/cls").rows("train")) == 8
    assert not verify(cache).findings
    assert any(line.startswith("seen 8 = 8 ok") for line in lines)
    assert any(line.startswith("seen 6 = 6 ok") for line in lines)


def test_an_audio_teacher_can_come_after_an_image_teacher(ear: Path, tmp_path: Path) -> None:
    tar, cache = mixed_tar(tmp_path / "mixed.tar"), tmp_path / "cache"
    eye = save_teacher(tmp_path / "eye")
    run(eye, tar, cache, targets=("cls",), size=64, text_encoder="none")
    before = content(cache)
    run(ear, tar, cache, targets=("mean",))
    after = content(cache)
    assert {path: after[path] for path in before} == before
    assert len(Cache.open(cache).field("teacher/ear/audio/mean").rows("train")) == 6


def test_segments_without_sounds_are_written_as_ever(tmp_path: Path, ear: Path) -> None:
    """No new key, no new file; and after sounds a segment without any keeps their row numbers."""
    eye, cache = save_teacher(tmp_path / "eye"), tmp_path / "cache"
    (tmp_path / "tars").mkdir()
    plain = mixed_tar(tmp_path / "plain.tar")
    silent = {name: data for name, data in _members(plain).items() if not name.endswith(".wav")}
    quiet = write_tar(tmp_path / "tars/quiet.tar", silent)
    run(eye, quiet, cache, targets=("cls",), size=64, text_encoder="none")
    record = json.loads((cache / "_emkum/segments/0/segment.json").read_text())
    assert "audio" not in record
    assert set(record["parquet"]) == {"samples.parquet", "captions.parquet"}
    assert read_segments(open_store(cache))[0].audio == Span(0, 0)
    for name, number in (("one.tar", 1), ("two.tar", 2), ("three.tar", 3)):
        source = plain if number != 2 else quiet
        shutil.copy(source, tmp_path / "tars" / name)
        run(eye, tmp_path / "tars" / name, cache, targets=("cls",), size=64, text_encoder="none")
    spans = [segment.audio for segment in read_segments(open_store(cache))]
    assert spans == [Span(0, 0), Span(0, 6), Span(16, 0), Span(16, 6)]
    run(ear, tmp_path / "tars", cache, targets=("mean",))
    assert Cache.open(cache).field("teacher/ear/audio/mean").rows("train").tolist() == [*range(6), *range(16, 22)]
    assert not verify(cache).findings


def _members(path: Path) -> dict[str, bytes]:
    import tarfile

    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]


@pytest.mark.parametrize("with_hints", [True, False])
def test_a_cache_made_before_sounds_were_read_is_not_taken_for_one_without(
    ear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_hints: bool
) -> None:
    """Its rows would be missing without a word: also where another tar of the command has sounds."""
    eye, cache, old = save_teacher(tmp_path / "eye"), tmp_path / "cache", mixed_tar(tmp_path / "old.tar")
    with monkeypatch.context() as then:
        then.setattr(tars, "AUDIO_EXTS", frozenset())
        then.setattr(tars, "USED_EXTS", tars.USED_EXTS - {"wav", "flac"})
        run(eye, old, cache, targets=("cls",), size=64, text_encoder="none")
    (cache / "_emkum/hints/scans.json").unlink()
    if with_hints:  # an image teacher of today notes what it sees
        shutil.copy(old, tmp_path / "second.tar")
        both = config(eye, "", cache, targets=("cls",), size=64, text_encoder="none")
        extract(dataclasses.replace(both, data=(str(old), str(tmp_path / "second.tar"))), lambda line: None)
    new = sounds_tar(tmp_path / "new.tar", 3)
    asked = dataclasses.replace(config(ear, "", cache, targets=("mean",)), data=(str(old), str(new)))
    with pytest.raises(IdentityMismatch, match=r"old\.tar holds sounds, and segment 0 was made of it") as error:
        extract(asked, lambda line: None)
    assert "another folder with --cache" in error.value.way_out
    assert "teacher/ear/audio/mean" not in Cache.open(cache).fields
    extract(dataclasses.replace(asked, data=(str(new),)), lambda line: None)
    assert len(Cache.open(cache).field("teacher/ear/audio/mean").rows("train")) == 3


def test_fingerprints_of_other_fields_have_no_new_entry() -> None:
    assert "max_seconds" not in Fingerprint("tokens", "float16", (4, 8), size=224).to_json()
    assert Fingerprint("audio_pooled", "float16", (8,), max_seconds=30.0).to_json()["max_seconds"] == 30.0


# --- what cannot be heard --------------------------------------------------------------------------------------------


def bad_tar(path: Path) -> tuple[Path, dict[str, str]]:
    """A tar of 20 sounds, five of them unusable, and the reason of each."""
    nan = noise(0.2)
    nan[3] = np.nan
    wav = encoded(noise(0.4), RATE, "WAV")
    bad = {
        "s03": (wav[:-100], "states 12,800 bytes of samples; 12,700 are there"),
        "s07": (encoded(nan, RATE, "WAV", "FLOAT"), "holds inf or NaN among its 3,200 samples"),
        "s08": (encoded(noise(0.024), RATE, "WAV"), "lasts 24.0 ms; one frame takes 25 ms"),
        "s12": (b"", "cannot be decoded: Format not recognised."),
        "s19": (encoded(np.zeros(0), RATE, "WAV"), "holds no samples"),
    }
    members = {
        f"s{i:02d}.wav": bad[key][0] if (key := f"s{i:02d}") in bad else encoded(sine(300 + i, 0.3), RATE, "WAV")
        for i in range(20)
    }
    return write_tar(path, members), {key: reason for key, (_, reason) in bad.items()}


def test_bad_files_are_quarantined_with_a_reason(ear: Path, tmp_path: Path) -> None:
    tar, reasons = bad_tar(tmp_path / "bad.tar")
    lines = run(ear, tar, tmp_path / "cache", max_bad=0.5, batch_size=1)  # batches without a good row, too
    opened = Cache.open(tmp_path / "cache")
    missing = [int(key[1:]) for key in reasons]
    for name in FIELDS:
        assert opened.field(name).rows("train").tolist() == [i for i in range(20) if i not in missing]
    found = left_out(opened)
    assert {(s.key, s.reason, s.space) for s in found} == {(key, reason, "audio") for key, reason in reasons.items()}
    assert all(s.offset is not None and s.size is not None for s in found)
    assert "seen 20 = 15 ok + 5 quarantined + 0 filtered (sounds)" in lines
    assert not verify(tmp_path / "cache").findings
    data = tar.read_bytes()
    good = next(line for line in opened.sounds("train").to_pylist() if line["key"] == "s04")
    expected = alone(ear, data[good["offset"] : good["offset"] + good["size"]], "wav")[0]
    np.testing.assert_allclose(opened.field(FIELDS[0]).values(np.array([4]))[0], expected, atol=1e-4)


def test_too_many_bad_sounds_stop_the_run(ear: Path, tmp_path: Path) -> None:
    tar, _ = bad_tar(tmp_path / "bad.tar")
    with pytest.raises(TooManyBadSamples, match=r"of 20 sounds cannot be used, --max-bad 0\.1 allows 2"):
        run(ear, tar, tmp_path / "cache", max_bad=0.1)


def test_a_tar_that_changed_is_refused(cache: Path, ear: Path, tar: Path, tmp_path: Path) -> None:
    other = sounds_tar(tmp_path / "a.tar", 40, seed=3)
    with pytest.raises(SourceChanged, match=r"is not the a\.tar that segment 0 was extracted from"):
        run(ear, other, cache)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_with_both_values(cache: Path, ear: Path, tar: Path, tmp_path: Path) -> None:
    with pytest.raises(FingerprintMismatch, match=r"seconds of a sound 0\.8 in the cache, 0\.6 asked for"):
        run(ear, tar, cache, max_seconds=0.6)
    other = save_ear(tmp_path / "ear", seed=5)
    with pytest.raises(FingerprintMismatch, match="weights with sha256"):
        run(other, tar, cache)
    slower = save_ear(tmp_path / "slower" / "ear", eps=1e-4)
    with pytest.raises(FingerprintMismatch, match="architecture with sha256"):
        run(slower, tar, cache)


def test_rows_that_would_come_out_otherwise_are_noticed(
    ear: Path, tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(ear, tar, tmp_path / "cache", targets=("mean",))
    true = sounds.decode_sound
    monkeypatch.setattr(
        sounds, "decode_sound", lambda *a: dataclasses.replace(true(*a), samples_S=true(*a).samples_S[::-1].copy())
    )
    with pytest.raises(IdentityMismatch, match=r"field teacher/ear/audio/mean, row .* comparisons disagree"):
        run(ear, tar, tmp_path / "cache", targets=("mean", "layers"))


def test_what_a_teacher_of_sounds_cannot_do_is_said(ear: Path, tar: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--targets cls of ear, which hears sounds") as error:
        run(ear, tar, tmp_path / "a", targets=("cls",))
    assert error.value.way_out == "choose from mean, layers, patches"
    pictures = write_tar(tmp_path / "text.tar", {"a.txt": b"no sound"})
    with pytest.raises(NoData, match="teacher ear hears sounds and the data has none"):
        run(ear, pictures, tmp_path / "b")
    with pytest.raises(UsageError, match=r"--max-seconds 1000") as error:
        config(ear, tar, tmp_path / "c", max_seconds=1000.0)
    assert error.value.way_out == "give 0.1 to 600; cut longer recordings into clips"
    slow = save_ear(tmp_path / "slow", "slow", sample_rate=8_000)
    both = dataclasses.replace(config(ear, tar, tmp_path / "d"), teacher=(str(ear), str(slow)))
    with pytest.raises(UsageError, match="teachers that hear different rates: ear 16000 Hz, slow 8000 Hz"):
        extract(both, lambda line: None)
    eye, mixed = save_teacher(tmp_path / "eye"), mixed_tar(tmp_path / "mixed.tar")
    run(eye, mixed, tmp_path / "e", targets=("cls",), size=64, text_encoder="none", store_inputs="crops")
    from_crops = ExtractConfig(teacher=(str(ear),), cache=tmp_path / "e", from_crops=True, device="cpu")
    with pytest.raises(UsageError, match="hears sounds, and --from-crops reads no tar"):
        extract(from_crops, lambda line: None)
    with pytest.raises(UsageError, match=r"--layers thesis, and layers is no target of .*ear here"):
        run(ear, tar, tmp_path / "f", targets=("mean",), layers="thesis")
    with pytest.raises(UnsupportedNetwork, match="layers of ear, which hears sounds, without CLS and registers"):
        run(ear, tar, tmp_path / "g", layers="prefix=drop")
    read = dataclasses.replace(load_saved(ear), supervision="transcripts")
    save_network(read, tmp_path / "taught" / "ear")
    with pytest.raises(RefusedTeacher, match=r"--label-free: .*ear learned from transcripts of speech") as refused:
        run(tmp_path / "taught" / "ear", tar, tmp_path / "h", label_free=True)
    assert "use data2vec-audio, data2vec2-audio; or" in refused.value.way_out


# --- the rule of layers ----------------------------------------------------------------------------------------------


def test_layers_follow_the_rule_that_the_field_records(
    made: tuple[Path, list[str]], ear: Path, tar: Path, tmp_path: Path
) -> None:
    of_family = Cache.open(made[0]).field(FIELDS[1]).fingerprint
    assert of_family["layers"] == LayersRule("ffn", None, 0, "instance").to_json()  # the last 8 of so few are all
    assert of_family["output"] == "mean over all blocks of instance-normalised feed-forward outputs"
    assert "layers" not in Cache.open(made[0]).field(FIELDS[0]).fingerprint
    with pytest.raises(FingerprintMismatch, match=r"rule of layers .*site ffn.* in the cache, .*site block"):
        run(ear, tar, made[0], layers="last=1")
    run(ear, tar, tmp_path / "cache", targets=("layers",), layers="last=1,norm=layer")
    opened = Cache.open(tmp_path / "cache")
    field = opened.field(FIELDS[1])
    assert field.fingerprint["layers"] == LayersRule("block", 1, 0, "layer").to_json()
    patches = Cache.open(made[0]).field(FIELDS[2])  # after the last block
    for row in range(3):
        length = int(field.lengths(np.array([row]))[0])
        last = torch.from_numpy(patches.values(np.array([row]))[0][:length])
        expected = torch.nn.functional.layer_norm(last, last.shape[-1:]).numpy()
        np.testing.assert_allclose(field.values(np.array([row]))[0][:length], expected, atol=1e-3)
    sample = SampleConfig(rows=6, teacher=(str(ear),), device="cpu")
    require_agreement(check_sample(tmp_path / "cache", sample, load_teachers(tmp_path / "cache", sample)))


def test_the_rule_of_the_thesis_is_left_out_of_the_fingerprint(ear: Path, tar: Path, tmp_path: Path) -> None:
    run(ear, tar, tmp_path / "cache", targets=("layers",), layers="thesis")
    found = Cache.open(tmp_path / "cache").field(FIELDS[1]).fingerprint
    assert "layers" not in found
    assert found["output"] == "mean over all blocks of instance-normalised outputs"
    with pytest.raises(FingerprintMismatch, match="rule of layers None in the cache"):
        run(ear, tar, tmp_path / "cache", targets=("layers",))


def test_no_recipe_trains_on_sounds(made: tuple[Path, list[str]]) -> None:
    from emkum.stage2_train.recipe_fields import choose_recipe

    with pytest.raises(UsageError, match="holds targets of sounds only") as error:
        choose_recipe(Cache.open(made[0]))
    assert "no recipe trains on sounds yet" in error.value.way_out


# --- the format is strict ---------------------------------------------------------------------------------------------


def test_positions_are_whole_tiles() -> None:
    with pytest.raises(ValueError, match="positions must be a multiple of 16, got 20"):
        FieldSpec("teacher/a/audio/layers", "audio_ragged", "float16", (20, 8))
    spec = FieldSpec("teacher/a/audio/layers", "audio_ragged", "float16", (32, 8))
    arrays = {a.name: {"dtype": a.dtype, "row_shape": list(a.row_shape)} for a in spec.arrays}
    assert field_from_record({"field": spec.name, "kind": spec.kind, "arrays": arrays}) == spec
    assert (spec.space, spec.has_views, spec.has_length, spec.is_ragged) == ("audio", False, True, True)


def test_a_damaged_table_of_sounds_is_found(cache: Path) -> None:
    path = cache / "_emkum/segments/0/sounds.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    findings = verify(cache).findings
    assert any(f.path.endswith("sounds.parquet") for f in findings)
    with pytest.raises(CorruptCache, match=r"sounds\.parquet cannot be trusted"):
        Cache.open(cache).sounds("train")
    path.unlink()
    assert any(f.path.endswith("sounds.parquet") and "is missing" in f.what for f in verify(cache).findings)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"key": "nobody"}, "which is not there"),
        ({"image_row": 3}, "belongs to picture 3"),
        ({"audio_row": 7}, "is numbered 7"),
        ({"offset": None}, "lies at byte None"),
    ],
)
def test_a_table_of_sounds_that_does_not_fit_its_samples_is_found(
    cache: Path, change: dict[str, Any], problem: str
) -> None:
    from emkum.shards.record_check import check_sounds
    from emkum.shards.segments import SOUNDS

    folder = cache / "_emkum/segments/0"
    (segment,) = read_segments(open_store(cache))
    rows = pq.read_table(folder / "sounds.parquet").to_pylist()
    samples = (folder / "samples.parquet").read_bytes()

    def written(rows: list[dict[str, Any]]) -> bytes:
        import pyarrow as pa

        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, SOUNDS), sink, write_page_checksum=True)
        return sink.getvalue()

    check_sounds(segment, written(rows), samples)
    rows[5] |= change
    with pytest.raises(ValueError, match=problem):
        check_sounds(segment, written(rows), samples)


def test_a_segment_that_hides_its_sounds_is_refused(cache: Path) -> None:
    path = cache / "_emkum/segments/0/segment.json"
    record = json.loads(path.read_text())
    del record["audio"], record["record_digest"]
    path.write_text(json.dumps(record))
    with pytest.raises(CorruptCache, match=r"cannot be trusted: its contents have digest|it lists"):
        Cache.open(cache)


def test_a_damaged_block_is_found_repaired_and_extracted_again(cache: Path, ear: Path, tar: Path) -> None:
    whole = content(cache)
    path = cache / FIELDS[1] / "values/c.1.0.0"
    data = bytearray(path.read_bytes())
    data[100] ^= 0x40
    path.write_bytes(bytes(data))
    (finding,) = verify(cache).findings
    assert (finding.space, finding.field, finding.block) == ("audio", FIELDS[1], 1)
    repair(open_store(cache))
    assert FIELDS[1] in verify(cache).incomplete
    run(ear, tar, cache)
    assert content(cache) == whole


# --- crash safety ----------------------------------------------------------------------------------------------------


def command(ear: Path, tar: Path, cache: Path) -> list[str]:
    options = {"--teacher": ear, "--data": tar, "--cache": cache, "--targets": "mean,layers", "--storage": "float32"}
    options |= {"--compute": "float32", "--rows-per-block": 16, "--max-seconds": 2, "--device": "cpu", "--threads": 1}
    options |= {"--batch-size": 1}
    return ["-m", "emkum.cli", "extract", *(str(word) for pair in options.items() for word in pair)]


def start(ear: Path, tar: Path, cache: Path) -> Running:
    import subprocess
    import sys
    import time

    log = cache.with_name(f"{cache.name}-{time.monotonic_ns()}.log")
    with log.open("wb") as handle:
        process = subprocess.Popen(
            [sys.executable, *command(ear, tar, cache)],
            stdout=handle,
            stderr=handle,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return Running(process, log)


def receipts(cache: Path) -> int:
    return len(list((cache / "_emkum/receipts").rglob("*.json")))


def test_a_killed_run_is_continued_to_the_same_bytes(ear: Path, tmp_path: Path) -> None:
    tar = sounds_tar(tmp_path / "k.tar", 64, shortest=1.5, longest=2.0)
    through = start(ear, tar, tmp_path / "through")
    assert through.wait() == 0, through.text()
    killed = tmp_path / "killed"
    running = start(ear, tar, killed)
    assert running.wait_for(lambda: receipts(killed) >= 1), running.text()
    running.kill()
    committed = {path: data for path, data in content(killed).items() if "receipts" in path}
    assert 1 <= len(committed) < 8
    again = start(ear, tar, killed)
    assert again.wait() == 0, again.text()
    assert content(killed) == content(tmp_path / "through")
    assert not verify(killed).findings


def test_a_segment_of_sounds_is_known_to_its_own_class() -> None:
    segment = Segment(0, "train", Span(0, 0), Span(0, 0), None, (), {}, "", Span(0, 3))  # type: ignore[arg-type]
    assert segment.span("audio") == Span(0, 3)
    assert segment.tables == {"samples.parquet": 0, "captions.parquet": 0, "sounds.parquet": 3}


def test_the_network_that_is_saved_is_the_one_that_is_named(ear: Path, tmp_path: Path) -> None:
    """A folder of a network of sound, as `save_network` writes it, is a teacher like any other."""
    save_network(load_saved(ear), tmp_path / "copy")
    assert load_saved(tmp_path / "copy").modality == "audio"
