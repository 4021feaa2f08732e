"""Identity: every entry of the fingerprint is changed by what causes it, and the cache refuses, unchanged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from sound_files import sounds_tar, tiny_ear
from test_extract import make_tar, quiet, tiny_config, word_tokenizer
from tiny_cache import save_networks, tiny_network

from emkum import errors
from emkum.models.network import Network, load_saved
from emkum.models.passes import Wanted
from emkum.models.preprocessing import Preprocessing
from emkum.shards.fingerprint import Fingerprint
from emkum.shards.layout import FORMAT, FieldSpec, field_record_path, receipt_path
from emkum.shards.reader import Cache
from emkum.shards.views import ViewPolicy
from emkum.shards.writer import CacheWriter
from emkum.stage1_extract import extract as extract_module
from emkum.stage1_extract import fields as fields_module
from emkum.stage1_extract.config import ExtractConfig

CLS = "teacher/vit/image/cls"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny networks that call themselves vit or text, and differ in one thing from those of that name."""
    vit = tiny_network("vit", "image")
    text = replace(tiny_network("text", "text", max_positions=32), tokenizer=word_tokenizer())
    looks = vit.preprocessing
    assert looks is not None
    saved: dict[str, Network] = {
        "vit": vit,
        "text": text,
        "vit-weights": tiny_network("vit", "image", seed=9),
        "vit-family": replace(vit, family="vit"),
        "vit-eps": tiny_network("vit", "image", eps=0.5),
        "vit-mean": replace(vit, preprocessing=replace(looks, mean=(0.5, 0.5, 0.5))),
        "vit-std": replace(vit, preprocessing=replace(looks, std=(0.5, 0.5, 0.5))),
        "text-words": replace(text, tokenizer=word_tokenizer().replace(b'"green"', b'"pink"')),
        "second": tiny_network("second", "image", seed=3),
        "second-text": replace(text, name="second-text"),
        "ear": tiny_ear(),
    }
    return save_networks(tmp_path_factory.mktemp("networks"), saved)


@pytest.fixture
def config(tmp_path: Path, networks: Path) -> ExtractConfig:
    """24 pictures and 24 captions, blocks of 16 rows."""
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars" / "a.tar", 24, captions=1)
    return tiny_config(tmp_path, networks, targets=("cls",))


def everything(cache: Path) -> dict[str, bytes]:
    """Every file but claims."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and "claims" not in path.parts
    }


# --- the fingerprint ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where a case happens: after the first run, before the second."""

    config: ExtractConfig
    networks: Path
    patch: pytest.MonkeyPatch


@dataclass(frozen=True)
class Case:
    """words: what the refusal says, both values in it. first: settings of the first run that the case needs.

    sounds: the teacher hears sounds, and there are some.
    """

    words: str
    cause: Callable[[Setting], ExtractConfig]
    first: dict[str, Any] = field(default_factory=dict)
    sounds: bool = False


def flag(**change: Any) -> Callable[[Setting], ExtractConfig]:
    return lambda setting: replace(setting.config, **change)


def teacher(folder: str) -> Callable[[Setting], ExtractConfig]:
    return lambda setting: replace(setting.config, teacher=(str(setting.networks / folder),))


def tokenizer(folder: str) -> Callable[[Setting], ExtractConfig]:
    return lambda setting: replace(setting.config, text_encoder=str(setting.networks / folder))


def another_emkum(name: str, value: Any) -> Callable[[Setting], ExtractConfig]:
    """A version of the code in which something of the planning is different."""

    def cause(setting: Setting) -> ExtractConfig:
        setting.patch.setattr(fields_module, name, value)
        return setting.config

    return cause


def filed_otherwise(wanted: Wanted, other: Wanted, kind: str) -> Callable[[Setting], ExtractConfig]:
    """An emkum that puts another output, or another kind of field, under an old name."""

    def cause(setting: Setting) -> ExtractConfig:
        usual = fields_module._image_wanted

        def unusual(*arguments: Any) -> dict[Wanted, tuple[str, str]]:
            found = usual(*arguments)
            return {(other if want == wanted else want): (name, kind if want == wanted else usual_kind)
                    for want, (name, usual_kind) in found.items()}  # fmt: skip

        setting.patch.setattr(fields_module, "_image_wanted", unusual)
        return setting.config

    return cause


def declared_by_another_meanwhile(setting: Setting) -> ExtractConfig:
    """A planner that was taken for dead declares a field just after another has, with other measurements."""
    cache = Path(setting.config.cache)
    hidden = field_record_path(CLS), receipt_path(CLS, 0, 0), receipt_path(CLS, 1, 0)
    records = {cache / path: (cache / path).read_bytes() for path in hidden}
    for path in records:
        path.unlink()
    measure, declare = extract_module._measure_statistics, CacheWriter.declare_field

    def measured(plan: Any) -> dict[str, Any]:
        return {name: (mean + 0.01, std) for name, (mean, std) in measure(plan).items()}

    def declared(writer: CacheWriter, spec: FieldSpec, *arguments: Any) -> None:
        if spec.name == CLS:
            for path, content in records.items():
                path.write_bytes(content)
        declare(writer, spec, *arguments)

    setting.patch.setattr(extract_module, "_measure_statistics", measured)
    setting.patch.setattr(CacheWriter, "declare_field", declared)
    return setting.config


CLS_OUTPUT, TOKENS = Wanted("vit", "cls"), Wanted("vit", "tokens", 2)
HEX = "[0-9a-f]{12}\\.\\.\\."
CASES = {
    "kind": Case(
        "kind pooled in the cache, text_pooled asked for", filed_otherwise(CLS_OUTPUT, CLS_OUTPUT, "text_pooled")
    ),
    "storage": Case("storage float32 in the cache, float16 asked for", flag(storage="float16")),
    "row_shape": Case(r"row_shape \[5, 16\] in the cache, \[17, 16\] asked for", flag(size=32)),
    "format": Case(
        f"format {FORMAT} in the cache, {FORMAT + 1} asked for",
        another_emkum("Fingerprint", functools.partial(Fingerprint, format=FORMAT + 1)),
    ),
    "weights": Case(f"weights with sha256 {HEX} in the cache, {HEX} asked for", teacher("vit-weights")),
    "family": Case("family dinov2 in the cache, vit asked for", teacher("vit-family")),
    "architecture": Case(f"architecture with sha256 {HEX} in the cache, {HEX} asked for", teacher("vit-eps")),
    "output": Case(
        "output tokens after block 2 in the cache, tokens after block 1 asked for",
        filed_otherwise(TOKENS, Wanted("vit", "tokens", 1), "tokens"),
    ),
    "compute": Case("compute type float32 in the cache, bfloat16 asked for", flag(compute="bfloat16")),
    "size": Case("crop size 16 in the cache, 32 asked for", flag(size=32)),
    "mean": Case(r"mean \[0\.485, .*\] in the cache, \[0\.5, 0\.5, 0\.5\] asked for", teacher("vit-mean")),
    "std": Case(r"std \[0\.229, .*\] in the cache, \[0\.5, 0\.5, 0\.5\] asked for", teacher("vit-std")),
    "decoder": Case(
        "decoder pillow-bicubic-draft2/1 in the cache, pillow-bilinear/9 asked for",
        another_emkum("DECODER", "pillow-bilinear/9"),
    ),
    "tokenizer": Case(f"tokenizer with sha256 {HEX} in the cache, {HEX} asked for", tokenizer("text-words")),
    "max_tokens": Case("text positions 16 in the cache, 32 asked for", flag(max_tokens=32)),
    "max_seconds": Case(r"seconds of a sound 30\.0 in the cache, 20\.0 asked for", flag(max_seconds=20), sounds=True),
    "statistics": Case(
        f"channel statistics with sha256 {HEX} in the cache, {HEX} asked for",
        declared_by_another_meanwhile,
        {"storage": "int8"},
    ),
    "layers": Case(
        r"rule of layers None in the cache, \{final_layer_norm False, last None, norm instance, prefix keep, site ffn, "
        r"skip 1\} asked for",
        flag(layers="site=ffn,skip=1,final=no"),
        {"targets": ("layers",)},
    ),
}


@pytest.mark.parametrize("entry", [entry.name for entry in dataclasses.fields(Fingerprint)])
def test_a_change_of_any_entry_is_refused_with_both_values_and_no_byte_changed(
    config: ExtractConfig, networks: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    assert entry in CASES, f"Fingerprint.{entry} is new: say here what changes it, and see it refused"
    case = CASES[entry]
    config = replace(config, **case.first)
    if case.sounds:
        sounds_tar(Path(config.data[0]) / "s.tar", 3)
        config = replace(config, teacher=(str(networks / "ear"),), targets=("mean",))
    quiet(config)
    before = everything(Path(config.cache))
    again = case.cause(Setting(config, networks, monkeypatch))
    if case.cause is not declared_by_another_meanwhile:  # which has work to do
        make_tar(Path(config.data[0]) / "b.tar", 3, seed=2, captions=1)
    with pytest.raises(errors.FingerprintMismatch, match=case.words) as caught:
        quiet(again)
    assert caught.value.exit_code == 5
    assert caught.value.way_out
    assert everything(Path(config.cache)) == before


def test_no_entry_is_empty_in_a_field_that_it_applies_to(config: ExtractConfig, networks: Path) -> None:
    quiet(replace(config, teacher=(*config.teacher, str(networks / "text"))))
    empty = {
        name: {entry for entry, value in opened.fingerprint.items() if value is None}
        for name, opened in Cache.open(config.cache).fields.items()
    }
    pixels, words, int8 = {"size", "mean", "std", "decoder"}, {"tokenizer", "max_tokens"}, {"statistics"}
    computed = {"weights", "family", "architecture", "output", "compute"}
    assert empty == {
        "image/vit@2/tokens": words | int8,
        CLS: words | int8,
        "teacher/text/text/cls": pixels | int8,
        "text/text/ids": pixels | computed | int8,
        "views/crop-0.9-1.0-seed-0/boxes": pixels - {"decoder"} | words | computed | int8,
    }


def test_another_eps_has_the_same_weights(networks: Path) -> None:
    assert load_saved(networks / "vit").weights_sha256 == load_saved(networks / "vit-eps").weights_sha256


@pytest.mark.parametrize("entry", [entry.name for entry in dataclasses.fields(Fingerprint)])
def test_every_entry_is_in_the_digest(entry: str) -> None:
    plain = Fingerprint("pooled", "float32", (4,))
    other: Any = {"row_shape": (5,), "format": FORMAT + 1, "size": 3, "max_tokens": 3, "mean": (1.0,), "std": (1.0,)}
    assert replace(plain, **{entry: other.get(entry, "other")}).digest != plain.digest


# --- the command -------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {  # exit 5
    "size": (32, "crop size 16 in the cache, 32 asked for"),
    "crop": ((0.5, 1.0), "views crop-0.9-1.0-seed-0; this run asks for crop-0.5-1.0-seed-0"),
    "flip": (True, "this run asks for crop-0.9-1.0-flip-seed-0"),
    "jitter": (0.4, "this run asks for crop-0.9-1.0-jitter-0.4-seed-0"),
    "seed": (4, "this run asks for crop-0.9-1.0-seed-4"),
    "storage": ("float16", "storage float32 in the cache, float16 asked for"),
    "compute": ("bfloat16", "compute type float32 in the cache, bfloat16 asked for"),
    "layers": ("last=1", "rule of layers None in the cache, {final_layer_norm True, last 1, norm instance, "),
    "max_tokens": (32, "text positions 16 in the cache, 32 asked for"),
    "rows_per_block": (32, "has blocks of 16 rows; this run asks for 32"),
    "split": ("val", "as split 'train'; this run asks for split 'val'"),
}
BESIDE: dict[str, Any] = {  # fields, blocks or segments of their own; what is there stays
    "teacher": lambda config, networks: (*config.teacher, str(networks / "second")),
    "encoder": lambda config, networks: str(networks / "second"),
    "text_encoder": lambda config, networks: str(networks / "second-text"),
    "cut": lambda config, networks: 1,
    "store_inputs": lambda config, networks: "crops",
    "targets": lambda config, networks: ("patches",),
    "name": lambda config, networks: "again",
    "views": lambda config, networks: 2,
    "data": lambda config, networks: (*config.data, str(make_tar(Path(config.cache).parent / "more.tar", 3, seed=4))),
}
LEFT_OUT: dict[str, Any] = {  # how much may be left out before a run stops; receipts and segments say what was
    "max_bad": 0.5,
    "on_nonfinite": "quarantine",
    "on_truncated": "keep-complete",
    "allow_missing_eof": True,
}
OF_SOUNDS = ("max_seconds",)  # refused where a field of sounds has another: CASES above
SPEED_OR_PLACE: dict[str, Any] = {
    "batch_size": 3,
    "threads": 1,
    "device": "cpu",
    "join": True,
    "cache": None,  # another cache: nothing to compare
    "logits_top": None,  # of classifiers: tests/test_layers_rules.py
    "workers": None,  # compared in the tests of many workers
    "scheduler": None,
    "from_crops": None,  # compared in tests/test_crops.py
    "label_free": None,  # whether a network may be used at all: tests/test_supervision.py
    "text_free": None,
    "allow_teacher": None,
}


def test_every_setting_of_the_command_is_identity_or_speed_or_place() -> None:
    kinds = [*REFUSED, *BESIDE, *LEFT_OUT, *OF_SOUNDS, *SPEED_OR_PLACE]
    assert len(kinds) == len(set(kinds))
    settings = {setting.name for setting in dataclasses.fields(ExtractConfig)}
    assert set(kinds) == settings, "a new setting of ExtractConfig: say here whether it can change a cached byte"


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_changes_bytes_is_refused(config: ExtractConfig, name: str) -> None:
    config = replace(config, targets=("cls", "layers"))
    quiet(config)
    before = everything(Path(config.cache))
    value, words = REFUSED[name]
    with pytest.raises(errors.IdentityMismatch) as caught:
        quiet(replace(config, **{name: value}))
    assert words in caught.value.what
    assert everything(Path(config.cache)) == before


@pytest.mark.parametrize("name", BESIDE)
def test_a_setting_that_names_something_else_goes_beside_what_is_there(
    config: ExtractConfig, networks: Path, name: str
) -> None:
    quiet(config)
    before = everything(Path(config.cache))
    num_receipts = len([path for path in before if "receipts" in path])
    change = {name: BESIDE[name](config, networks)} | ({"cut": 0} if name == "store_inputs" else {})
    quiet(replace(config, **change))
    after = everything(Path(config.cache))
    assert len([path for path in after if "receipts" in path]) > num_receipts
    grows = ("zarr.json", "scans.json")  # arrays get longer, and the times of tars are noted
    assert [path for path in before if after.get(path) != before[path] and not path.endswith(grows)] == []


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, v in (LEFT_OUT | SPEED_OR_PLACE).items() if v is not None])
def test_a_setting_of_speed_place_or_tolerance_asks_for_the_same_rows(
    config: ExtractConfig, name: str, value: Any
) -> None:
    quiet(config)
    before = everything(Path(config.cache))
    assert quiet(replace(config, **{name: value}))[-1].startswith("nothing to do: ")
    assert everything(Path(config.cache)) == before


def test_what_a_network_does_to_pixels_is_in_the_fingerprint() -> None:
    applied, told = {"mean", "std"}, {"image_size", "crop_fraction", "interpolation"}  # told: for its evaluation only
    assert {entry.name for entry in dataclasses.fields(Preprocessing)} == applied | told
    assert applied <= {entry.name for entry in dataclasses.fields(Fingerprint)}


@pytest.mark.parametrize("entry", [entry.name for entry in dataclasses.fields(ViewPolicy)])
def test_every_entry_of_a_view_policy_is_in_the_segments_identity(entry: str) -> None:
    plain = ViewPolicy(crop=(0.5, 1.0))
    change: dict[str, Any] = {
        "crop": (0.6, 1.0), "ratio": (0.5, 2.0), "flip": True, "jitter": 0.5, "seed": 3, "count": 2,
    }  # fmt: skip
    other = replace(plain, **{entry: change[entry]})
    assert other.to_json() != plain.to_json()
    assert (other.name != plain.name) == (entry != "count")  # more views of a picture go beside the first
