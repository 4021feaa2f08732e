"""Committed rows computed again: at resume, and by `emkum cache verify --sample`."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from test_extract import make_tar, quiet, tiny_config, word_tokenizer
from tiny_cache import tiny_network

import emkum
from emkum import cli, errors
from emkum.models import targets
from emkum.models.network import load_saved, normalise, save_network, weights_digest
from emkum.models.passes import FrozenPass
from emkum.shards.claims import Claims
from emkum.shards.codec import Encoded, Summary
from emkum.shards.layout import receipt_path
from emkum.shards.reader import Cache
from emkum.shards.writer import CacheWriter
from emkum.stage1_extract import extract as extract_module
from emkum.stage1_extract import live_check, probe
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract

BOXES = "views/crop-0.9-1.0-seed-0/boxes"
IMAGE_FIELDS = ("image/vit@2/tokens", "teacher/vit/image/cls", "teacher/vit/image/layers", BOXES)
TEXT_FIELDS = ("teacher/text/text/cls", "teacher/text/text/layers", "text/text/ids")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny networks: vit, other (other weights), stranger (a network of no field), text."""
    root = tmp_path_factory.mktemp("networks")
    save_network(tiny_network("vit", "image"), root / "vit")
    save_network(tiny_network("vit", "image", seed=9), root / "other")
    save_network(tiny_network("stranger", "image", seed=4), root / "stranger")
    text = replace(tiny_network("text", "text"), tokenizer=word_tokenizer())
    save_network(replace(text, weights_sha256=weights_digest(text.backbone)), root / "text")
    return root


@pytest.fixture
def config(tmp_path: Path, networks: Path) -> ExtractConfig:
    """40 pictures and 80 captions in two tars, blocks of 16 rows: 3 of pictures, 5 of captions."""
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars" / "a.tar", 24)
    make_tar(tmp_path / "tars" / "b.tar", 16, seed=1)
    return tiny_config(
        tmp_path,
        networks,
        teacher=(str(networks / "vit"), str(networks / "text")),
        text_encoder=None,
        targets=("cls", "layers"),
    )


def forget(cache: Path, block: int, view: int = 0, fields: tuple[str, ...] = (*IMAGE_FIELDS, *TEXT_FIELDS)) -> None:
    """Drops the receipts of a block, so that it counts as never committed."""
    for name in fields:
        (cache / receipt_path(name, block, view)).unlink()


def everything(cache: Path) -> dict[str, bytes]:
    """Every file but claims."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and "claims" not in path.parts
    }


def tamper(cache: Path, name: str, change: Callable[[np.ndarray], np.ndarray], block: int = 0) -> None:
    """Commits a block again with its rows in another order: checksums and receipt are valid, the rows are not.

    change: row numbers within the block -> which of the old rows lie there now.
    """
    field = Cache.open(cache).field(name)
    receipt = field.receipts[block, 0]
    rows = receipt.first_row + change(np.arange(receipt.rows))
    lengths = field.lengths(rows) if field.spec.has_length else None
    scale = field.read_scale(rows) if field.storage == "int8" else None
    stored = Encoded(field.read(rows), scale, lengths, Summary())
    (cache / receipt_path(name, block, 0)).unlink()
    writer = CacheWriter(cache)
    with writer.block(field.spec, writer.segments[receipt.segment], block, 0) as target:
        target.append(stored)
        target.commit()


# --- before a run adds to a cache --------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_a_resumed_run_computes_a_few_committed_rows_again(config: ExtractConfig, storage: str) -> None:
    config = replace(config, storage=storage, views=2)
    quiet(config)
    before = everything(config.cache)
    forget(config.cache, 2, 1, IMAGE_FIELDS)
    forget(config.cache, 4, 0, TEXT_FIELDS)
    lines = quiet(replace(config, batch_size=5, threads=1))
    said = [line for line in lines if line.startswith("16 committed rows computed again agree with the cache")]
    assert len(said) == 1
    assert ("lowest cosine 1.0000" if storage != "int8" else "lowest cosine 0.9999") in said[0]
    assert everything(config.cache).keys() == before.keys()


def test_it_costs_one_batch_of_each_modality(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(config)
    forget(config.cache, 1)
    batches: dict[str, list[int]] = {"pictures": [], "texts": []}
    for method, sizes in batches.items():
        original = getattr(FrozenPass, method)

        def counted(self, inputs, *more, original=original, sizes=sizes):  # type: ignore[no-untyped-def]
            sizes.append(len(inputs))
            return original(self, inputs, *more)

        monkeypatch.setattr(FrozenPass, method, counted)
    quiet(config)
    # One to learn the shapes; the check; the block of 16 rows in batches of 8.
    assert batches == {"pictures": [1, 8, 8, 8], "texts": [1, 8, 8, 8]}


def test_the_rows_come_from_every_block_and_view_of_the_fields(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(replace(config, views=2))
    forget(config.cache, 2, 1, IMAGE_FIELDS)
    forget(config.cache, 0, 0, ("teacher/text/text/cls",))
    drawn = spy(monkeypatch)
    quiet(replace(config, views=2))
    pictures = [found for found in drawn if found.field == "image/vit@2/tokens"]
    assert {(found.place.row // 16, found.place.view) for found in pictures} == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)}
    assert {found.field for found in drawn} == {*IMAGE_FIELDS, *TEXT_FIELDS}
    assert {found.place.row // 16 for found in drawn if found.field == "text/text/ids"} == {0, 1, 2, 3, 4}
    assert 0 not in {found.place.row // 16 for found in drawn if found.field == "teacher/text/text/cls"}


def spy(monkeypatch: pytest.MonkeyPatch) -> list[probe.Compared]:
    """Collects every comparison from now on."""
    drawn: list[probe.Compared] = []
    recompute = probe.recompute

    def noted(*arguments):  # type: ignore[no-untyped-def]
        for found in recompute(*arguments):
            drawn.append(found)
            yield found

    monkeypatch.setattr(probe, "recompute", noted)
    return drawn


@pytest.mark.parametrize("name", [*IMAGE_FIELDS, *TEXT_FIELDS])
def test_rows_in_another_order_are_found_whatever_their_checksums_say(config: ExtractConfig, name: str) -> None:
    quiet(config)
    tamper(config.cache, name, lambda rows: np.roll(rows, 1))
    forget(config.cache, 1)
    before = everything(config.cache)
    with pytest.raises(errors.IdentityMismatch) as caught:
        quiet(config)
    assert caught.value.exit_code == 5
    assert f"field {name}, row " in caught.value.what
    assert "(a.tar/s0" in caught.value.what
    assert everything(config.cache) == before


def test_other_pixels_from_the_same_files_are_refused_before_new_tars_are_added(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(config)
    before = everything(config.cache)
    make_tar(Path(config.data[0]) / "c.tar", 5, seed=5)
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, resample=None, box=None: resize(self, size, Image.Resampling.BILINEAR, box=box),
    )
    with pytest.raises(errors.IdentityMismatch) as caught:
        quiet(config)
    assert type(caught.value) is errors.IdentityMismatch
    assert "its cosine with the row computed now is 0." in caught.value.what or "differs by" in caught.value.what
    versions = f"emkum {emkum.__version__}, torch {torch.__version__}, pillow {PIL.__version__}, device cpu"
    assert f"made with {versions}, computed again with {versions}" in caught.value.what
    assert "nothing was changed" in caught.value.way_out
    assert everything(config.cache) == before
    assert len(Cache.open(config.cache).segments) == 1


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        (
            "pictures",
            lambda t: t * torch.linspace(0.7, 1.3, t.shape[-1]),
            "its cosine with the row computed now is 0.9",
        ),
        ("pictures", lambda t: t * 1.05, "a number differs by"),  # the cosine cannot see this one
        ("texts", lambda t: t * 1.05, "a number differs by"),
        ("pictures", lambda t: t * float("nan"), "it holds inf or NaN when computed now"),
    ],
)
def test_networks_that_say_something_else_now_are_refused(
    config: ExtractConfig,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    words: str,
) -> None:
    quiet(config)
    forget(config.cache, 1)
    before = everything(config.cache)
    original = getattr(FrozenPass, method)
    monkeypatch.setattr(FrozenPass, method, lambda self, *inputs: [change(out) for out in original(self, *inputs)])
    with pytest.raises(errors.IdentityMismatch) as caught:
        quiet(config)
    assert words in caught.value.what
    assert everything(config.cache) == before


def test_numbers_within_the_noise_of_other_hardware_pass(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(config)
    forget(config.cache, 1)
    pictures = FrozenPass.pictures
    draw = torch.Generator().manual_seed(0)

    def noisy(self: FrozenPass, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [out * (1 + 1e-3 * torch.randn(out.shape, generator=draw)) for out in pictures(self, *inputs)]

    monkeypatch.setattr(FrozenPass, "pictures", noisy)
    assert any("agree with the cache (lowest cosine 0.99999" in line for line in quiet(config))


def test_without_a_committed_row_or_a_missing_block_nothing_is_computed(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("rows were computed again")

    monkeypatch.setattr(extract_module, "check_committed", never)
    quiet(config)
    assert quiet(config)[-1].startswith("nothing to do: ")


def test_a_process_that_joins_others_checks_too_unless_its_command_just_has(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(config)
    forget(config.cache, 1)
    drawn = spy(monkeypatch)
    with Claims(CacheWriter(config.cache).store) as others:
        with others.planning(join=False):
            pass
        extract(replace(config, join=True), say=lambda line: None, checked=True)
        assert not drawn
        forget(config.cache, 1)
        quiet(replace(config, join=True))
        assert drawn


def test_rows_of_tars_that_are_gone_are_passed_over(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(config)
    val = make_tar(tmp_path / "val.tar", 20, seed=7)
    quiet(replace(config, split="val", data=(str(val),)))
    drawn = spy(monkeypatch)
    make_tar(tmp_path / "val2.tar", 3, seed=8)
    quiet(replace(config, split="val", data=(str(val), str(tmp_path / "val2.tar"))))
    assert {found.tar for found in drawn if found.field == "teacher/vit/image/cls"} == {"a.tar", "b.tar", "val.tar"}
    drawn.clear()
    shutil.rmtree(config.data[0])
    make_tar(tmp_path / "val3.tar", 3, seed=9)
    quiet(replace(config, split="val", data=(str(val), str(tmp_path / "val3.tar"))))
    assert {found.tar for found in drawn if found.field == "teacher/vit/image/cls"} == {"val.tar", "val2.tar"}
    # captions lie in the cache
    assert {"a.tar", "b.tar"} <= {found.tar for found in drawn if found.field == "text/text/ids"}


def test_quarantined_rows_are_never_drawn(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tuple(i for i in range(24) if i not in (3, 20))
    make_tar(Path(config.data[0]) / "a.tar", 24, bad=bad)
    os.remove(Path(config.data[0]) / "b.tar")
    quiet(replace(config, max_bad=1.0))
    make_tar(Path(config.data[0]) / "b.tar", 16, seed=1)
    drawn = spy(monkeypatch)
    quiet(replace(config, max_bad=1.0))
    assert {found.key for found in drawn if found.field in IMAGE_FIELDS} == {"s003", "s020"}


def test_a_tar_with_another_member_in_the_pictures_place_is_named(config: ExtractConfig) -> None:
    quiet(config)
    tar = Path(config.data[0]) / "a.tar"
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        first = opened.getmembers()[0]
    info = tarfile.TarInfo("q000.jpg")
    info.size = first.size
    data[first.offset : first.offset + 512] = info.tobuf()
    tar.write_bytes(bytes(data))
    with pytest.raises(errors.SourceChanged, match=r"holds 'q000.jpg' of .* the cache was made from 's000' of"):
        sample(config, 1000)


@pytest.mark.parametrize(
    "name", ["deep/er/k.jpg", "./k.jpg", "./" + "y" * 94 + ".jpeg", "x" * 120 + ".jpg", "schlüssel.jpg"]
)
def test_members_of_every_kind_of_name_are_recognised(config: ExtractConfig, networks: Path, name: str) -> None:
    for path in Path(config.data[0]).glob("*.tar"):
        path.unlink()
    source = make_tar(Path(config.data[0]).parent / "source.tar", 1, texts=False)
    for i, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(source) as old, tarfile.open(Path(config.data[0]) / f"{i}.tar", "w", format=kind) as new:
            info = old.getmembers()[0]
            content = old.extractfile(info)
            info.name = name
            new.addfile(info, content)
    quiet(replace(config, teacher=config.teacher[:1]))
    report = sample(config, 10, str(networks / "vit"))
    assert [found.rows for found in report.fields] == [2, 2, 2, 2]


# --- emkum cache verify --sample ---------------------------------------------------------------------------


def sample(config: ExtractConfig, rows: int, *teacher: str, **more: object) -> live_check.SampleReport:
    settings = live_check.SampleConfig(rows, teacher or config.teacher, device="cpu", **more)  # type: ignore[arg-type]
    return live_check.check_sample(config.cache, settings, live_check.load_teachers(config.cache, settings))


def verify(capsys: pytest.CaptureFixture[str], config: ExtractConfig, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, last line of stderr) of `emkum cache verify`."""
    capsys.readouterr()
    code = cli.run(["cache", "verify", str(config.cache), "--device", "cpu", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, (shown.err.strip().splitlines() or [""])[-1]


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_a_sound_cache_agrees_with_its_networks(
    config: ExtractConfig, storage: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = replace(config, storage=storage, views=2)
    quiet(config)
    val = make_tar(tmp_path / "val.tar", 20, seed=7)
    quiet(replace(config, split="val", views=1, data=(str(val),)))
    code, out, last = verify(capsys, config, "--sample", "30", "--teacher", *config.teacher, "--json")
    assert code == 0, last
    found = json.loads(out)["sample"]
    assert found["agrees"] is True
    center = "views/center-1.0/boxes"
    assert set(found["fields"]) == {*IMAGE_FIELDS, *TEXT_FIELDS, center}
    for name, field in found["fields"].items():
        if name in (BOXES, center, "text/text/ids"):
            assert field["lowest_cosine"] is None
            assert field["largest_error"] == 0
        else:
            assert field["rows"] == 30
            assert 0.9999 < field["lowest_cosine"] <= field["mean_cosine"] < 1.000001
            assert field["largest_error"] <= field["storage_error"] + 1e-4
            assert (field["storage_error"] > 0) == (storage != "float32")
    assert found["fields"][BOXES]["rows"] + found["fields"][center]["rows"] == 30
    shown = verify(capsys, config, "--sample", "30", "--teacher", *config.teacher)[1]
    assert len([line for line in shown.splitlines() if line.endswith("  agrees")]) == 8


def test_the_cache_may_stand_behind_the_teachers(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet(config)
    monkeypatch.chdir(tmp_path)
    sampling = ["cache", "verify", "--device", "cpu", "--sample", "5", "--teacher", *config.teacher]
    assert cli.run([*sampling, str(config.cache)]) == 0
    assert cli.run([*sampling, "--data", *config.data, str(config.cache)]) == 0
    assert "agrees" in capsys.readouterr().out
    assert cli.run([*sampling, "no-such-cache"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "emkum: UsageError: no cache was named, and there is none in ./shards; every word behind --teacher or --data "
        "belongs to it, unless it is the folder of a cache | name the cache first: emkum cache verify CACHE --sample N "
        "--teacher NAME"
    )


def test_a_cache_in_an_object_store_is_no_teacher_but_weights_on_the_web_are() -> None:
    for place, spread in (("s3://bucket/cache", []), ("https://host/beit2.pth", ["--teacher"])):
        words = ["cache", "verify", "--teacher", "beit2", place]
        assert cli._spread(words) == [*words[:-1], *spread, place]


def test_a_cache_among_the_values_of_a_command_that_names_it_by_a_flag_is_a_value() -> None:
    words = ["extract", "--teacher", "beit2", "--data", "s3://bucket/a.tar", "s3://bucket/b.tar"]
    assert cli._spread(words) == [*words[:-1], "--data", "s3://bucket/b.tar"]


def test_data_without_any_of_the_caches_tars_is_said(config: ExtractConfig, tmp_path: Path) -> None:
    quiet(config)
    other = make_tar(tmp_path / "other.tar", 3, seed=9)
    with pytest.raises(errors.NoData, match=r"holds none of the tars that .* was extracted from: other\.tar") as caught:
        sample(config, 4, data=(str(other),))
    assert caught.value.way_out == "say where those lie, or leave --data out where they have not moved"


def test_the_draw_takes_all_splits_and_views_and_follows_its_seed(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(replace(config, views=2))
    val = make_tar(tmp_path / "val.tar", 20, seed=7)
    quiet(replace(config, split="val", data=(str(val),)))
    drawn: list[list[probe.Compared]] = []
    monkeypatch.setattr(live_check, "_summary", lambda name, found: drawn.append(list(found)))
    for seed in (0, 0, 1):
        sample(config, 40, seed=seed)
    places = [[found.place for found in fields] for fields in drawn]
    third = len(places) // 3
    assert places[:third] == places[third : 2 * third] != places[2 * third :]
    cls = next(fields for fields in drawn if fields[0].field == "teacher/vit/image/cls")
    assert {found.place.view for found in cls} == {0, 1}
    assert {found.tar for found in cls} == {"a.tar", "b.tar", "val.tar"}


def test_two_swapped_rows_are_found_and_both_keys_listed(
    config: ExtractConfig, networks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet(config)
    order = np.arange(16)
    order[[3, 11]] = 11, 3
    tamper(config.cache, "teacher/vit/image/cls", lambda rows: order)
    assert verify(capsys, config)[0] == 0  # nothing is wrong with a checksum
    code, out, last = verify(capsys, config, "--sample", "40", "--teacher", str(networks / "vit"), "--json")
    assert code == 4
    assert last.startswith("emkum: CorruptCache: ")
    assert "2 rows are not what their networks say: teacher/vit/image/cls, row 3 (a.tar/s003)" in last
    fields = json.loads(out)["sample"]["fields"]
    assert [(w["row"], w["tar"], w["key"]) for w in fields["teacher/vit/image/cls"]["wrong"]] == [
        (3, "a.tar", "s003"),
        (11, "a.tar", "s011"),
    ]
    assert fields["image/vit@2/tokens"]["agrees"] is True


def test_captions_in_another_order_are_found(
    config: ExtractConfig, networks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet(config)
    tamper(config.cache, "teacher/text/text/cls", lambda rows: np.roll(rows, 1), block=2)
    assert verify(capsys, config)[0] == 0
    code, out, _ = verify(capsys, config, "--sample", "80", "--teacher", str(networks / "text"))
    assert code == 4
    assert "teacher/text/text/cls, row 32 (" in out


def test_a_network_with_other_weights_is_refused_with_both_digests(
    config: ExtractConfig, networks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet(config)
    code, _, last = verify(capsys, config, "--sample", "4", "--teacher", str(networks / "other"))
    assert code == 5
    for folder in ("vit", "other"):
        assert load_saved(networks / folder).weights_sha256[:12] in last


def test_a_network_that_no_field_comes_from_is_answered_with_those_there_are(
    config: ExtractConfig, networks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet(config)
    code, _, last = verify(capsys, config, "--sample", "4", "--teacher", str(networks / "stranger"))
    assert code == 2
    assert "no field of stranger" in last
    assert "fields of: text (weights " in last
    assert "vit (weights " in last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--teacher", "vit"], "--teacher without --sample"),
        (["--sample", "5"], "--sample without --teacher"),
        (["--sample", "-1", "--teacher", "vit"], "--sample -1"),
    ],
)
def test_half_a_request_is_a_usage_error(
    config: ExtractConfig, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    quiet(config)
    code, _, last = verify(capsys, config, *arguments)
    assert code == 2
    assert words in last


def test_tars_may_have_moved_or_be_gone(
    config: ExtractConfig, networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet(config)
    asked = ["--sample", "40", "--teacher", str(networks / "vit")]
    moved = shutil.move(config.data[0], tmp_path / "moved")
    code, _, last = verify(capsys, config, *asked)
    assert code == 2
    assert "none of the 2 tars" in last
    assert verify(capsys, config, *asked, "--data", str(moved))[0] == 0
    os.remove(Path(moved) / "b.tar")
    code, out, _ = verify(capsys, config, *asked, "--data", str(moved))
    assert code == 0
    assert "no row of 1 tars that are not at hand: b.tar" in out
    assert "teacher/vit/image/cls" in out
    with open(Path(moved) / "a.tar", "ab") as tar:
        tar.write(b"\0" * 512)
    code, _, last = verify(capsys, config, *asked, "--data", str(moved))
    assert code == 5
    assert "bytes; the cache was extracted from" in last


# --- row k is key k ----------------------------------------------------------------------------------------


def test_every_row_is_the_picture_and_caption_its_tables_say(config: ExtractConfig, networks: Path) -> None:
    """Through tarfile, Pillow and the networks alone, for every row of every view, around pictures that are bad."""
    data = Path(config.data[0])
    make_tar(data / "a.tar", 24, bad=(0, 5, 15, 16))
    make_tar(data / "c.tar", 37, seed=2, captions=3, bad=(36,))
    quiet(replace(config, views=3, max_bad=0.2))
    cache = Cache.open(config.cache)
    vit, text = load_saved(networks / "vit"), load_saved(networks / "text")
    samples = {s["image_row"]: s for s in cache.samples("train").to_pylist()}
    assert sorted(samples) == list(range(77))
    boxes, cls = cache.field(BOXES), cache.field("teacher/vit/image/cls")
    tokens = cache.field("image/vit@2/tokens")
    for view in range(3):
        rows = cls.rows("train", view)
        assert len(rows) == 72
        crops = []
        for row, box in zip(rows.tolist(), boxes.values(rows, view), strict=True):
            with tarfile.open(data / samples[row]["tar"]) as tar:
                member = tar.extractfile(samples[row]["key"] + ".jpg")
                assert member is not None
                left, top, width, height = box[:4]
                edges = (left, top, left + width, top + height)
                picture = Image.open(member).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC, box=edges)
            crops.append(np.asarray(picture))
        hidden = vit.backbone.run(vit.backbone.embed(normalise(vit, torch.from_numpy(np.stack(crops))))).hidden
        want = targets.cls(vit.backbone.finish(hidden[-1])).numpy()
        np.testing.assert_allclose(cls.values(rows, view), want, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(tokens.values(rows, view), hidden[1].numpy(), rtol=2e-4, atol=2e-5)
        assert len(np.unique(want.round(3), axis=0)) == 72  # a row in another's place would be seen
    lines = cache.captions("train").to_pylist()
    assert len(lines) == 24 * 2 + 16 * 2 + 37 * 3
    layers = cache.field("teacher/text/text/layers")
    for line in lines:
        with tarfile.open(data / line["tar"]) as tar:
            member = tar.extractfile(line["key"] + ".json")
            assert member is not None
            assert line["caption"] in json.load(member)["captions"]
        words = word_ids(line["caption"])
        ids = torch.tensor([words])
        mask = torch.ones(1, len(words), dtype=torch.bool)
        found = text.backbone.run(text.backbone.embed(ids, mask), mask_BT=mask).hidden
        want = targets.layers(found, mask, False)[0].numpy()
        row = np.array([line["text_row"]])
        np.testing.assert_allclose(layers.values(row)[0, : len(words)], want, rtol=2e-3, atol=2e-4)


def word_ids(caption: str) -> list[int]:
    """What the word tokenizer gives, without it."""
    from test_extract import WORDS

    return [1, *(WORDS.index(word) for word in caption.split()[:14]), 2]
