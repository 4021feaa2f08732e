"""Extraction from networks that are run in one piece: what is stored, what is recorded, what cannot be an encoder."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_extract
import torch
import transformers
from test_extract import quiet, word_tokenizer
from test_models_families import randomised
from test_models_whole import CONVNEXT, convnext_classifier, distilbert, saved
from test_models_whole_user import TEACHERS
from test_workers import Command
from tokenizers import Tokenizer, normalizers

from emkum import errors
from emkum.models.catalogue import load_network
from emkum.models.network import normalise
from emkum.models.tokenizer import pad_id
from emkum.models.whole import WholeNetwork
from emkum.shards.reader import Cache
from emkum.stage1_extract import live_check, workers
from emkum.stage1_extract.config import ExtractConfig

config, networks = test_extract.config, test_extract.networks  # fixtures


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    transformers.logging.disable_progress_bar()


@pytest.fixture
def teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with my_teachers.py in it."""
    (tmp_path / "my_teachers.py").write_text(TEACHERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_teachers", raising=False)
    return tmp_path


def classifier(tmp_path: Path) -> str:
    model = convnext_classifier()
    model.config.id2label = {i: f"animal {i}" for i in range(7)}
    return str(saved(randomised(model), tmp_path / "convnext"))


def text_teacher(tmp_path: Path) -> str:
    """A DistilBERT whose tokenizer is that of the tiny text encoder."""
    folder = saved(randomised(distilbert()), tmp_path / "distil")
    (folder / "tokenizer.json").write_bytes(word_tokenizer())
    return str(folder)


def test_a_classifier_beside_an_encoder(config: ExtractConfig, networks: Path, tmp_path: Path) -> None:
    folder = classifier(tmp_path)
    lines = quiet(replace(config, teacher=(folder,), encoder=str(networks / "vit"), size=32))
    cache = Cache.open(config.cache)
    assert {name for name in cache.fields if name.startswith("teacher/")} == {
        "teacher/convnext/image/cls",
        "teacher/convnext/image/logits",
    }
    logits = cache.fields["teacher/convnext/image/logits"]
    environment = logits.record["environment"]
    assert environment["labels"] == [f"animal {i}" for i in range(7)]
    assert environment["library"] == f"transformers {transformers.__version__}"
    assert (environment["supervision"], environment["source"]) == ("class_labels", folder)
    assert "labels" not in cache.fields["teacher/convnext/image/cls"].record["environment"]
    assert logits.fingerprint["family"] == "transformers/ConvNextForImageClassification"
    assert logits.row_shape == (7,)
    assert lines
    report = live_check.check_sample(
        config.cache, live_check.SampleConfig(teacher=(folder,), rows=8), [load_network(folder)]
    )
    assert not [sample for sample in report.fields if sample.wrong]
    assert {sample.field for sample in report.fields} >= {"teacher/convnext/image/logits"}


def test_the_rows_are_what_the_network_says_of_the_crops(config: ExtractConfig, networks: Path, teachers: Path) -> None:
    quiet(
        replace(
            config, teacher=("my_teachers:build",), encoder=str(networks / "vit"), size=32, store_inputs="crops", cut=0
        )
    )
    cache = Cache.open(config.cache)
    rows = np.arange(16)
    crops = torch.from_numpy(np.asarray(cache.fields["image/crops-32"].read(rows)))
    network = load_network("my_teachers:build")
    assert isinstance(network.backbone, WholeNetwork)
    with torch.inference_mode():
        expected = network.backbone.outputs(normalise(network, crops), None, ("logits", "cls"))
    for target in ("logits", "cls"):
        stored = cache.fields[f"teacher/my_teachers-build/image/{target}"].read(rows)
        np.testing.assert_allclose(stored, expected[target].numpy(), rtol=1e-5, atol=1e-6)


def test_a_changed_function_is_another_field(config: ExtractConfig, teachers: Path) -> None:
    only = replace(config, teacher=("my_teachers:build",), encoder="none", text_encoder="none", size=32)
    quiet(only)
    sys.modules.pop("my_teachers")
    (teachers / "my_teachers.py").write_text(TEACHERS + "# changed\n")
    with pytest.raises(errors.FingerprintMismatch, match="architecture"):
        quiet(only)


def test_a_network_in_one_piece_is_no_encoder(config: ExtractConfig, networks: Path, tmp_path: Path) -> None:
    folder, text = classifier(tmp_path), text_teacher(tmp_path)
    alone = replace(config, teacher=(folder,), size=32)
    with pytest.raises(errors.UsageError, match="convnext has no Transformer blocks that a student could start from"):
        quiet(alone)
    for inputs, cut in (("tokens", 0), ("crops", 0)):
        chosen = replace(alone, encoder=folder, store_inputs=inputs, cut=cut)
        with pytest.raises(errors.UnsupportedNetwork, match="--encoder convnext: it is run in one piece") as caught:
            quiet(chosen)
        assert "--encoder dinov2-s" in caught.value.way_out
    with pytest.raises(errors.UnsupportedNetwork, match="--text-encoder distil: it is run in one piece"):
        quiet(replace(config, text_encoder=text))
    with pytest.raises(errors.UsageError, match="teacher distil is run in one piece: it has no blocks") as caught:
        quiet(replace(config, teacher=(text,), text_encoder=None))
    assert "--text-encoder, with the same tokenizer" in caught.value.way_out
    assert not Path(config.cache).exists()


def test_a_text_teacher_in_one_piece_beside_a_text_encoder_of_its_tokenizer(
    config: ExtractConfig, networks: Path, tmp_path: Path
) -> None:
    quiet(replace(config, teacher=(text_teacher(tmp_path),), encoder="none"))
    cache = Cache.open(config.cache)
    assert "teacher/distil/text/layers" in cache.fields
    assert "text/text/ids" in cache.fields
    other = saved(randomised(distilbert()), tmp_path / "other")
    said = "teacher other and text encoder text have different tokenizers: they differ in .*model"
    with pytest.raises(errors.UsageError, match=said):
        quiet(replace(config, teacher=(str(other),), encoder="none", cache=tmp_path / "cache2"))


def test_a_tokenizer_that_differs_in_padding_alone_serves_and_agrees_with_a_sample(
    config: ExtractConfig, tmp_path: Path
) -> None:
    folder = text_teacher(tmp_path)
    padded = Tokenizer.from_str(word_tokenizer().decode())
    padded.enable_padding(pad_id=pad_id(word_tokenizer()), length=8)
    padded.enable_truncation(5)
    Path(folder, "tokenizer.json").write_text(padded.to_str())
    quiet(replace(config, teacher=(folder,), encoder="none", targets=("mean",)))
    cache = Cache.open(config.cache)
    digest = hashlib.sha256(word_tokenizer()).hexdigest()  # of the text encoder, as for every other teacher
    for name in ("text/text/ids", "teacher/distil/text/mean"):
        assert cache.fields[name].fingerprint["tokenizer"] == digest
    chosen = live_check.SampleConfig(teacher=(folder,), rows=8)
    report = live_check.check_sample(config.cache, chosen, [load_network(folder)])
    assert report.fields
    assert not [sample for sample in report.fields if sample.wrong]
    padded.normalizer = normalizers.Lowercase()
    Path(folder, "tokenizer.json").write_text(padded.to_str())
    with pytest.raises(errors.FingerprintMismatch, match="tokenizer with sha256"):
        live_check.check_sample(config.cache, chosen, [load_network(folder)])


@pytest.mark.parametrize(
    ("target", "why"), [("layers", "its stages have different sizes"), ("logits", "it has no classifier")]
)
def test_the_refusal_of_a_target_says_why_there_is_none(
    config: ExtractConfig, tmp_path: Path, target: str, why: str
) -> None:
    model = transformers.ConvNextModel(transformers.ConvNextConfig(**CONVNEXT))
    folder = str(saved(randomised(model), tmp_path / "convnext"))
    chosen = replace(config, teacher=(folder,), encoder="none", text_encoder="none", size=32, targets=(target,))
    said = f"target {target} of convnext .transformers/ConvNextModel.: {why}"
    with pytest.raises(errors.UnsupportedNetwork, match=said) as caught:
        quiet(chosen)
    assert caught.value.way_out == "it has cls, patches, mean"


def test_without_a_text_encoder_the_cache_keeps_the_teacher_that_cuts_the_texts(
    config: ExtractConfig, tmp_path: Path
) -> None:
    from emkum.models.network import load_saved

    quiet(replace(config, teacher=(text_teacher(tmp_path),), encoder="none", text_encoder="none", targets=("mean",)))
    cache = Cache.open(config.cache)
    assert "text/distil/ids" in cache.fields
    kept = load_saved(cache.model_dir("distil"))
    assert isinstance(kept.backbone, WholeNetwork)
    assert kept.weights_sha256 == cache.fields["teacher/distil/text/mean"].fingerprint["weights"]


def test_a_longer_text_than_it_has_positions_for_is_refused(config: ExtractConfig, tmp_path: Path) -> None:
    folder = saved(randomised(distilbert(max_position_embeddings=20)), tmp_path / "short")
    (folder / "tokenizer.json").write_bytes(word_tokenizer())
    chosen = replace(config, teacher=(str(folder),), encoder="none", text_encoder="none", max_tokens=32)
    with pytest.raises(errors.UsageError, match="--max-tokens 32, and short has 20 positions"):
        quiet(chosen)


def test_worker_processes_find_the_function_from_any_folder(
    config: ExtractConfig, teachers: Path, tmp_path: Path
) -> None:
    team = object.__new__(workers._Team)
    team._config, team._local = config, False
    sources = ("my_teachers:build", "os:getcwd", "./tars#logits", "vit#text", "beit2", "timm:resnet18")
    team._config = replace(config, teacher=sources)
    found = team._config_of(workers._Worker(1)).teacher
    assert found == (
        f"{tmp_path}/my_teachers:build",
        "os:getcwd",
        f"{tmp_path}/tars#logits",
        "vit#text",
        "beit2",
        "timm:resnet18",
    )


@pytest.mark.slow
def test_worker_processes_run_a_users_own_function(
    config: ExtractConfig, networks: Path, teachers: Path, tmp_path: Path
) -> None:
    one = replace(
        config, teacher=("my_teachers:build",), encoder=str(networks / "vit"), size=32, cache=tmp_path / "alone", cut=2
    )
    quiet(one)
    many = replace(one, cache=tmp_path / "many")
    with Command(
        many, "--encoder", str(networks / "vit"), "--workers", "2", "--size", "32", log=tmp_path / "log"
    ) as run:
        assert run.end() == 0, run.said
    ours, theirs = Cache.open(one.cache), Cache.open(many.cache)
    name = "teacher/my_teachers-build/image/logits"
    rows = np.arange(40)
    np.testing.assert_array_equal(ours.fields[name].read(rows), theirs.fields[name].read(rows))
