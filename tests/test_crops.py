"""Crops in place of tokens: what `--store-inputs crops` keeps, and what `--from-crops` makes of it without the tars."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from test_extract import make_tar, networks, objects, quiet, tiny_config  # noqa: F401  (a fixture)

from emkum import cli, errors
from emkum.models.passes import FrozenPass
from emkum.shards.digest import digest
from emkum.shards.layout import receipt_path
from emkum.shards.reader import Cache
from emkum.shards.verify import verify
from emkum.shards.views import Box, replay_view
from emkum.stage1_extract import extract as extract_module
from emkum.stage1_extract import fields, live_check, pictures, plan
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.encode import Output, encode_outputs

CROPS, BOXES = "image/crops-16", "views/crop-0.9-1.0-seed-0/boxes"
OTHER = "teacher/other/image/cls"


@pytest.fixture
def config(tmp_path: Path, networks: Path) -> ExtractConfig:  # noqa: F811
    """40 pictures and 80 captions in two tars, blocks of 16 rows: the crops and vit's targets."""
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars" / "a.tar", 24)
    make_tar(tmp_path / "tars" / "b.tar", 16, seed=1)
    return tiny_config(tmp_path, networks, cut=0, store_inputs="crops")


def further(config: ExtractConfig, networks: Path, **changes: Any) -> ExtractConfig:  # noqa: F811
    """The teacher `other` on the tars, without a student's input."""
    teacher = (str(networks / "other"),)
    return replace(config, teacher=teacher, encoder="none", store_inputs="tokens", text_encoder="none", **changes)


def without_tars(config: ExtractConfig, **changes: Any) -> ExtractConfig:
    """The same from the cache's crops. The tars are gone, and the crops' size is not named."""
    for path in config.data:
        shutil.rmtree(path, ignore_errors=True)
    return replace(config, from_crops=True, data=(), encoder=None, size=None, **changes)


def in_another_cache(config: ExtractConfig, name: str) -> ExtractConfig:
    """A copy of the cache, and of the tars."""
    root = Path(config.cache).with_name(name)
    shutil.copytree(config.cache, root / "cache")
    shutil.copytree(config.data[0], root / "tars")
    return replace(config, cache=root / "cache", data=(str(root / "tars"),))


def forget(cache: Path | str, field: str, block: int, view: int = 0) -> None:
    (Path(cache) / receipt_path(field, block, view)).unlink()


# --- what is kept ------------------------------------------------------------------------------------------


def test_crops_are_the_pixels_that_the_networks_saw(config: ExtractConfig) -> None:
    lines = quiet(replace(config, views=2))
    cache = Cache.open(config.cache)
    assert sorted(name for name in cache.fields if not name.startswith("teacher/")) == [CROPS, "text/text/ids", BOXES]
    field, boxes = cache.field(CROPS), cache.field(BOXES)
    assert (field.kind, field.storage, field.row_shape, field.num_views) == ("crops", "uint8", (16, 16, 3), 2)
    assert {key: value for key, value in field.fingerprint.items() if value is not None} == {
        "kind": "crops", "storage": "uint8", "row_shape": [16, 16, 3], "format": 1, "size": 16,
        "decoder": "pillow-bicubic-draft2/1",
    }  # fmt: skip
    expected = []
    for view in (0, 1):
        for row, sample in enumerate(cache.samples("train").to_pylist()):
            data = (Path(config.data[0]) / sample["tar"]).read_bytes()[sample["offset"] :][: sample["size"]]
            expected.append(replay_view(data, 16, Box.from_row(boxes.read(np.array([row]), view)[0])))
    stored = np.concatenate([field.read(np.arange(40), view) for view in (0, 1)])
    np.testing.assert_array_equal(stored, expected)
    assert not np.array_equal(stored[:40], stored[40:])
    plain = zarr.open_array(Path(config.cache) / CROPS / "values", mode="r")
    np.testing.assert_array_equal(np.asarray(plain[:40]).swapaxes(0, 1).reshape(stored.shape), stored)
    receipt = field.receipts[2, 1]
    said = {"min": stored[72:].min(), "max": stored[72:].max(), "mean": stored[72:].mean()}
    assert receipt.statistics == pytest.approx(said)
    assert receipt.error is None
    assert verify(cache.store).findings == ()
    # 80 rows of 768 bytes and a checksum, in 6 blocks with an index of 16 entries.
    num_bytes = 80 * (16 * 16 * 3 + 4) + 6 * (16 * 16 + 4)
    assert field.num_bytes == num_bytes
    assert f"  {CROPS}: 80 rows, {num_bytes / 1000:.1f} kB as uint8" in lines


def test_the_encoder_is_kept_though_no_field_of_it_is(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    quiet(replace(config, encoder=str(networks / "other")))
    cache = Cache.open(config.cache)
    assert cache.models == ["other", "text"]
    assert [name for name in cache.fields if "other" in name] == []


def test_a_text_teacher_and_an_encoder_give_crops_without_any_picture_network_run(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FrozenPass, "pictures", None)
    quiet(replace(config, teacher=(str(networks / "text"),), encoder=str(networks / "vit"), text_encoder=None))
    cache = Cache.open(config.cache)
    assert sorted(cache.fields) == [CROPS, "teacher/text/text/layers", "text/text/ids", BOXES]
    assert len(cache.field(CROPS).rows("train")) == 40


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"cut": 6},
            "UsageError: --store-inputs crops with --cut 6 | crops serve every cut: leave --cut out, and choose it in "
            "training with --set data.cut=6",
        ),
        (
            {"encoder": "none"},
            "UsageError: --store-inputs crops with --encoder none | name the encoder that training starts from, or "
            "leave --store-inputs out to keep targets only",
        ),
        ({"store_inputs": "pixels"}, "UsageError: --store-inputs pixels | choose tokens (the default) or crops"),
        (
            {"from_crops": True, "data": ("x.tar", "y.tar")},
            "UsageError: --from-crops with --data x.tar y.tar | from the crops of the cache no tar is read: leave one "
            "of them out",
        ),
    ],
)
def test_flags_that_cannot_go_together(config: ExtractConfig, change: dict[str, Any], line: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        replace(config, **change)
    assert caught.value.line() == line


def test_crops_need_a_network_that_fits_them(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    text = replace(config, teacher=(str(networks / "text"),), text_encoder=None)
    with pytest.raises(errors.UsageError, match="--store-inputs crops without a network that reads pictures") as caught:
        quiet(text)
    assert caught.value.way_out == "name the one that training starts from, for example --encoder dinov2-s"
    with pytest.raises(errors.UsageError, match="pictures of 20 x 20 px do not divide into patches of 8 px"):
        quiet(replace(text, encoder=str(networks / "vit"), size=20))
    assert not (Path(config.cache) / "_emkum/fields").exists()


def test_tokens_may_come_beside_crops_and_the_same_command_does_nothing(config: ExtractConfig) -> None:
    quiet(config)
    before = objects(Path(config.cache))
    assert quiet(config)[-1].startswith("nothing to do: ")
    quiet(replace(config, store_inputs="tokens", cut=2))
    after = objects(Path(config.cache))
    assert {name: after[name] for name in before} == before
    assert "image/vit@2/tokens" in Cache.open(config.cache).fields


# --- from crops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_fields_from_crops_are_byte_for_byte_those_from_tars(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
    storage: str,
) -> None:
    make_tar(Path(config.data[0]) / "a.tar", 24, bad=(0, 5, 6, 7, 23))  # rows 0 to 7: a batch of four
    config = replace(config, views=2, max_bad=0.2)
    quiet(config)
    again = in_another_cache(config, "again")
    quiet(further(config, networks, storage=storage, targets=("cls", "layers")))
    lines = quiet(without_tars(further(again, networks, storage=storage, targets=("cls", "layers"))))
    assert any(line.endswith("pictures come from image/crops-16, no tar is read") for line in lines), lines
    assert "seen 40 = 35 ok + 5 quarantined + 0 filtered (pictures)" in lines
    made = objects(Path(again.cache))
    assert made == objects(Path(config.cache))
    assert sum(OTHER in name for name in made) > 12
    assert digest(again.cache) == digest(config.cache)
    receipt = Cache.open(again.cache).field(OTHER).receipts[0, 1]
    assert [(q.row, q.key) for q in receipt.quarantined] == [(i, f"s{i:03d}") for i in (0, 5, 6, 7)]
    assert verify(Cache.open(again.cache).store).findings == ()


def test_what_a_network_cannot_say_is_left_out_alike(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet(config)
    again = in_another_cache(config, "again")
    run = FrozenPass.pictures

    def spoilt(self: FrozenPass, crops: torch.Tensor, *more: Any) -> list[torch.Tensor]:
        outputs = [output.clone() for output in run(self, crops, *more)]
        for output in outputs:
            output[crops[:, 0, 0, 0] > 200] = float("nan")
        return outputs

    monkeypatch.setattr(FrozenPass, "pictures", spoilt)
    wanted = further(config, networks, on_nonfinite="quarantine", max_bad=0.9)
    quiet(wanted)
    quiet(without_tars(further(again, networks, on_nonfinite="quarantine", max_bad=0.9)))
    assert objects(Path(again.cache)) == objects(Path(config.cache))
    assert 1 <= sum(len(r.quarantined) for r in Cache.open(again.cache).field(OTHER).receipts.values()) < 40


def test_several_teachers_and_captions_need_no_tar(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    quiet(config)
    whole = in_another_cache(config, "whole")
    teachers = {"teacher": tuple(str(networks / name) for name in ("other", "tail", "text")), "text_encoder": None}
    quiet(replace(further(whole, networks), **teachers))
    quiet(replace(without_tars(further(config, networks)), **teachers))
    assert objects(Path(config.cache)) == objects(Path(whole.cache))
    fields = Cache.open(config.cache).fields
    assert {"teacher/other/image/patches", "teacher/tail/image/cls", "teacher/text/text/layers"} < set(fields)


def test_captions_alone_need_no_crops(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    quiet(replace(config, store_inputs="tokens"))
    text = replace(config, teacher=(str(networks / "text"),), store_inputs="tokens", text_encoder=None)
    quiet(without_tars(text))
    assert len(Cache.open(config.cache).field("teacher/text/text/layers").rows("train")) == 80


def test_tokens_of_another_encoder_come_from_crops_too(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    quiet(config)
    tokens = further(config, networks)
    whole = in_another_cache(config, "whole")
    other = {"encoder": str(networks / "other"), "cut": 1, "text_encoder": config.text_encoder}
    quiet(replace(tokens, cache=whole.cache, data=whole.data, **other))
    quiet(replace(without_tars(tokens), **other))
    assert objects(Path(config.cache)) == objects(Path(whole.cache))
    assert "image/other@1/tokens" in Cache.open(config.cache).fields


@pytest.mark.parametrize("begun_by", ["crops", "tars"])
def test_each_kind_of_run_finishes_what_the_other_began(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    begun_by: str,
) -> None:
    quiet(config)
    mixed = in_another_cache(config, "mixed")
    tars, crops = further(mixed, networks), replace(further(mixed, networks), from_crops=True, data=(), size=None)
    run, calls = FrozenPass.pictures, 0

    def limited(self: FrozenPass, *inputs: Any) -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls > 5:  # one for the shapes, two for a block of 16
            raise errors.Interrupted("stopped")
        return run(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenPass, "pictures", limited)
        with pytest.raises(errors.Interrupted):
            quiet(crops if begun_by == "crops" else tars)
    assert 1 <= len(Cache.open(mixed.cache).field(OTHER).receipts) < 3
    lines = quiet(tars if begun_by == "crops" else crops)
    assert any("committed rows computed again agree with the cache" in line for line in lines)
    quiet(further(config, networks))
    assert objects(Path(mixed.cache)) == objects(Path(config.cache))


def test_the_same_command_again_from_crops_does_nothing(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    quiet(config)
    wanted = without_tars(further(config, networks))
    quiet(wanted)
    before = objects(Path(config.cache))
    assert quiet(wanted)[-1].startswith("nothing to do: ")
    assert objects(Path(config.cache)) == before


def test_several_views_and_splits(config: ExtractConfig, networks: Path, tmp_path: Path) -> None:  # noqa: F811
    quiet(replace(config, views=2))
    (tmp_path / "val").mkdir()
    make_tar(tmp_path / "val" / "v.tar", 20, seed=7)
    val = replace(config, split="val", data=(str(tmp_path / "val"),))
    quiet(val)
    whole = in_another_cache(config, "whole")
    shutil.copytree(tmp_path / "val", tmp_path / "whole" / "val")
    for split in ({"split": "val", "data": (str(tmp_path / "whole" / "val"),)}, {"views": 2}):
        quiet(further(replace(whole, **split), networks, storage="int8"))
    for split in ({"split": "val"}, {"views": 2}):
        quiet(without_tars(further(replace(config, **split), networks, storage="int8")))
    made, expected = (objects(Path(cache)) for cache in (config.cache, whole.cache))
    assert made.keys() == expected.keys()  # runs from tars also widen the metadata of the boxes
    assert [n for n in made if made[n] != expected[n] and not n.startswith(f"{BOXES}/values/zarr")] == []
    assert digest(config.cache) == digest(whole.cache)
    field = Cache.open(config.cache).field(OTHER)
    assert (len(field.rows("train", 1)), len(field.rows("val"))) == (40, 20)


def test_workers_share_the_crops(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    quiet(config)
    whole = in_another_cache(config, "whole")
    quiet(further(whole, networks))
    quiet(without_tars(further(config, networks), workers=2))
    made = {name: data for name, data in objects(Path(config.cache)).items() if "claims" not in name}
    assert made == objects(Path(whole.cache))


def test_a_batch_is_read_at_once_and_no_tar_is_opened(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet(config)
    monkeypatch.setattr(pictures, "read_member", None)
    monkeypatch.setattr(plan, "find_tars", None)
    kept: list[int] = []
    from_crops = pictures.from_crops

    def noted(field: Any) -> pictures.PictureSource:
        source = from_crops(field)

        def look(task: Any, some: Any) -> list[pictures.Decoded]:
            kept.append(len(some))
            return source.look(task, some)

        return replace(source, look=look)

    monkeypatch.setattr(pictures, "from_crops", noted)
    quiet(without_tars(further(config, networks)))
    assert kept == [8] * 5


# --- what is wrong -----------------------------------------------------------------------------------------


def test_what_is_said_when_the_crops_are_not_there(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    other = str(networks / "other")
    wanted = replace(further(config, networks), from_crops=True, data=(), size=None)
    with pytest.raises(errors.NotACache):
        quiet(wanted)
    quiet(replace(config, store_inputs="tokens"))
    command = f"emkum extract --cache {config.cache} --split train --data <tars> --teacher {other} --store-inputs crops"
    command += " --text-encoder none --storage float32 --compute float32 --max-tokens 16"
    with pytest.raises(errors.MissingField) as caught:
        quiet(wanted)
    assert caught.value.what == f"{config.cache} keeps no crops to extract from"
    assert caught.value.way_out == f"make them from the tars: {command} --size 16"
    quiet(config)
    with pytest.raises(errors.MissingField) as caught:
        quiet(replace(wanted, size=24))
    assert caught.value.what == f"{config.cache} keeps crops of 16 px; this run asks for --size 24"
    assert caught.value.way_out == (
        "leave --size out: crops of another size are other crops, and can only be made from the tars"
    )
    with pytest.raises(errors.NoData) as empty:
        quiet(replace(wanted, split="val"))
    assert empty.value.what == f"{config.cache} has no split val; it has: train"
    assert "--data in place of --from-crops" in empty.value.way_out
    with pytest.raises(errors.IdentityMismatch, match=r"views crop-0\.9-1\.0-seed-0; this run asks for crop-0\.5"):
        quiet(replace(wanted, crop=(0.5, 1.0)))


def test_crops_of_two_sizes_must_be_told_apart(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    quiet(config)
    quiet(replace(config, size=24, teacher=(str(networks / "other"),), encoder=str(networks / "vit")))
    with pytest.raises(errors.UsageError) as caught:
        quiet(without_tars(replace(further(config, networks), teacher=(str(networks / "tail"),))))
    assert caught.value.line() == (
        f"UsageError: {config.cache} keeps crops of 16 px and 24 px | choose one, for example --size 16"
    )
    quiet(replace(without_tars(further(config, networks)), teacher=(str(networks / "tail"),), size=24))
    assert Cache.open(config.cache).field("teacher/tail/image/patches").row_shape == (9, 16)


def test_blocks_without_crops_are_refused_with_the_command_that_makes_them(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
) -> None:
    quiet(config)
    for block in (1, 2):
        forget(config.cache, CROPS, block)
    before = objects(Path(config.cache))
    wanted = replace(further(config, networks), from_crops=True, data=(), size=None)
    with pytest.raises(errors.IncompleteCache) as caught:
        quiet(wanted)
    assert caught.value.exit_code == 2
    assert caught.value.what == (
        f"{config.cache} lacks {CROPS} of 2 of the 3 blocks to extract, the first block 1 view 0"
    )
    assert objects(Path(config.cache)) == before
    command = caught.value.way_out.removeprefix("finish them from the tars: ").replace("<tars>", config.data[0])
    assert cli.run([*command.split()[1:], "--batch-size", "8"]) == 0
    quiet(without_tars(further(config, networks)))
    with pytest.raises(errors.IncompleteCache, match="of 3 of the 3 blocks to extract, the first block 0 view 1"):
        quiet(replace(wanted, views=2))


def test_crops_that_another_decoder_made_keep_its_name(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fields, "DECODER", "another/1")
        quiet(config)
    wanted = replace(further(config, networks), from_crops=True, data=(), size=None)
    quiet(wanted)
    assert Cache.open(config.cache).field(OTHER).fingerprint["decoder"] == "another/1"
    with pytest.raises(errors.FingerprintMismatch, match=r"decoder another/1 in the cache, pillow-.* asked for"):
        quiet(further(config, networks))


def test_a_damaged_crop_stops_the_run(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    quiet(config)
    path = Path(config.cache) / CROPS / "values" / "c.1.0.0.0.0"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.CorruptCache, match="fails its checksum"):
        quiet(without_tars(further(config, networks)))


# --- committed rows computed again -------------------------------------------------------------------------


def tamper(cache: Path | str, name: str, block: int) -> None:
    """Commits a block again with its rows turned by one."""
    from test_probe import tamper as in_another_order

    in_another_order(Path(cache), name, lambda rows: np.roll(rows, 1), block)


def test_a_run_from_crops_compares_committed_rows_first(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    quiet(config)
    quiet(further(config, networks))
    wanted = without_tars(further(config, networks))
    for name in (OTHER, "teacher/other/image/patches"):
        forget(config.cache, name, 1)
    lines = quiet(wanted)
    assert any(line.startswith("8 committed rows computed again agree with the cache") for line in lines)
    tamper(config.cache, OTHER, 0)
    for name in (OTHER, "teacher/other/image/patches"):
        forget(config.cache, name, 1)
    with pytest.raises(errors.IdentityMismatch, match=rf"field {OTHER}, row [0-9]+ \(a\.tar/s0"):
        quiet(wanted)


def test_a_run_from_tars_compares_the_crops_to_the_last_bit(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(config)
    make_tar(Path(config.data[0]) / "c.tar", 5, seed=5)
    decode = pictures.decode_view

    def one_level_brighter(*arguments: Any) -> tuple[np.ndarray, Box]:
        crop, box = decode(*arguments)
        return np.where(crop == 100, 101, crop).astype(np.uint8), box

    monkeypatch.setattr(pictures, "decode_view", one_level_brighter)
    with pytest.raises(errors.IdentityMismatch) as caught:
        quiet(config)
    assert re.search(
        rf"field {CROPS}, row \d+ \(.*\): \d+ of its 768 numbers are other ones when decoded now, by up to 1 ",
        caught.value.what,
    )
    monkeypatch.setattr(pictures, "decode_view", decode)
    assert any("agree with the cache" in line for line in quiet(config))


def test_verify_computes_rows_again_from_crops_where_tars_are_gone(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    quiet(config)
    wanted = live_check.SampleConfig(rows=100, teacher=(str(networks / "vit"),), device="cpu")
    loaded = live_check.load_teachers(config.cache, wanted)
    from_tars = {sample.field: sample for sample in live_check.check_sample(config.cache, wanted, loaded).fields}
    assert from_tars[CROPS].rows == from_tars[BOXES].rows == 40
    (Path(config.data[0]) / "a.tar").unlink()
    report = live_check.check_sample(config.cache, wanted, loaded)
    found = {sample.field: sample for sample in report.fields}
    assert found["teacher/vit/image/cls"].rows == 40
    assert found[CROPS].rows == found[BOXES].rows == 16  # crops are not compared with themselves
    assert not any(sample.wrong for sample in report.fields)
    assert (report.absent, report.from_crops) == (("a.tar",), True)
    shutil.rmtree(config.data[0])
    capsys.readouterr()
    arguments = ["cache", "verify", str(config.cache), "--sample", "9", "--teacher", str(networks / "vit")]
    assert cli.run([*arguments, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "pictures from the cache's crops for 2 tars that are not at hand: a.tar, b.tar" in shown
    tamper(config.cache, "teacher/vit/image/cls", 2)
    assert cli.run([*arguments, "--device", "cpu", "--json"]) == 4
    sample = json.loads(capsys.readouterr().out)["sample"]
    assert sample["absent_tars_from_crops"] is True
    assert sample["agrees"] is False


def test_crops_that_are_not_those_of_the_pictures_are_found(config: ExtractConfig, networks: Path) -> None:  # noqa: F811
    quiet(config)
    tamper(config.cache, CROPS, 1)
    wanted = live_check.SampleConfig(rows=100, teacher=(str(networks / "vit"),), device="cpu")
    report = live_check.check_sample(config.cache, wanted, live_check.load_teachers(config.cache, wanted))
    wrong = {sample.field: {found.place.row for found in sample.wrong} for sample in report.fields if sample.wrong}
    assert wrong == {CROPS: set(range(16, 32))}


# --- the loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_a_batch_is_waited_for_once_the_next_one_is_queued(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    done: list[str] = []
    encode = extract_module.encode_outputs

    def noted(*arguments: Any) -> Callable[[], Any]:
        number = sum(word.startswith("start") for word in done)
        done.append(f"start {number}")
        wait = encode(*arguments)

        def waited() -> Any:
            done.append(f"wait {number}")
            return wait()

        return waited

    monkeypatch.setattr(extract_module, "encode_outputs", noted)
    config = replace(config, teacher=(str(networks / kind),), batch_size=16, store_inputs="tokens")
    quiet(replace(config, text_encoder=None if kind == "text" else "none", encoder=None if kind == "vit" else "none"))
    num = 3 if kind == "vit" else 5
    expected = ["start 0", *(word for i in range(1, num) for word in (f"start {i}", f"wait {i - 1}"))]
    assert done == [*expected, f"wait {num - 1}"]


WAITING = ("tolist", "item", "cpu", "__bool__", "__float__", "__int__", "nonzero", "masked_select")


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_nothing_that_waits_for_a_device_is_called_while_a_batch_is_started(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
) -> None:
    """On a GPU each of these would let the device run empty (tests/test_gpu.py asks CUDA itself)."""
    made: dict[str, int] = {"_start_pictures": 0, "_start_captions": 0}

    def refuse(*arguments: Any) -> None:
        raise AssertionError("this waits for the device")

    for name in made:
        start = getattr(extract_module, name)

        def strict(*arguments: Any, start: Any = start, name: str = name) -> Any:
            made[name] += 1
            with monkeypatch.context() as patch:
                for method in WAITING:
                    patch.setattr(torch.Tensor, method, refuse, raising=False)
                return start(*arguments)

        monkeypatch.setattr(extract_module, name, strict)
    quiet(
        replace(
            config,
            teacher=(str(networks / "vit"), str(networks / "text")),
            text_encoder=None,
            targets=("cls", "layers", "patches"),
            storage=storage,
            store_inputs="tokens",
            cut=2,
        )
    )
    assert made == {"_start_pictures": 5, "_start_captions": 10}


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_fields_encoded_together_are_those_encoded_alone(storage: str) -> None:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw) for shape in ((6, 5, 8), (6, 8), (6, 4, 8))]
    length = np.array([1, 4, 2, 3, 4, 1], np.int32)
    statistics = torch.randn(8, generator=draw), torch.rand(8, generator=draw) + 0.5
    names = list("abcdef")
    outputs = [Output(f"f{i}", v, storage, names, statistics) for i, v in enumerate(values[:2])]
    outputs.append(Output("f2", values[2], storage, names, statistics, length))
    values[1][3, 2] = float("inf")
    values[2][0, 1:] = float("nan")  # past the length: padding is never stored
    together = encode_outputs(outputs, "quarantine")()
    assert {name: rows.refused for name, rows in together.items()} == {
        "f0": {}, "f1": {3: "1 values are inf or NaN"}, "f2": {},
    }  # fmt: skip
    for output in outputs:
        alone, rows = encode_outputs([output], "quarantine")()[output.field], together[output.field]
        np.testing.assert_array_equal(rows.encoded.values, alone.encoded.values)
        assert rows.encoded.summary == alone.encoded.summary
    real = values[2][torch.from_numpy(np.arange(4) < length[:, None])]
    summary = together["f2"].encoded.summary
    assert summary.count == real.numel()
    assert (summary.minimum, summary.maximum) == (float(real.min()), float(real.max()))


def test_the_command_line_takes_both_flags(config: ExtractConfig, networks: Path, tmp_path: Path) -> None:  # noqa: F811
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "emkum.cli", "extract", "--cache", "c", "--text-encoder", "none", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    made = run("--teacher", str(networks / "vit"), "--data", "tars", "--size", "16", "--store-inputs", "crops")
    assert made.returncode == 0, made.stderr
    shutil.rmtree(tmp_path / "tars")
    added = run("--teacher", str(networks / "other"), "--from-crops")
    assert added.returncode == 0, added.stderr
    assert len(Cache.open(tmp_path / "c").field(OTHER).rows("train")) == 40
    refused = run("--teacher", str(networks / "other"), "--from-crops", "--data", "tars")
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("no tar is read: leave one of them out")


# --- training ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory, networks: Path) -> Path:  # noqa: F811
    """A cache in float32 that keeps the crops and, of the same views, tokens at cuts 0 and 2; splits train and val."""
    folder = tmp_path_factory.mktemp("training")
    for split, num in (("train", 24), ("val", 10)):
        (folder / split).mkdir()
        make_tar(folder / split / f"{split}.tar", num, seed=num)
        config = tiny_config(folder, networks, split=split, data=(str(folder / split),), targets=("cls", "layers"))
        config = replace(config, views=2 if split == "train" else 1, flip=split == "train")
        quiet(replace(config, cut=0, store_inputs="crops"))
        for cut in (0, 2):
            quiet(replace(config, cut=cut, targets=("cls",)))
    return folder


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("recipe", ["ssmke", "image-kd"])
def test_training_from_crops_is_training_from_tokens(
    trained_on: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, cut: int
) -> None:
    from emkum.stage2_train.evaluate.run import Settings, evaluate_cache
    from emkum.stage2_train.loader import CachedSource
    from emkum.stage2_train.run_folder import load_run
    from emkum.stage2_train.train import TrainConfig, train

    seen: list[list[int]] = []
    prepare = CachedSource.prepare

    def noted(self: CachedSource, host: Any, device: torch.device) -> Any:
        seen.append([*host.rows.image_rows_B.tolist(), *host.rows.views_B.tolist()])
        return prepare(self, host, device)

    monkeypatch.setattr(CachedSource, "prepare", noted)
    losses, scores, rows = [], [], []
    for inputs in (f"image/vit@{cut}/tokens", CROPS):
        own = ["data.encoder=vit", f"data.cut={cut}"] if inputs == CROPS else []
        wanted = (f"data.inputs={inputs}", "training.batch=8", "student.image_blocks=2", *own)
        run_dir = tmp_path / inputs.replace("/", "_")
        cache = trained_on / "cache"
        config = TrainConfig(cache, recipe, wanted, run_dir, precision="float32", device="cpu", log_every=1)
        train(replace(config, max_steps=12), say=lambda line: None)
        lines = [line.split(",") for line in (run_dir / "metrics.csv").read_text().splitlines()]
        column = lines[0].index("loss")
        losses.append([float(line[column]) for line in lines[1:] if line[column]])
        rows.append(seen.copy())
        seen.clear()
        scores.append(evaluate_cache(load_run(run_dir), settings=Settings(batch_size=4, device="cpu")))
        seen.clear()
    assert rows[0] == rows[1]
    assert {view for batch in rows[0] for view in batch[len(batch) // 2 :]} == {0, 1}
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(set(losses[0])) == 12
    assert numbers(scores[1]) == pytest.approx(numbers(scores[0]), rel=1e-5)
    assert numbers(scores[0])


def numbers(found: Any) -> list[float]:
    """All numbers of nested dictionaries and lists, in order."""
    if isinstance(found, dict):
        return [number for key in sorted(found) for number in numbers(found[key])]
    if isinstance(found, list | tuple):
        return [number for part in found for number in numbers(part)]
    return [float(found)] if isinstance(found, int | float) and not isinstance(found, bool) else []


def test_live_training_runs_the_encoder_in_front_of_crops_as_cached_training_does(
    trained_on: Path, tmp_path: Path
) -> None:
    from emkum.stage2_train.train import TrainConfig, train

    wanted = (f"data.inputs={CROPS}", "data.encoder=vit", "data.cut=2", "training.batch=8")
    found = []
    for live in (False, True):
        config = TrainConfig(
            trained_on / "cache", "ssmke", wanted, tmp_path / str(live), precision="bfloat16", device="cpu", live=live
        )
        train(replace(config, max_steps=4, log_every=1), say=lambda line: None)
        lines = [line.split(",") for line in (tmp_path / str(live) / "metrics.csv").read_text().splitlines()]
        column = lines[0].index("loss")
        found.append([float(line[column]) for line in lines[1:] if line[column]])
    assert found[1] == pytest.approx(found[0], rel=1e-6)  # in float32 the encoder would say something else


def test_what_training_says_of_crops_that_are_missing_can_be_run(
    config: ExtractConfig,
    networks: Path,  # noqa: F811
) -> None:
    from emkum.stage2_train.recipe import load_recipe
    from emkum.stage2_train.recipe_fields import required_fields

    quiet(replace(config, targets=("patches",)))
    with pytest.raises(errors.MissingField) as caught:
        required_fields(load_recipe("ssmke"), Cache.open(config.cache))
    command = caught.value.way_out.removeprefix("make it: ")
    source = Cache.open(config.cache).field("text/text/ids").record["environment"]["source"]
    assert command == (
        f"emkum extract --cache {config.cache} --split train --from-crops --teacher <image network> --targets cls "
        f"--text-encoder {source} --max-tokens 16"
    )
    shutil.rmtree(config.data[0])
    words = (
        command.replace("<image network>", str(networks / "vit")).replace(source, str(networks / "text")).split()[1:]
    )
    assert cli.run([*words, "--storage", "float32", "--device", "cpu"]) == 0
    with pytest.raises(errors.MissingField) as caught:
        required_fields(load_recipe("ssmke", ["data.encoder=other"]), Cache.open(config.cache))
    assert caught.value.what == "the cache keeps no network other (it keeps text, vit)"
    words = caught.value.way_out.removeprefix("keep it: ").replace(" other", f" {networks / 'other'}").split()[1:]
    assert cli.run([*words, "--storage", "float32", "--device", "cpu"]) == 0
    chosen = ["data.encoder=other", "data.cut=2", "data.targets=teacher/vit/image/cls"]
    found = required_fields(load_recipe("ssmke", chosen), Cache.open(config.cache))
    assert (found.inputs, found.encoder, found.cut) == (CROPS, "other", 2)
    with pytest.raises(errors.MissingField) as caught:
        required_fields(load_recipe("ssmke", ["data.inputs=image/crops-32"]), Cache.open(config.cache))
    assert "--data <tars> --teacher <image network> --store-inputs crops --size 32 " in caught.value.way_out
