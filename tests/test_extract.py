"""Stage 1 on small real tars with tiny random networks: what is written, what is refused, what a crash costs."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_cache import tiny_network
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from emkum import errors
from emkum.models import targets
from emkum.models.network import Network, normalise, save_network
from emkum.models.passes import FrozenPass, Wanted
from emkum.models.tokenizer import text_ids
from emkum.shards.audit import describe
from emkum.shards.claims import Claims
from emkum.shards.reader import Cache
from emkum.shards.store import LocalStore
from emkum.shards.views import Box, replay_view
from emkum.stage1_extract import claimed
from emkum.stage1_extract import extract as extract_module
from emkum.stage1_extract.claimed import ClaimedBlocks
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.encode import Output, Rows, encode_outputs
from emkum.stage1_extract.extract import extract, planned
from emkum.stage1_extract.plan import Task, survey
from emkum.stage1_extract.quarantine import Quarantine
from emkum.stage1_extract.telling import Progress, bill

WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "a",
    "the",
    "red",
    "blue",
    "green",
    "square",
    "circle",
    "star",
    "on",
    "left",
]


def make_tar(
    path: Path, num: int, seed: int = 0, captions: int = 2, bad: tuple[int, ...] = (), texts: bool = True
) -> Path:
    """`num` pictures of 24 x 20 pixels with captions; those in `bad` are cut off."""
    draw = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(num):
            buffer = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
            data = buffer.getvalue()[: 200 if i in bad else None]
            members = [(f"s{i:03d}.jpg", data)]
            if texts:
                lines = [" ".join(draw.choice(WORDS[4:], draw.integers(2, 12))) for _ in range(captions)]
                members.append((f"s{i:03d}.json", json.dumps({"captions": lines}).encode()))
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def word_tokenizer() -> bytes:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer.to_str().encode()


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny networks: vit, other (other weights), tail (shares vit's first 2 blocks), text."""
    root = tmp_path_factory.mktemp("networks")
    vit = tiny_network("vit", "image")
    save_network(vit, root / "vit")
    save_network(tiny_network("other", "image", seed=9), root / "other")
    tail = tiny_network("tail", "image")
    with torch.no_grad():
        tail.backbone.stack.blocks[2].qkv.weight.add_(0.1)
    save_network(_named(tail), root / "tail")
    text = replace(tiny_network("text", "text"), tokenizer=word_tokenizer())
    save_network(_named(text), root / "text")
    broken = tiny_network("broken", "image")
    with torch.no_grad():
        broken.backbone.stack.blocks[3].fc2.bias.fill_(1e6)
        broken.backbone.norm.weight.fill_(1e6)
    save_network(_named(broken), root / "broken")
    return root


def _named(network: Network) -> Network:
    from emkum.models.network import weights_digest

    return replace(network, weights_sha256=weights_digest(network.backbone))


def tiny_config(tmp_path: Path, networks: Path, **changes: Any) -> ExtractConfig:
    """Of the tars in `tmp_path`/tars: the tiny picture network, blocks of 16 rows, everything in float32."""
    config = ExtractConfig(
        teacher=(str(networks / "vit"),),
        data=(str(tmp_path / "tars"),),
        cache=tmp_path / "cache",
        text_encoder=str(networks / "text"),
        cut=2,
        size=16,
        storage="float32",
        compute="float32",
        max_tokens=16,
        batch_size=8,
        rows_per_block=16,
        device="cpu",
    )
    return replace(config, **changes)


@pytest.fixture
def config(tmp_path: Path, networks: Path) -> ExtractConfig:
    """40 pictures in two tars, blocks of 16 rows, float32."""
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars" / "a.tar", 24)
    make_tar(tmp_path / "tars" / "b.tar", 16, seed=1)
    return tiny_config(tmp_path, networks)


def quiet(config: ExtractConfig) -> list[str]:
    lines: list[str] = []
    extract(config, say=lines.append)
    return lines


def objects(cache: Path) -> dict[str, bytes]:
    """All committed content: objects, receipts, records; not the time- and path-dependent segment hints."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and "hints" not in path.parts and path.name not in ("segment.json",) and path.parent != cache
    }


# --- what is written -------------------------------------------------------------------------------------


def test_every_field_holds_what_the_networks_say(config: ExtractConfig, networks: Path) -> None:
    from emkum.models.network import load_saved

    quiet(replace(config, targets=("cls", "patches", "layers")))
    cache = Cache.open(config.cache)
    assert sorted(cache.fields) == [
        "image/vit@2/tokens",
        "teacher/vit/image/cls",
        "teacher/vit/image/layers",
        "teacher/vit/image/patches",
        "text/text/ids",
        "views/crop-0.9-1.0-seed-0/boxes",
    ]
    vit = load_saved(networks / "vit")
    boxes = cache.field("views/crop-0.9-1.0-seed-0/boxes")
    samples = cache.samples("train").to_pylist()
    rows = boxes.rows("train")
    assert rows.tolist() == list(range(40))
    crops = []
    for row in rows:
        sample = next(s for s in samples if s["image_row"] == row)
        with open(Path(config.data[0]) / sample["tar"], "rb") as tar:
            tar.seek(sample["offset"])
            data = tar.read(sample["size"])
        crops.append(replay_view(data, 16, Box.from_row(boxes.values(np.array([row]))[0])))
    embedded = vit.backbone.embed(normalise(vit, torch.from_numpy(np.stack(crops))))
    hidden = vit.backbone.run(embedded).hidden
    final = vit.backbone.finish(hidden[-1])
    for name, want in {
        "image/vit@2/tokens": hidden[1],
        "teacher/vit/image/cls": targets.cls(final),
        "teacher/vit/image/patches": targets.patches(final, 1),
        "teacher/vit/image/layers": targets.layers(hidden, None, True),
    }.items():
        np.testing.assert_allclose(cache.field(name).values(rows), want.numpy(), rtol=2e-5, atol=2e-5)
    captions = cache.captions("train")["caption"].to_pylist()
    ids, length = text_ids(word_tokenizer(), captions, 16)
    field = cache.field("text/text/ids")
    np.testing.assert_array_equal(field.lengths(field.rows("train")), length)
    np.testing.assert_array_equal(field.values(field.rows("train")), ids * (np.arange(16) < length[:, None]))


def test_a_text_teacher_gives_ragged_targets_and_its_own_tokenizer(config: ExtractConfig, networks: Path) -> None:
    from emkum.models.network import load_saved

    text_config = replace(config, teacher=(str(networks / "text"),), text_encoder=None, targets=("layers", "cls"))
    quiet(text_config)
    cache = Cache.open(config.cache)
    assert sorted(cache.fields) == ["teacher/text/text/cls", "teacher/text/text/layers", "text/text/ids"]
    network = load_saved(networks / "text")
    ids_field, layers_field = cache.field("text/text/ids"), cache.field("teacher/text/text/layers")
    rows = layers_field.rows("train")
    ids = torch.from_numpy(ids_field.read(rows)).long()
    mask = torch.from_numpy(np.arange(16) < ids_field.lengths(rows)[:, None])
    np.testing.assert_array_equal(layers_field.lengths(rows), ids_field.lengths(rows))
    hidden = network.backbone.run(network.backbone.embed(ids, mask), mask_BT=mask).hidden
    want = targets.layers(hidden, mask, False)
    np.testing.assert_allclose(layers_field.values(rows), want.numpy(), rtol=1e-4, atol=1e-4)
    final = network.backbone.finish(hidden[-1])[:, 0]
    np.testing.assert_allclose(cache.field("teacher/text/text/cls").values(rows), final.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("storage", "bound"), [("float16", 1e-3), ("int8", 0.02)])
def test_lossy_storage_stays_within_its_recorded_error(config: ExtractConfig, storage: str, bound: float) -> None:
    quiet(config)
    lossy = replace(config, storage=storage, cache=config.cache.with_name("lossy"))
    quiet(lossy)
    exact, cache = Cache.open(config.cache), Cache.open(lossy.cache)
    for name in ("image/vit@2/tokens", "teacher/vit/image/cls", "teacher/vit/image/patches"):
        rows = exact.field(name).rows("train")
        want, got = exact.field(name).values(rows), cache.field(name).values(rows)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        stated = describe(cache)["fields"][name]["relative_l2_error"]
        assert error == pytest.approx(stated, rel=0.1)
        assert 0 < error < bound


def test_several_views_are_several_crops_and_one_view_may_become_two(config: ExtractConfig) -> None:
    quiet(config)
    before = objects(config.cache)
    quiet(replace(config, views=2))
    field = Cache.open(config.cache).field("image/vit@2/tokens")
    assert field.num_views == 2
    rows = field.rows("train", 1)
    assert rows.tolist() == list(range(40))
    assert not np.array_equal(field.values(rows, 0), field.values(rows, 1))
    after = objects(config.cache)
    assert {k: v for k, v in after.items() if k in before and not k.endswith("zarr.json")} == {
        k: v for k, v in before.items() if not k.endswith("zarr.json")
    }


# --- once, and no more than once ---------------------------------------------------------------------------


def test_the_same_command_again_does_nothing(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(config)
    before = objects(config.cache)
    monkeypatch.setattr(extract_module, "PictureStream", None)  # decoding anything would fail
    lines = quiet(config)
    assert lines[-1].startswith("nothing to do: ")
    assert objects(config.cache) == before


def test_a_shared_prefix_runs_once(networks: Path) -> None:
    from emkum.models.network import load_saved

    vit, tail = load_saved(networks / "vit"), load_saved(networks / "tail")
    wanted = [Wanted("vit", "tokens", 2), Wanted("vit", "cls"), Wanted("tail", "cls")]
    together = FrozenPass([vit, tail], wanted, "float32", "cpu")
    crops = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    outputs = together.pictures(crops)
    assert together.shared_blocks == {"tail": ("vit", 2)}
    assert together.block_runs == 4 + 2  # vit whole, of tail only what differs
    apart = [FrozenPass([vit], wanted[:2], "float32", "cpu"), FrozenPass([tail], wanted[2:], "float32", "cpu")]
    expected = [*apart[0].pictures(crops), *apart[1].pictures(crops)]
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_cut_reuses_the_teachers_own_blocks(networks: Path) -> None:
    from emkum.models.network import load_saved

    frozen = FrozenPass(
        [load_saved(networks / "vit")], [Wanted("vit", "tokens", 2), Wanted("vit", "cls")], "float32", "cpu"
    )
    frozen.pictures(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    assert frozen.block_runs == 4


def test_a_second_teacher_more_tars_and_a_split_leave_old_bytes_alone(config: ExtractConfig, networks: Path) -> None:
    quiet(config)
    before = objects(config.cache)
    make_tar(Path(config.data[0]) / "c.tar", 5, seed=5)
    make_tar(Path(config.data[0]).parent / "dev.tar", 6, seed=6)
    quiet(replace(config, teacher=(config.teacher[0], str(networks / "other"))))
    quiet(replace(config, split="val", data=(str(Path(config.data[0]).parent / "dev.tar"),)))
    cache = Cache.open(config.cache)
    assert len(cache.field("teacher/other/image/cls").rows("train")) == 45
    assert len(cache.field("teacher/vit/image/cls").rows("train")) == 45
    assert len(cache.field("teacher/vit/image/cls").rows("val")) == 6
    assert cache.segments[2].views.name == "center-1.0"
    after = objects(config.cache)
    changed = [name for name, data in before.items() if after[name] != data and not name.endswith("zarr.json")]
    assert changed == []


def test_stopping_anywhere_and_going_on_gives_the_bytes_of_one_run(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(config)
    whole = objects(config.cache)
    pictures = FrozenPass.pictures
    for stop_after in range(1, 6):  # the first call asks for shapes, five hold 40 pictures
        stopped = replace(config, cache=config.cache.with_name(f"stopped{stop_after}"))
        calls = 0

        def counted(self: FrozenPass, crops: torch.Tensor, wanted=None, limit: int = stop_after):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise errors.Interrupted("stopped by SIGTERM")
            return pictures(self, crops, wanted)

        monkeypatch.setattr(FrozenPass, "pictures", counted)
        with pytest.raises(errors.Interrupted):
            quiet(stopped)
        monkeypatch.setattr(FrozenPass, "pictures", pictures)
        assert not list(stopped.cache.rglob("*.tmp"))
        quiet(stopped)
        assert objects(stopped.cache) == whole


def test_sigint_ends_with_75_and_the_same_command_finishes(config: ExtractConfig, tmp_path: Path) -> None:
    make_tar(Path(config.data[0]) / "big.tar", 1500, seed=3, texts=False)
    command = [sys.executable, "-m", "emkum.cli", "extract", "--teacher", config.teacher[0], "--data", config.data[0]]
    command += ["--cache", str(config.cache), "--text-encoder", "none", "--size", "16", "--batch-size", "4"]
    command += ["--rows-per-block", "16"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    receipts = config.cache / "_emkum" / "receipts"
    deadline = time.monotonic() + 60
    while not list(receipts.rglob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 75, stderr
    last = stderr.strip().splitlines()[-1]
    assert last == ("emkum: Interrupted: stopped by SIGINT; what was committed is kept | the same command continues")
    assert "Traceback" not in stderr
    assert not list(config.cache.rglob("*.tmp"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(Cache.open(config.cache).field("teacher/vit/image/cls").rows("train")) == 1540


def test_only_the_missing_outputs_are_computed(config: ExtractConfig, networks: Path) -> None:
    quiet(config)
    calls: list[list[Wanted]] = []
    pictures = FrozenPass.pictures

    def noted(self: FrozenPass, crops: torch.Tensor, wanted=None):
        calls.append(wanted)
        return pictures(self, crops, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenPass, "pictures", noted)
        make_tar(Path(config.data[0]) / "c.tar", 3, seed=5)
        quiet(replace(config, teacher=(config.teacher[0], str(networks / "other"))))
    old = [wanted for wanted in calls if wanted and len(wanted) == 2]  # the old rows lack the new teacher's two only
    assert len(old) == 5
    assert {want.network for wanted in old for want in wanted} == {"other"}


def test_a_low_cut_of_a_network_that_borrows_its_blocks(networks: Path) -> None:
    from emkum.models.network import load_saved

    vit, tail = load_saved(networks / "vit"), load_saved(networks / "tail")
    wanted = [Wanted("vit", "cls"), Wanted("tail", "tokens", 1), Wanted("tail", "layers")]
    crops = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    together = FrozenPass([vit, tail], wanted, "float32", "cpu").pictures(crops)
    for want, got in zip(wanted, together, strict=True):
        alone = FrozenPass([vit if want.network == "vit" else tail], [want], "float32", "cpu").pictures(crops)[0]
        torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-6)
    part = FrozenPass([vit, tail], wanted, "float32", "cpu")
    torch.testing.assert_close(part.pictures(crops, wanted[1:2])[0], together[1], rtol=1e-6, atol=1e-6)
    assert part.block_runs == 1


# --- what a dead process left ------------------------------------------------------------------------------


def test_a_block_that_a_dead_process_left_untrue_is_done_again_by_the_same_command(config: ExtractConfig) -> None:
    """Its receipt lists other bytes than lie there, of the same length: found because of the claim it left."""
    quiet(config)
    whole = objects(config.cache)
    store = LocalStore(config.cache)
    name = next(n for n in whole if n.startswith("teacher/vit/image/cls/values/c.1."))
    (config.cache / name).write_bytes(whole[name][::-1])
    claims = Claims(store)
    left = claims.take("image-000001-0")
    assert left is not None
    record = json.loads(store.read(left.path))
    store.write(left.path, json.dumps(record | {"pid": 2**22 + 1}).encode())  # no process has such a number
    lines = quiet(config)
    claims.__exit__(None, None, None)  # its heartbeat ends
    assert any("to extract" in line for line in lines), lines
    assert objects(config.cache) == whole
    assert not list((config.cache / "_emkum/claims").iterdir())


# --- bad pictures ------------------------------------------------------------------------------------------


def test_a_bad_picture_costs_one_row_and_is_listed_with_its_reason(config: ExtractConfig) -> None:
    make_tar(Path(config.data[0]) / "a.tar", 24, bad=(0, 5, 23))
    lines = quiet(replace(config, max_bad=0.1))
    cache = Cache.open(config.cache)
    for name, field in cache.fields.items():
        if field.space == "image":
            assert field.rows("train").tolist() == [r for r in range(40) if r not in (0, 5, 23)], name
            receipt = field.receipts[0, 0]
            assert [(q.row, q.tar, q.key) for q in receipt.quarantined] == [(0, "a.tar", "s000"), (5, "a.tar", "s005")]
            assert all(q.reason for q in receipt.quarantined)
    assert "seen 40 = 37 ok + 3 quarantined + 0 filtered (pictures)" in lines
    good = replace(config, cache=config.cache.with_name("good"))
    make_tar(Path(config.data[0]) / "a.tar", 24)
    quiet(good)
    rows = np.array([1, 4, 6, 22, 24, 39])
    want = Cache.open(good.cache).field("teacher/vit/image/cls").values(rows)
    np.testing.assert_allclose(cache.field("teacher/vit/image/cls").values(rows), want, rtol=1e-5, atol=1e-5)


def test_a_batch_of_bad_pictures_only(config: ExtractConfig) -> None:
    make_tar(Path(config.data[0]) / "a.tar", 24, bad=tuple(range(16)))
    quiet(replace(config, max_bad=0.5))
    cache = Cache.open(config.cache)
    assert cache.field("image/vit@2/tokens").rows("train").tolist() == list(range(16, 40))
    assert cache.field("image/vit@2/tokens").receipts[0, 0].statistics is None


def test_too_many_bad_pictures_stop_the_run_and_name_the_first(config: ExtractConfig) -> None:
    make_tar(Path(config.data[0]) / "a.tar", 24, bad=(3,))
    with pytest.raises(errors.TooManyBadSamples) as caught:
        quiet(config)
    assert caught.value.exit_code == 3
    assert "1 of 40 pictures cannot be used, --max-bad 0.001 allows 0" in caught.value.what
    assert "a.tar/s003" in caught.value.what
    assert "--max-bad" in caught.value.way_out


def test_a_value_the_storage_cannot_hold_names_field_and_sample(config: ExtractConfig, networks: Path) -> None:
    with pytest.raises(
        errors.NonFiniteFeature, match=r"teacher/broken/image/cls, sample a\.tar/s000: max .x. = .* > 65504"
    ):
        quiet(replace(config, teacher=(str(networks / "broken"),), storage="float16"))
    for field in Cache.open(config.cache).fields.values():
        assert field.space == "text" or len(field.rows("train")) == 0


def spoil_white(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """From here on networks give `value` as the first number of every white picture."""
    pictures = FrozenPass.pictures

    def spoilt(self: FrozenPass, crops: torch.Tensor, wanted: list[Wanted] | None = None) -> list[torch.Tensor]:
        outputs = [output.clone() for output in pictures(self, crops, wanted)]
        for row in (crops.flatten(1).min(dim=1).values > 250).nonzero().flatten().tolist():
            for output in outputs:
                output[row].view(-1)[0] = value
        return outputs

    monkeypatch.setattr(FrozenPass, "pictures", spoilt)


def add_white_picture(folder: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), "white").save(buffer, "JPEG")
    with tarfile.open(Path(folder) / "white.tar", "w") as tar:
        info = tarfile.TarInfo("w0.jpg")
        info.size = len(buffer.getvalue())
        tar.addfile(info, io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e20])
def test_one_spoilt_sample_does_not_reach_int8_statistics(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    quiet(replace(config, storage="int8", cache=config.cache.with_name("sound")))
    sound = Cache.open(config.cache.with_name("sound")).field("teacher/vit/image/cls")
    add_white_picture(config.data[0])
    spoil_white(monkeypatch, value)
    quiet(replace(config, storage="int8", on_nonfinite="quarantine", max_bad=0.1))
    cache = Cache.open(config.cache)
    field = cache.field("teacher/vit/image/cls")
    np.testing.assert_allclose(field.std, sound.std, rtol=0.5)
    rows = np.arange(40)
    np.testing.assert_allclose(field.values(rows), sound.values(rows), atol=0.1)
    assert len(field.rows("train")) == (41 if value == 1e20 else 40)


def test_a_sample_that_spoils_int8_statistics_stops_the_run_with_its_name(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_white_picture(config.data[0])
    spoil_white(monkeypatch, float("inf"))
    with pytest.raises(errors.NonFiniteFeature, match=r"vit.*, sample white\.tar/w0: 1 values are inf or NaN"):
        quiet(replace(config, storage="int8"))
    assert not (config.cache / "_emkum" / "fields").exists()


def int8_rows(values: torch.Tensor, statistics: tuple[torch.Tensor, torch.Tensor], on_nonfinite: str = "stop") -> Rows:
    return encode_outputs([Output("f", values, "int8", ["a", "b", "c"], statistics)], on_nonfinite)()["f"]


def test_what_int8_cannot_standardise_is_refused_by_name() -> None:
    values, statistics = torch.randn(3, 2, 8), (torch.zeros(8), torch.full((8,), 1e-3))
    values[1, 1, 3] = 3e37
    rows = int8_rows(values, statistics, "quarantine")
    assert rows.refused == {1: "max |x| = 3e+37 cannot be standardised within float32 (int8)"}
    assert len(rows.encoded.values) == 2
    with pytest.raises(errors.NonFiniteFeature, match=r"f, sample b: max .x. = 3e.37"):
        int8_rows(values, statistics)


def test_the_error_of_huge_values_is_not_called_none() -> None:
    values, statistics = torch.randn(3, 8) * 1e20, (torch.zeros(8), torch.ones(8))
    summary = int8_rows(values, statistics).encoded.summary
    assert 1e-4 < summary.relative_l2 < 1e-2


def test_int8_statistics_come_from_the_train_split_while_it_is_at_hand(config: ExtractConfig, tmp_path: Path) -> None:
    val = replace(config, split="val", data=(str(make_tar(tmp_path / "val.tar", 20, seed=7)),), storage="int8")
    quiet(replace(config, targets=("cls",)))
    other = replace(val, targets=("cls",), teacher=(str(Path(config.teacher[0]).parent / "other"),), encoder="none")
    lines = quiet(other)
    assert not [line for line in lines if line.startswith("int8 statistics")]
    with_train = Cache.open(config.cache).field("teacher/other/image/cls").mean
    alone = replace(other, cache=tmp_path / "alone", data=(config.data[0],), split="train")
    quiet(alone)
    np.testing.assert_array_equal(with_train, Cache.open(alone.cache).field("teacher/other/image/cls").mean)
    gone = replace(other, cache=tmp_path / "gone")
    assert "int8 statistics of pictures come from split val: no segment of train is at hand" in quiet(gone)
    assert not np.array_equal(with_train, Cache.open(gone.cache).field("teacher/other/image/cls").mean)


# --- what is left out is counted -----------------------------------------------------------------------------


@pytest.fixture
def some_bad_captions(config: ExtractConfig, networks: Path, monkeypatch: pytest.MonkeyPatch) -> ExtractConfig:
    """The caption `star star` has no numbers: 5 of 25 captions, all of one sample."""
    texts = FrozenPass.texts

    def spoilt(
        self: FrozenPass, ids: torch.Tensor, mask: torch.Tensor, wanted: list[Wanted] | None = None
    ) -> list[torch.Tensor]:
        outputs = [output.clone() for output in texts(self, ids, mask, wanted)]
        for row in (ids[:, 1] == WORDS.index("star")).nonzero().flatten().tolist():
            for output in outputs:
                output[row] = float("nan")
        return outputs

    monkeypatch.setattr(FrozenPass, "texts", spoilt)
    folder = Path(config.data[0]).parent / "captions"
    folder.mkdir()
    with tarfile.open(folder / "c.tar", "w") as tar:
        for i in range(5):
            data = json.dumps({"captions": ["star star" if i == 2 else "a red circle"] * 5}).encode()
            info = tarfile.TarInfo(f"s{i}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return replace(
        config, teacher=(str(networks / "text"),), text_encoder=None, data=(str(folder),), on_nonfinite="quarantine"
    )


def test_bad_captions_are_counted_as_captions_each_of_them(some_bad_captions: ExtractConfig) -> None:
    lines = quiet(replace(some_bad_captions, max_bad=0.2))
    assert "seen 25 = 20 ok + 5 quarantined (captions)" in lines
    assert sum(line.startswith("quarantined c.tar/s2: ") for line in lines) == 3
    with pytest.raises(errors.TooManyBadSamples, match=r"5 of 25 captions .*, --max-bad 0\.1 allows 2"):
        quiet(replace(some_bad_captions, max_bad=0.1, cache=some_bad_captions.cache.with_name("again")))


def test_bad_captions_are_no_bad_pictures(some_bad_captions: ExtractConfig, config: ExtractConfig) -> None:
    both = replace(some_bad_captions, teacher=(*config.teacher, *some_bad_captions.teacher))
    lines = quiet(replace(both, data=(*config.data, *some_bad_captions.data), max_bad=0.9))
    assert "seen 40 = 40 ok + 0 quarantined + 0 filtered (pictures)" in lines
    assert any(line.endswith("quarantined (captions)") for line in lines)


def test_the_budget_holds_for_what_is_committed_already(config: ExtractConfig) -> None:
    make_tar(Path(config.data[0]) / "a.tar", 24, bad=(3, 17))
    quiet(replace(config, max_bad=0.1))
    for _ in range(2):
        with pytest.raises(
            errors.TooManyBadSamples, match=r"2 of 40 pictures .*; the first: a\.tar/s003: .*a\.tar/s017"
        ):
            quiet(config)
    assert quiet(replace(config, max_bad=0.05))[-1].startswith("nothing to do")


def test_what_another_process_left_out_counts_and_is_named(config: ExtractConfig) -> None:
    make_tar(Path(config.data[0]) / "a.tar", 24, bad=(3,))
    found = survey(replace(config, max_bad=0.5))
    with Claims(found.store) as claims, claims.planning(join=False):
        bad = Quarantine(planned(found, claims, lambda line: None))
        plan = bad._plan
    quiet(replace(config, max_bad=0.5))  # the other one
    assert bad.count("image") == 0
    bad.finish()
    assert (bad.count("image"), bad.new) == (1, 1)
    assert bad.first("image")[0].startswith("a.tar/s003: ")
    assert Quarantine(replace(plan, receipts={})).new == 0


def test_one_bar_is_opened_by_the_first_claimed_task_and_shortened_by_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress("pictures", None) as progress:
        progress.left(64)
        assert list(progress.opened_by([])) == []
        progress.left(48)
        assert progress._bar is None
        for _ in progress.opened_by([cast("Task", object())]):
            bar = progress._bar
            assert bar is not None
            progress.advance(16)
        progress.left(16)
        assert (bar.n, bar.total) == (16, 32)
        assert list(progress.opened_by([cast("Task", object())]))
        assert progress._bar is bar
        progress.left(0)
    assert capsys.readouterr().err.count("pictures: 100%") >= 1


def test_committed_blocks_are_not_claimed(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    found = survey(config)
    with Claims(found.store) as claims:
        with claims.planning(join=False):
            plan = planned(found, claims, lambda line: None)
        quiet(replace(config, join=True))
        monkeypatch.setattr(Claims, "take", None)  # claiming anything would fail
        blocks = ClaimedBlocks(plan, claims, lambda line: None)
        assert list(blocks.take(plan.tasks)) == []
        assert blocks._missing(plan.tasks) == []
        monkeypatch.setattr(claimed, "ASKED_ONE_BY_ONE", 0)
        assert blocks._missing(plan.tasks) == []


def test_the_bill_of_many_workers_names_no_time(config: ExtractConfig) -> None:
    config = replace(config, batch_size=1)
    found = survey(config)
    with Claims(found.store) as claims, claims.planning(join=False):
        plan = planned(found, claims, lambda line: None, with_bill=False)
    assert re.search(r", about \d+ s \(forward only, measured on one batch\)$", bill(plan)[-1])
    assert "measured" not in "".join(bill(replace(plan, config=replace(config, workers=2))))


def test_bad_pictures_of_one_split_do_not_count_against_another(config: ExtractConfig, tmp_path: Path) -> None:
    val, test = (
        make_tar(tmp_path / "val.tar", 20, seed=7, bad=(1, 2)),
        make_tar(tmp_path / "test.tar", 20, seed=8, bad=(3,)),
    )
    quiet(replace(config, split="val", data=(str(val),), max_bad=0.1))
    lines = quiet(replace(config, split="test", data=(str(test),), max_bad=0.05))
    assert "seen 20 = 19 ok + 1 quarantined + 0 filtered (pictures)" in lines


def test_int8_statistics_come_from_rows_of_their_own_space(
    config: ExtractConfig, networks: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "a-texts.tar"
    with tarfile.open(texts, "w") as tar:
        for i in range(20):
            info = tarfile.TarInfo(f"t{i}.txt")
            info.size = 9
            tar.addfile(info, io.BytesIO(b"a red sta"))
    text = replace(config, teacher=(str(networks / "text"),), text_encoder=None, data=(str(texts),), storage="int8")
    quiet(text)
    quiet(replace(config, data=(str(texts), *config.data), storage="int8"))
    cache = Cache.open(config.cache)
    field = cache.field("teacher/vit/image/cls")
    assert field.mean.shape == (16,)
    assert len(field.rows("train")) == 40
    layers = cache.field("teacher/text/text/layers")
    values = layers.values(layers.rows("train"))
    assert np.isfinite(values).all()
    assert np.isnan(layers.read_scale(layers.rows("train"))).any()  # past the length


# --- identity ----------------------------------------------------------------------------------------------


def test_other_weights_under_one_name_are_refused_and_nothing_changes(config: ExtractConfig, networks: Path) -> None:
    quiet(config)
    before = objects(config.cache)
    with pytest.raises(
        errors.FingerprintMismatch, match=r"weights with sha256 .* in the cache, .* asked for"
    ) as caught:
        quiet(replace(config, teacher=(str(networks / "other"),), name="vit"))
    assert caught.value.exit_code == 5
    assert objects(config.cache) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 32}, "crop size 16 in the cache, 32 asked for"),
        ({"storage": "float16"}, "storage float32 in the cache, float16 asked for"),
        ({"compute": "bfloat16"}, "compute type float32 in the cache, bfloat16 asked for"),
        ({"crop": (0.5, 1.0)}, "views crop-0.9-1.0-seed-0; this run asks for crop-0.5-1.0-seed-0"),
        ({"seed": 4}, "this run asks for crop-0.9-1.0-seed-4"),
        ({"split": "val"}, "as split 'train'; this run asks for split 'val'"),
        ({"flip": True}, "this run asks for crop-0.9-1.0-flip-seed-0"),
        ({"jitter": 0.4}, "this run asks for crop-0.9-1.0-jitter-0.4-seed-0"),
        ({"rows_per_block": 32}, "has blocks of 16 rows; this run asks for 32"),
    ],
)
def test_another_setting_is_refused_with_both_values(config: ExtractConfig, change: dict, message: str) -> None:
    quiet(config)
    before = objects(config.cache)
    with pytest.raises(errors.IdentityMismatch) as caught:
        quiet(replace(config, **change))
    assert message in caught.value.what
    assert caught.value.way_out
    assert objects(config.cache) == before


def test_a_tar_that_changed_is_refused_even_with_its_size_kept(config: ExtractConfig) -> None:
    quiet(config)
    tar = Path(config.data[0]) / "a.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(bytes(data))
    with pytest.raises(errors.SourceChanged, match=r"a\.tar is not the a\.tar that segment 0 was extracted from"):
        quiet(config)


def test_a_tar_that_was_not_named_again_must_be_what_it_was(config: ExtractConfig, networks: Path) -> None:
    quiet(config)
    other = Path(config.data[0]) / "b.tar"
    data = bytearray(other.read_bytes())
    data[700] ^= 1
    other.write_bytes(bytes(data))
    named = replace(config, data=(str(Path(config.data[0]) / "a.tar"),), teacher=(str(networks / "other"),))
    with pytest.raises(errors.SourceChanged, match=r"b\.tar is not the b\.tar that segment 0"):
        quiet(named)


def test_a_second_teacher_takes_the_crops_of_the_first(config: ExtractConfig, networks: Path) -> None:
    quiet(replace(config, crop=(0.5, 0.8), seed=3))
    quiet(replace(config, teacher=(str(networks / "other"),)))
    cache = Cache.open(config.cache)
    assert [name for name in cache.fields if name.startswith("views/")] == ["views/crop-0.5-0.8-seed-3/boxes"]
    assert len(cache.field("teacher/other/image/cls").rows("train")) == 40


def test_more_tokens_than_the_text_encoder_has_positions(config: ExtractConfig) -> None:
    with pytest.raises(errors.UsageError, match="--max-tokens 32, and text has 16 positions"):
        quiet(replace(config, max_tokens=32))


def test_a_cache_of_a_newer_format_is_left_alone(config: ExtractConfig) -> None:
    quiet(config)
    root = config.cache / "zarr.json"
    root.write_text(root.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(errors.NewerFormat, match="has cache format 9; this emkum reads up to 1"):
        quiet(config)


def test_auto_compute_follows_the_cache(config: ExtractConfig) -> None:
    quiet(config)
    assert quiet(replace(config, compute="auto"))[-1].startswith("nothing to do")


# --- what is missing is said -------------------------------------------------------------------------------


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "emkum.cli", *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_bad_input_ends_in_one_line_with_its_exit_code(config: ExtractConfig, tmp_path: Path, networks: Path) -> None:
    vit = str(networks / "vit")
    (tmp_path / "empty").mkdir()
    captionless = make_tar(tmp_path / "captionless.tar", 3, texts=False)
    cases = [
        (["extract", "--teacher", vit], 2, "NoData", "./data"),
        (["extract", "--teacher", vit, "--data", "empty"], 2, "NoData", "empty"),
        (["extract", "--teacher", "dinov22-s", "--data", config.data[0]], 2, "UnknownNetwork", "dinov2-s"),
        (["extract", "--teacher", "beit2", "--data", config.data[0]], 2, "WeightsUnavailable", "beitv2_base"),
        (["extract", "--teacher", vit, "--data", config.data[0], "--cut", "9"], 2, "UsageError", "4 blocks"),
        (["extract", "--teacher", vit, "--data", config.data[0], "--targets", "sls"], 2, "UsageError", "cls"),
        (["extract", "--teacher", str(networks / "text"), "--data", str(captionless)], 2, "MissingCaptions", "txt"),
        (["extract", "--data", config.data[0]], 2, "Missing option", "--teacher"),
        (["cache", "info", "nowhere"], 2, "NotACache", "nowhere"),
    ]
    for arguments, code, kind, words in cases:
        done = run_cli(*arguments, cwd=tmp_path)
        assert done.returncode == code, (arguments, done.stderr)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("emkum: "), done.stderr
        assert kind in last, last
        assert words in last, last
        assert "Traceback" not in done.stderr


def test_cache_info_says_what_is_there_and_what_is_missing(config: ExtractConfig, tmp_path: Path) -> None:
    quiet(config)
    receipt = sorted((config.cache / "_emkum/receipts/teacher/vit/image/cls").glob("*.json"))[1]
    receipt.unlink()
    done = run_cli("cache", "info", str(config.cache), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["complete"] is False
    assert found["fields"]["teacher/vit/image/cls"]["missing"] == {"train": 1}
    assert found["fields"]["image/vit@2/tokens"]["rows"] == {"train": 40}
    assert found["splits"]["train"]["captions"] == 80
    shown = run_cli("cache", "info", str(config.cache), cwd=tmp_path).stdout
    assert "1 blocks" in shown
    assert "incomplete: the `emkum extract` command of the split finishes it" in shown
    quiet(config)
    assert json.loads(run_cli("cache", "info", str(config.cache), "--json", cwd=tmp_path).stdout)["complete"]


def test_words_the_shell_expanded_after_data_all_count(config: ExtractConfig, tmp_path: Path) -> None:
    tars = sorted(str(p) for p in Path(config.data[0]).glob("*.tar"))
    arguments = ["extract", "--data", *tars, "--teacher", config.teacher[0], "--text-encoder", "none", "--size", "16"]
    done = run_cli(*arguments, "--cache", "c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(Cache.open(tmp_path / "c").field("teacher/vit/image/cls").rows("train")) == 40


# --- real ---------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_real_teacher_on_real_pictures_says_what_transformers_says(shared: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    weights = shared / "weights" / "dinov2-small-imgfocus"
    quiet(
        ExtractConfig(
            teacher=(str(weights),),
            data=(str(shared / "data/pairs/coco2017_train_mini_00000.tar"),),
            cache=tmp_path / "c",
            text_encoder="none",
            size=56,
            storage="float32",
            compute="float32",
            device="cpu",
        )
    )
    cache = Cache.open(tmp_path / "c")
    rows = np.array([0, 7, 79])
    model = transformers.Dinov2Model.from_pretrained(weights, dtype=torch.float32).eval()
    boxes = cache.field("views/crop-0.9-1.0-seed-0/boxes").values(rows)
    crops = []
    for row, box in zip(rows, boxes, strict=True):
        sample = cache.samples("train").slice(int(row), 1).to_pylist()[0]
        with open(shared / "data/pairs" / sample["tar"], "rb") as tar:
            tar.seek(sample["offset"])
            crops.append(replay_view(tar.read(sample["size"]), 56, Box.from_row(box)))
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        final = model((pixels - mean[:, None, None]) / std[:, None, None]).last_hidden_state
    name = "teacher/dinov2-small-imgfocus/image"
    np.testing.assert_allclose(cache.field(f"{name}/cls").values(rows), final[:, 0].numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(cache.field(f"{name}/patches").values(rows), final[:, 1:].numpy(), rtol=1e-3, atol=2e-3)
