"""Statistics as a cache keeps them: stale ones, damage, faults, and the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from emkum import cli
from emkum.errors import (
    CorruptCache,
    IncompleteCache,
    MissingField,
    MissingStatistic,
    StaleStatistic,
    StorageFailure,
    UsageError,
)
from emkum.shards import durable
from emkum.shards.digest import digest
from emkum.shards.fingerprint import digest_of
from emkum.shards.layout import pretty_json
from emkum.shards.ledger import with_digest
from emkum.shards.reader import Cache
from emkum.shards.repair import repair
from emkum.shards.statistics import pca, reading
from emkum.shards.statistics.compute import compute
from emkum.shards.statistics.kept import kept, load
from emkum.shards.statistics.passes import Threads
from emkum.shards.statistics.request import StatisticRequest
from emkum.shards.store import LocalStore
from emkum.shards.verify import verify
from tests.faulty_os import MODES, FaultyOs
from tests.statistics_caches import CLS, LAYERS, _nothing_stays_open, by_rows, clusters, own, pooled_cache, whole
from tests.tiny_cache import make_cache

__all__ = ["_nothing_stays_open", "own", "whole"]  # fixtures


# --- what is kept --------------------------------------------------------------------------------------


def test_what_is_kept_is_plain_zarr_and_read_back(own: Path) -> None:
    cache = Cache.open(own)
    said: list[str] = []
    made = compute(cache, StatisticRequest(CLS, "pca", components=3), Threads(2), said.append)
    assert said == [f"{CLS}/pca-3: 140 vectors of 16, with 2 threads"]
    found = reading.pca(Cache.open(own), CLS, 3)
    for name, values in made.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], values)
        array = zarr.open_array(own / "statistics" / CLS / "pca-3" / name, mode="r")
        np.testing.assert_array_equal(array[...], values)
    assert array.metadata.dimension_names == ("component",) if name == "explained_variance" else ("channel",)
    assert found.record["fingerprint"] == made.request.fingerprint(cache)
    assert found.record["making"]["rows"] == 140
    assert not found.arrays["mean"].flags.writeable


def test_the_same_again_does_nothing(own: Path) -> None:
    request, said = StatisticRequest(CLS, "codebook", codes=4), []  # type: ignore[var-annotated]
    compute(Cache.open(own), request)
    before = {path: path.stat().st_mtime_ns for path in (own / "statistics").rglob("*")}
    again = compute(Cache.open(own), request, None, said.append)
    assert said == [f"{CLS}/codebook-4 is kept already, of the same 10 blocks: nothing to do"]
    assert {path: path.stat().st_mtime_ns for path in (own / "statistics").rglob("*")} == before
    assert again.results["usage"] == 1
    assert len(again.results["mean_cosine_by_pass"]) > 1
    assert again.results["mean_cosine"] == again.results["mean_cosine_by_pass"][-1]


def test_a_field_that_has_grown_makes_the_statistic_stale(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    make_cache(path, pictures=72, views=2, quarantined=(3, 20), skipped_blocks=[("cls", 2)])
    said: list[str] = []
    request = StatisticRequest(CLS, "channels")
    old = compute(Cache.open(path), request, None, said.append)
    assert said[0] == f"{CLS} lacks 2 blocks of train: the statistic is of what is committed"
    for name in (f"{CLS}/values", f"_emkum/receipts/{CLS}"):
        shutil.copytree(whole / name, path / name, dirs_exist_ok=True)
    cache = Cache.open(path)
    with pytest.raises(StaleStatistic) as caught:
        reading.channels(cache, CLS)
    assert caught.value.what == (
        f"{path} keeps a {CLS}/channels that is of 8 blocks of the split; 10 are committed now"
    )
    assert caught.value.way_out == f"emkum cache stats {path} --field {CLS} --what channels"
    assert [one.stale for one in kept(cache)] == ["is of 8 blocks of the split; 10 are committed now"]
    said.clear()
    new = compute(cache, request, None, said.append)
    assert said[0].endswith("that is kept is of 8 blocks of the split; 10 are committed now: it is made anew")
    assert new.record["making"]["vectors"] > old.record["making"]["vectors"]
    np.testing.assert_allclose(reading.channels(cache, CLS).arrays["mean"], by_rows(cache, CLS).mean(0), rtol=1e-9)


def test_other_contents_and_other_settings_make_it_stale(own: Path, tmp_path: Path) -> None:
    request = StatisticRequest(CLS, "channels")
    compute(Cache.open(own), request)
    make_cache(tmp_path / "seed", pictures=72, views=2, quarantined=(3, 20), seed=5)
    make_cache(tmp_path / "kind", pictures=72, views=2, quarantined=(3, 20), storage="float16")
    for name, stale in (
        ("seed", "is of a field made otherwise: its fingerprint was"),  # other weights
        ("kind", "is of a field made otherwise: its fingerprint was"),
    ):
        shutil.copytree(own / "statistics", tmp_path / name / "statistics")
        with pytest.raises(StaleStatistic, match=stale):
            load(Cache.open(tmp_path / name), request)


def test_blocks_made_again_make_it_stale(own: Path, tmp_path: Path) -> None:
    pooled_cache(tmp_path / "a", np.ones((40, 4), np.float32))
    compute(Cache.open(tmp_path / "a"), StatisticRequest(CLS, "channels"))
    pooled_cache(tmp_path / "b", np.full((40, 4), 2, np.float32))
    shutil.copytree(tmp_path / "a" / "statistics", tmp_path / "b" / "statistics")
    with pytest.raises(StaleStatistic, match="is of other contents: the 3 blocks of the split were made again since"):
        reading.channels(Cache.open(tmp_path / "b"), CLS)


def test_a_newer_method_makes_it_stale(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emkum.shards.statistics import request

    compute(Cache.open(own), StatisticRequest(CLS, "channels"))
    monkeypatch.setitem(request.METHODS, "channels", 2)
    with pytest.raises(StaleStatistic, match="was computed by method 1; this emkum has method 2"):
        reading.channels(Cache.open(own), CLS)


def test_rows_of_another_split_do_not_matter(own: Path) -> None:
    request = StatisticRequest(CLS, "channels")
    before = request.fingerprint(Cache.open(own))
    shutil.rmtree(own / "_emkum/receipts" / CLS / "none", ignore_errors=True)
    val = next(s for s in Cache.open(own).segments if s.split == "val").image.blocks(16)
    for block in val:
        (own / "_emkum/receipts" / CLS / f"{block:06d}-0.json").unlink()
    assert request.fingerprint(Cache.open(own)) == before


def test_what_is_missing_names_the_command(own: Path) -> None:
    cache = Cache.open(own)
    for call, command in (
        (lambda: reading.channels(cache, CLS, "val"), "--what channels --split val"),
        (lambda: reading.pca(cache, CLS), "--what pca"),
        (lambda: reading.codebook(cache, CLS, 8192, 7), "--what codebook --codes 8192 --seed 7"),
        (lambda: reading.duplicates(cache, CLS, 0.98), "--what duplicates --threshold 0.98"),
    ):
        with pytest.raises(MissingStatistic) as caught:
            call()
        assert caught.value.way_out == f"make it: emkum cache stats {own} --field {CLS} {command}"
    with pytest.raises(MissingField):
        reading.channels(cache, "teacher/none/image/cls")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"what": "channels"}, "channels"),
        ({"what": "pca", "components": 8}, "pca-8"),
        ({"what": "codebook"}, "codebook-1024"),
        (
            {"what": "codebook", "codes": 8, "seed": 2, "start": "rows", "iterations": 3},
            "codebook-8-seed-2-start-rows-iterations-3",
        ),
        ({"what": "duplicates", "threshold": 0.9, "split": "val"}, "duplicates-0.9@val"),
    ],
)
def test_every_setting_has_a_name_of_its_own(changes: dict, name: str) -> None:
    request = StatisticRequest(CLS, **changes)
    assert request.name == f"{CLS}/{name}"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"what": "median"}, "--what median cannot work"),
        ({"what": "pca", "components": 0}, "--components 0 cannot work"),
        ({"what": "codebook", "codes": 1}, "--codes 1 cannot work"),
        ({"what": "codebook", "seed": -1}, "--seed -1 cannot work"),
        ({"what": "codebook", "start": "random"}, "--start random cannot work"),
        ({"what": "codebook", "iterations": 0}, "--iterations 0 cannot work"),
        ({"what": "duplicates", "threshold": 1.5}, "--threshold 1.5 cannot work"),
    ],
)
def test_settings_that_cannot_work(changes: dict, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        StatisticRequest(CLS, **changes)
    assert caught.value.what == text


def test_what_no_statistic_can_be_taken_of(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache.open(own)
    for request, text in (
        (StatisticRequest("text/tinybert/ids", "channels"), "text/tinybert/ids holds ids, of which no statistic"),
        (StatisticRequest(CLS, "channels", split="test"), "has no split 'test'; it has: train, val"),
        (
            StatisticRequest(LAYERS, "duplicates"),
            f"{LAYERS} holds tokens; near-duplicates are looked for in a field of",
        ),
        (StatisticRequest(CLS, "pca", components=17), "--components 17: .* have 16 components at most"),
        (StatisticRequest(CLS, "codebook", codes=141), "--codes 141: .* has 140 vectors in this split"),
    ):
        with pytest.raises(UsageError, match=text):
            compute(cache, request)
    monkeypatch.setattr(pca, "MAX_TOKEN_WIDTH", 15)
    compute(cache, StatisticRequest(CLS, "pca", components=2))
    with pytest.raises(
        UsageError, match=f"{LAYERS} has 16 channels; the covariance is taken of 15 at most where every"
    ):
        compute(cache, StatisticRequest(LAYERS, "pca", components=2))
    make_cache(own.parent / "empty", skipped_blocks=[("cls", block) for block in range(9)])
    with pytest.raises(IncompleteCache, match=f"field {CLS} has no committed row of split train"):
        compute(Cache.open(own.parent / "empty"), StatisticRequest(CLS, "channels"))


# --- beside the rest of the cache ----------------------------------------------------------------------


def test_verify_info_and_digest_know_them(own: Path) -> None:
    plain = digest(own)
    cache = Cache.open(own)
    compute(cache, StatisticRequest(CLS, "pca", components=3))
    compute(cache, StatisticRequest(LAYERS, "channels", split="val"))
    report = verify(LocalStore(own))
    assert report.findings == ()
    assert report.notes == ()
    assert report.statistics == 2
    assert digest(own) == plain
    from emkum.shards.audit import describe, report_table, table

    assert "2 networks, 2 statistics" in report_table(LocalStore(own), report)
    description = describe(Cache.open(own))
    names = [f"{CLS}/pca-3", f"{LAYERS}/channels@val"]
    assert description["statistics"] == [{"name": name, "stale": ""} for name in names]
    assert f"statistic {names[0]}" in table(description)


@pytest.mark.parametrize("victim", ["record.json", "mean/c.0", "zarr.json", "mean/zarr.json", "../zarr.json"])
@pytest.mark.parametrize("harm", ["flip", "remove", "space"])
def test_damage_is_found_and_repaired(own: Path, victim: str, harm: str) -> None:
    request = StatisticRequest(CLS, "channels")
    first = compute(Cache.open(own), request).arrays["mean"].copy()
    path = own / "statistics" / CLS / "channels" / victim
    data = path.read_bytes()
    if harm == "remove":
        path.unlink()
    elif harm == "flip":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    else:
        path.write_bytes(data.replace(b": ", b":  ", 1) if b": " in data else data + b" ")
    report = verify(LocalStore(own))
    if victim == "record.json" and harm == "remove":  # without it there is no statistic
        assert report.findings == ()
        assert "files are not of the format" in report.notes[0]
    else:
        assert [f.path for f in report.findings] == [os.path.normpath(f"statistics/{CLS}/channels/{victim}")]
        assert report.findings[0].repairable
        if victim.endswith(("record.json", "c.0")) and (victim, harm) != ("record.json", "space"):  # the same value
            with pytest.raises(CorruptCache, match=r"cannot be trusted|does not hold the bytes|is missing") as caught:
                load(Cache.open(own), request)
            assert "the same `emkum cache stats` command makes it anew" in caught.value.way_out
        done = repair(LocalStore(own))
        assert done.left == ()
        after = verify(LocalStore(own))
        assert after.findings == ()
        assert after.notes == ()
    np.testing.assert_array_equal(compute(Cache.open(own), request).arrays["mean"], first)
    assert verify(LocalStore(own)).notes == ()


def test_repair_says_which_command_makes_it_anew(own: Path) -> None:
    from emkum.shards.audit import repair_table

    compute(Cache.open(own), StatisticRequest(CLS, "channels"))
    (own / "statistics" / CLS / "channels/std/c.0").write_bytes(b"")
    text = repair_table(repair(LocalStore(own)), False)
    assert "next: the same `emkum cache stats` commands again, for the statistics that were removed" in text
    assert "emkum extract" not in text


def test_a_record_of_another_statistic_is_refused(own: Path) -> None:
    cache = Cache.open(own)
    compute(cache, StatisticRequest(CLS, "pca", components=2))
    compute(cache, StatisticRequest(CLS, "pca", components=3))
    folder = own / "statistics" / CLS
    shutil.copy(folder / "pca-2/record.json", folder / "pca-3/record.json")
    with pytest.raises(CorruptCache, match="it is the record of"):
        load(cache, StatisticRequest(CLS, "pca", components=3))


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_at_any_moment_leaves_a_whole_one_or_none(
    own: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale statistic is replaced; a call that changes the disk fails; then the same command goes on."""
    request = StatisticRequest(CLS, "channels")
    monkeypatch.setattr(durable, "os", FaultyOs(1 << 30))
    wanted = compute(Cache.open(own), request).arrays["mean"].copy()
    record = own / "statistics" / CLS / "channels/record.json"
    stale = {key: value for key, value in json.loads(record.read_text()).items() if key != "digest"}
    stale["fingerprint"]["method"] = 0
    stale["fingerprint_digest"] = digest_of(stale["fingerprint"])

    def replaced(faulty: FaultyOs) -> bool:
        record.write_bytes(pretty_json(with_digest(stale)))
        monkeypatch.setattr(durable, "os", faulty)
        try:
            compute(Cache.open(own), request, Threads(1))
            return True
        except (StorageFailure, OSError):
            return False
        finally:
            if "power" in mode:
                faulty.cut_power()
            monkeypatch.setattr(durable, "os", FaultyOs(1 << 30))
            shutil.rmtree(own / "_emkum/claims", ignore_errors=True)  # as if its process were gone

    counted = FaultyOs(1 << 30)
    assert replaced(counted)
    failures = 0
    for fail_at in np.linspace(0, len(counted.calls) - 1, 9).astype(int).tolist():
        failures += not replaced(FaultyOs(fail_at, mode))
        left = Cache.open(own)
        for one in kept(left):
            if not one.stale:
                np.testing.assert_array_equal(load(left, request).arrays["mean"], wanted)
        np.testing.assert_array_equal(compute(Cache.open(own), request, Threads(1)).arrays["mean"], wanted)
    assert failures > 2


def test_what_another_process_has_kept_meanwhile_stays(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emkum.shards.statistics import compute as module

    request = StatisticRequest(CLS, "channels")
    real = module._make

    def slow(*arguments):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(module, "_make", real)
        compute(Cache.open(own), request, Threads(1))
        return real(*arguments)

    monkeypatch.setattr(module, "_make", slow)
    found = compute(Cache.open(own), request, Threads(2))
    assert found.record["making"]["engine"] == "1 thread"


def test_a_cache_in_an_object_store(own: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(f"{own}/", "/statistics-test/", recursive=True)
    cache = Cache.open("memory://statistics-test")
    found = compute(cache, StatisticRequest(CLS, "codebook", codes=4))
    np.testing.assert_array_equal(
        found.arrays["codes"], compute(Cache.open(own), StatisticRequest(CLS, "codebook", codes=4)).arrays["codes"]
    )
    from emkum.shards.store import open_store

    report = verify(open_store("memory://statistics-test"))
    assert (report.findings, report.notes, report.statistics) == ((), (), 1)


# --- the command ---------------------------------------------------------------------------------------


def test_the_command(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        code = cli.run(["cache", "stats", str(own), *words])
        out = capsys.readouterr()
        return code, out.out, out.err

    assert run() == (0, f"{own} keeps no statistics: --field F --what pca makes one\n", "")
    code, out, err = run("--field", CLS, "--what", "pca", "--components", "3", "--workers", "1")
    assert code == 0
    assert out.startswith(f"{CLS}/pca-3: components 3 x 16, explained_variance 3, mean 16\nof 140 vectors in ")
    assert "the components explain " in out
    assert err == f"{CLS}/pca-3: 140 vectors of 16, with 1 thread\n"
    code, out, err = run("--field", CLS, "--what", "codebook", "--codes", "4", "--json")
    told = json.loads(out)
    assert told["arrays"] == {"codes": [4, 16], "counts": [4]}
    assert told["name"] == f"{CLS}/codebook-4"
    assert 0 < told["results"]["perplexity"] <= 4
    assert "codes used, perplexity" in run("--field", CLS, "--what", "codebook", "--codes", "4")[1]
    assert " groups of " in run("--field", CLS, "--what", "duplicates", "--threshold", "0.9")[1]
    assert run("--field", CLS, "--what", "channels", "--split", "val")[0] == 0
    listing = json.loads(run("--json")[1])["statistics"]
    assert [one["name"].removeprefix(CLS) for one in listing] == [
        "/channels@val",
        "/codebook-4",
        "/duplicates-0.9",
        "/pca-3",
    ]
    assert listing[0]["command"] == f"emkum cache stats {own} --field {CLS} --what channels --split val"
    assert all(one["stale"] == "" for one in listing)
    assert f"{CLS}/pca-3: 140 vectors of 16\n" in run()[1]
    for words, text in (
        (("--what", "pca"), "--field and --what go together"),
        (("--field", CLS, "--what", "mode"), "--what mode cannot work"),
        (("--field", "x/y", "--what", "pca"), "has no field x/y; it has: image/tinyvit@2/tokens"),
        (("--field", CLS, "--what", "pca", "--workers", "0"), "--workers 0 cannot work"),
        (("--field", CLS, "--what", "channels", "--scheduler", "here"), "--scheduler here cannot work"),
    ):
        code, out, err = run(*words)
        assert code == 2
        assert text in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_in_between_leaves_nothing_and_the_same_command_begins_anew(
    tmp_path: Path, number: signal.Signals
) -> None:
    path = pooled_cache(tmp_path / "cache", clusters(20_000, 50, 64), 512)
    words = [sys.executable, "-m", "emkum.cli", "cache", "stats", str(path), "--field", CLS, "--what", "codebook"]
    words += ["--codes", "2000", "--iterations", "1000000"]
    code = "import sys; from emkum.shards.statistics import codebook; codebook.CONVERGED = -9.0; "
    code += "from emkum import cli; sys.argv = sys.argv[1:]; cli.main()"
    words[1:3] = ["-c", code, "emkum"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "20,000 vectors of 64" in process.stderr.readline()
        time.sleep(1.0)
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(30) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert rest.startswith("emkum: Interrupted: stopped by SIGTERM")
    assert not (path / "statistics").exists()
    assert verify(LocalStore(path)).findings == ()
    assert compute(Cache.open(path), StatisticRequest(CLS, "codebook", codes=20, iterations=2)).results["usage"] > 0.5
