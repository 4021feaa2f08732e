"""What networks learned from is told by name and by structure, and refused before anything is fetched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from torch import Tensor

from emkum import cli
from emkum.errors import RefusedTeacher, UnknownNetwork, UsageError
from emkum.models import fetch
from emkum.models.catalogue import load_network
from emkum.models.convert import convert
from emkum.models.families.registry import CATALOGUE
from emkum.models.listing import show
from emkum.models.network import save_network
from emkum.models.supervision import Guard, judge, signs_in_tensors
from emkum.stage1_extract import networks as networks_module
from emkum.stage1_extract import plan
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.networks import DEFAULT_TEXT_ENCODER
from tests.test_extract import make_tar, tiny_config, word_tokenizer
from tests.test_models_beit2 import hf_model, original_state, write
from tests.test_models_families import write_tokenizer
from tests.tiny_cache import tiny_network

LABEL_FREE, TEXT_FREE = Guard(label_free=True), Guard(text_free=True)
VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "patch_size": 4}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alarm on any attempt to fetch."""

    def alarm(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", alarm)
    monkeypatch.setattr(fetch, "from_hub", alarm)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", alarm)


def refused(guard: Guard, *sources: str) -> RefusedTeacher:
    with pytest.raises(RefusedTeacher) as caught:
        guard.check(sources)
    assert caught.value.exit_code == 2
    return caught.value


# --- the catalogue ---------------------------------------------------------------------------------------

# What each flag takes, word by word of the vocabulary.
TAKEN = {
    "none": (True, True),
    "none+clip_tokenizer": (True, False),
    "paired_text": (True, False),
    "text_pairs": (False, False),
    "class_labels": (False, False),
    "paired_text+class_labels": (False, False),
    "transcripts": (False, False),
    "unknown": (False, False),
}


@pytest.mark.parametrize("supervision", TAKEN)
def test_every_word_is_taken_or_refused_by_each_flag(supervision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, "dino-s16", replace(CATALOGUE["dino-s16"], supervision=supervision))
    for guard, taken in zip((LABEL_FREE, TEXT_FREE), TAKEN[supervision], strict=True):
        if taken:
            guard.check(["dino-s16"])
        else:
            refused(guard, "dino-s16")
    Guard().check(["dino-s16"])


def test_every_entry_of_the_catalogue_has_a_word_that_is_known() -> None:
    assert {entry.supervision for entry in CATALOGUE.values()} <= set(TAKEN)


def test_names_ids_revisions_towers_and_urls_of_an_entry_are_judged_alike() -> None:
    for source in ("clip-b16", "openai/clip-vit-base-patch16", "clip-b16@v1", "clip-b16#text", "clip-b16-text"):
        assert judge(source).supervision == "paired_text"
        refused(TEXT_FREE, source)
    assert judge(CATALOGUE["beit2"].source).supervision == "none+clip_tokenizer"


def test_beit2_is_label_free_and_not_text_free_and_the_refusal_says_why_and_what_would_do() -> None:
    LABEL_FREE.check(["beit2"])
    error = refused(TEXT_FREE, "beit2")
    assert error.what == (
        "--text-free: beit2 learned from the codes of a tokenizer that was distilled from CLIP, which learned from "
        "captions (the catalogue says none+clip_tokenizer)"
    )
    assert error.way_out.startswith("use beit, ")
    assert "dinov2-s" in error.way_out
    assert "clip" not in error.way_out
    assert error.way_out.endswith("; or, if you know better, --allow-teacher beit2 takes it all the same, on record")


def test_every_refused_network_is_named_at_once_and_instead_are_networks_of_the_same_kind() -> None:
    error = refused(LABEL_FREE, "dinov2-s", "resnet50", "minilm")
    assert "resnet50 learned from labels" in error.what
    assert "minilm learned from pairs of texts that people matched" in error.what
    assert "dinov2-s learned" not in error.what
    assert "bert-base" in refused(LABEL_FREE, "minilm").way_out
    assert "dinov2-s" not in refused(LABEL_FREE, "minilm").way_out


def test_the_default_text_encoder_passes_both_flags() -> None:
    for guard in (LABEL_FREE, TEXT_FREE):
        guard.check([DEFAULT_TEXT_ENCODER])


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("microsoft/beit-base-patch16-224-pt22k-ft22k", "class_labels"),
        ("facebook/data2vec-vision-base-ft1k", "class_labels"),
        ("timm/beitv2_base_patch16_224.in1k_ft_in1k", "class_labels"),
        ("facebook/dinov2-small-imagenet1k-1-layer", "class_labels"),
        ("someone/dinov2_vitb14_lc", "class_labels"),
        ("someone/resnet50.a1_in1k", "class_labels"),
        ("someone/vit-finetuned-pets", "class_labels"),
        ("someone/beit3_base_vqa", "class_labels"),
        ("facebook/data2vec-audio-base-960h", "transcripts"),
        ("someone/audio_base_ls_10m", "transcripts"),
        ("someone/beit3_base_f30k_retrieval", "paired_text"),
        ("https://example.org/base_imagenet_ft.pt", "class_labels"),
        ("https://example.org/beit3_base_patch16_384_coco_retrieval.pth", "paired_text"),
    ],
)
def test_names_of_fine_tuned_weights_tell(name: str, word: str) -> None:
    found = judge(name)
    assert word in found.words
    assert found.words[word].startswith("its name says ")
    refused(TEXT_FREE, name)


@pytest.mark.parametrize(
    "name", ["someone/vit_small_patch16_224.dino_in1k_dino", "someone/left-soft-craft", "someone/plain"]
)
def test_other_names_tell_nothing_which_is_refused_as_unknown(name: str) -> None:
    assert judge(name).supervision == "unknown"
    error = refused(LABEL_FREE, name)
    assert error.what == f"--label-free: {name} may have learned from anything (it is not in the catalogue)"


def test_what_is_mistyped_is_unknown_and_not_refused() -> None:
    with pytest.raises(UnknownNetwork, match="'dinov2-bb' is not in the catalogue"):
        LABEL_FREE.check(["dinov2-bb"])


# --- files -----------------------------------------------------------------------------------------------


def released(folder: Path, more: dict[str, Tensor] | None = None, name: str = "beitv2_base_patch16_224_pt1k") -> Path:
    return write(folder / f"{name}.pth", original_state(hf_model()) | (more or {}))


def test_a_file_called_as_a_released_one_is_what_the_catalogue_says(tmp_path: Path, small_releases: None) -> None:
    path = released(tmp_path)
    assert judge(str(path)).supervision == "none+clip_tokenizer"
    assert judge(str(tmp_path)).supervision == "none+clip_tokenizer"
    LABEL_FREE.check([str(path)])
    assert "it is called as the file of beit2" in refused(TEXT_FREE, str(path)).what
    assert load_network(str(path)).supervision == "none+clip_tokenizer"
    assert load_network(str(path)).licence == "MIT"


@pytest.mark.parametrize("sign", ["head.weight", "fc_norm.bias", "blocks.1.attn.relative_position_bias_table"])
def test_a_fine_tuned_file_under_the_released_name_is_found_out_by_its_tensors(sign: str, tmp_path: Path) -> None:
    path = released(tmp_path, {sign: torch.zeros(4, 3)})
    assert judge(str(path)).words["class_labels"] == f"it has {sign}"
    assert "none" not in judge(str(path)).words
    assert f"learned from labels (it has {sign})" in refused(LABEL_FREE, str(path)).what


def test_a_file_by_another_name_is_unknown_though_its_tensors_tell_nothing_bad(tmp_path: Path) -> None:
    path = released(tmp_path, name="mine")
    assert judge(str(path)).supervision == "clip_tokenizer+unknown"
    assert "may have learned from anything" in refused(LABEL_FREE, str(path)).what
    assert "clip" in refused(TEXT_FREE, str(path)).what


def verdicts(source: str) -> list[bool]:
    """Which of the flags refuse it."""
    found = []
    for guard in (LABEL_FREE, TEXT_FREE):
        try:
            guard.check([source])
        except RefusedTeacher:
            found.append(True)
        else:
            found.append(False)
    return found


@pytest.mark.parametrize("name", ["beitv2_base_patch16_224_pt1k", "mine", "mine_ft1k"])
@pytest.mark.parametrize("small", [True, False])
def test_a_file_what_is_loaded_and_what_is_converted_are_judged_alike(
    name: str, small: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if small:
        request.getfixturevalue("small_releases")
    path = released(tmp_path, name=name)
    made = convert(str(path), tmp_path / "out")
    told = judge(str(path)).supervision
    assert load_network(str(path)).supervision == made.network.supervision == told
    assert judge(str(made.folder)).supervision == told == show(str(path))["supervision"]
    assert verdicts(str(path)) == verdicts(str(made.folder))
    assert verdicts(str(path)) == ([False, True] if small and name.startswith("beitv2") else [True, True])
    assert ("class_labels" in told) == (name == "mine_ft1k")


def test_signs_in_names_of_folders_survive_loading_and_conversion(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    folder = saved(transformers.Dinov2Model(config), tmp_path / "dinov2-imagenet1k-lc")
    assert load_network(folder).supervision == judge(folder).supervision == "class_labels"
    path = released(tmp_path / "finetuned", name="mine")
    made = convert(str(path.parent), tmp_path / "out")
    assert made.network.supervision == judge(str(path.parent)).supervision == "clip_tokenizer+class_labels"


def test_a_folder_that_is_run_in_one_piece_is_judged_by_its_name_as_well(tmp_path: Path) -> None:
    config = transformers.ViTMSNConfig(**VIT, image_size=8)
    folder = saved(transformers.ViTMSNModel(config), tmp_path / "msn-ft1k")
    colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 8}
    (tmp_path / "msn-ft1k/preprocessor_config.json").write_text(json.dumps(colours))
    assert load_network(folder).supervision == judge(folder).supervision == "class_labels"


def test_a_file_under_the_name_of_a_release_with_other_measures_is_none(tmp_path: Path) -> None:
    path = released(tmp_path)
    found = judge(str(path))
    assert found.release is None
    assert found.words["unknown"] == "it is called as the file of beit2 but is 24 wide where that has 768"
    assert "but is 24 wide where that has 768" in refused(LABEL_FREE, str(path)).what
    network = load_network(str(path))
    assert (network.licence, network.supervision) == ("unknown", "clip_tokenizer+unknown")
    made = convert(str(path), tmp_path / "out").network
    assert (made.name, made.licence) == (path.stem, "unknown")


def test_a_file_of_the_measures_of_a_release_is_told_by_its_shapes(tmp_path: Path) -> None:
    whole = {
        name: torch.zeros(1).expand([768 if size == 24 else size for size in tensor.shape])
        for name, tensor in original_state(hf_model()).items()
    }
    blocks = {name: tensor for name, tensor in whole.items() if name.startswith("blocks.0.")}
    for index in range(12):
        whole |= {name.replace("blocks.0.", f"blocks.{index}."): tensor for name, tensor in blocks.items()}
    patch = torch.zeros(1).expand(768, 3, 16, 16)
    path = write(tmp_path / "beitv2_base_patch16_224_pt1k.pth", whole | {"patch_embed.proj.weight": patch})
    release = judge(str(path)).release
    assert release is not None
    assert release.name == "beit2"
    LABEL_FREE.check([str(path)])


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_folders_with_the_head_of_a_task_are_found_out(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**VIT, image_size=8, num_labels=3)
    labelled = saved(transformers.ViTForImageClassification(config), tmp_path / "labelled")
    assert judge(labelled).words["class_labels"].startswith("its config.json says ViTForImageClassification")
    raw = json.loads((tmp_path / "labelled/config.json").read_text())
    (tmp_path / "labelled/config.json").write_text(json.dumps(raw | {"architectures": ["ViTModel"]}))
    assert judge(labelled).words["class_labels"] == "it has classifier.bias"
    plain = saved(transformers.ViTModel(config, add_pooling_layer=False), tmp_path / "plain")
    assert judge(plain).supervision == "unknown"
    assert judge(plain).modality == "image"


def test_networks_of_a_family_that_always_had_text_are_found_out(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**VIT, image_size=8)
    folder = saved(transformers.CLIPVisionModel(config), tmp_path / "vision")
    assert judge(folder).words["paired_text"] == "every clip-vision network of the catalogue has paired_text"
    assert load_network(folder).supervision == "paired_text+unknown" == judge(folder).supervision
    LABEL_FREE_AND_NAMED = Guard(label_free=True, allowed=(folder,))
    LABEL_FREE_AND_NAMED.check([folder])


def test_heads_of_questions_and_of_sentences_are_found_out(tmp_path: Path) -> None:
    small = {key: VIT[key] for key in VIT if key != "patch_size"}
    config = transformers.BertConfig(**small, vocab_size=9, num_labels=2)
    folder = saved(transformers.BertForSequenceClassification(config), tmp_path / "answers")
    write_tokenizer(Path(folder))
    assert "class_labels" in judge(folder).words


@pytest.mark.parametrize(
    ("shapes", "word"),
    [
        ({"head.weight": (1000, 768)}, "class_labels"),
        ({"heads.head.weight": (10, 8)}, "class_labels"),
        ({"classifier.1.weight": (10, 8)}, "class_labels"),
        ({"model.classifier.out_proj.weight": (10, 8)}, None),
        ({"qa_outputs.weight": (2, 8)}, "class_labels"),
        ({"linear_head.weight": (10, 8)}, "class_labels"),
        ({"visual_projection.weight": (8, 8)}, "paired_text"),
        ({"logit_scale": ()}, "paired_text"),
        ({"feature_extractor.conv_layers.0.conv.weight": (8, 1, 3), "lm_head.weight": (32, 8)}, "transcripts"),
        ({"feature_extractor.conv_layers.0.conv.weight": (8, 1, 3), "lm_head.weight": (8192, 8)}, None),
        ({"feature_extractor.conv_layers.0.conv.weight": (8, 1, 3), "a.decoder.proj.weight": (8, 8)}, None),
        ({"lm_head.weight": (32, 8)}, None),  # codes of pictures, in a toy
        ({"head.mlp.0.weight": (8, 8), "head.last_layer.weight_v": (8, 8)}, None),  # DINO's own
        ({"decoder.norm.weight": (8,), "mask_token": (1, 1, 8)}, None),
    ],
)
def test_signs_in_tensors(shapes: dict[str, tuple[int, ...]], word: str | None) -> None:
    assert set(signs_in_tensors(shapes, {})) == ({word} if word else set())


@pytest.mark.parametrize(
    ("architecture", "word"),
    [
        ("Data2VecAudioForCTC", "transcripts"),
        ("BeitForSemanticSegmentation", "class_labels"),
        ("BertForQuestionAnswering", "class_labels"),
        ("BertForMaskedLM", None),
        ("BeitForMaskedImageModeling", None),
    ],
)
def test_signs_in_configurations(architecture: str, word: str | None) -> None:
    assert set(signs_in_tensors({}, {"architectures": [architecture]})) == ({word} if word else set())


def test_a_saved_network_is_what_its_record_says(tmp_path: Path) -> None:
    for supervision in ("none", "class_labels", "unknown"):
        network = replace(tiny_network("vit", "image"), supervision=supervision)
        save_network(network, tmp_path / supervision)
        assert judge(str(tmp_path / supervision)).supervision == supervision
    LABEL_FREE.check([str(tmp_path / "none")])
    refused(LABEL_FREE, str(tmp_path / "unknown"))


def test_what_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "damaged.pth").write_bytes(b"no")
    assert judge(str(tmp_path / "damaged.pth")).supervision == "unknown"
    (tmp_path / "model.json").write_text("{")
    assert judge(str(tmp_path)).supervision == "unknown"


def test_of_a_checkpoint_only_names_and_shapes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.ViTConfig(**VIT, image_size=8)
    folder = saved(transformers.ViTModel(config, add_pooling_layer=False), tmp_path / "plain")
    from emkum.models.families.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    assert judge(folder).supervision == "unknown"


# --- exceptions by name ----------------------------------------------------------------------------------


def test_an_exception_must_name_a_network_exactly_as_the_command_does() -> None:
    Guard(text_free=True, allowed=("beit2",)).check(["beit2", "dinov2-s"])
    with pytest.raises(UsageError, match="--allow-teacher beit-2: no network of this command is called that") as caught:
        Guard(text_free=True, allowed=("beit-2",)).check(["beit2", "dinov2-s"])
    assert caught.value.way_out == "name one of beit2, dinov2-s"
    assert "clip-b16" in refused(Guard(text_free=True, allowed=("beit2",)), "beit2", "clip-b16").what
    with pytest.raises(UsageError, match="without --label-free or --text-free"):
        Guard(allowed=("beit2",))


def test_what_a_network_says_once_it_is_loaded_is_held_to_as_well() -> None:
    with pytest.raises(RefusedTeacher, match="it says so itself"):
        LABEL_FREE.check_loaded("mine:net", "class_labels", "image")
    LABEL_FREE.check_loaded("mine:net", "none", "image")
    Guard(label_free=True, allowed=("mine:net",)).check_loaded("mine:net", "class_labels", "image")
    Guard().check_loaded("mine:net", "class_labels", "image")


# --- extract ---------------------------------------------------------------------------------------------


@pytest.fixture
def networks(tmp_path: Path) -> Path:
    for name, supervision in (("vit", "none"), ("labelled", "class_labels"), ("text", "none")):
        network = tiny_network(name, "text" if name == "text" else "image")
        tokenizer = word_tokenizer() if name == "text" else None
        save_network(replace(network, supervision=supervision, tokenizer=tokenizer), tmp_path / "networks" / name)
    return tmp_path / "networks"


@pytest.fixture
def config(tmp_path: Path, networks: Path) -> ExtractConfig:
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars/a.tar", 4, captions=1)
    return tiny_config(tmp_path, networks, targets=("cls",))


@pytest.mark.parametrize("place", ["teacher", "encoder", "text_encoder"])
def test_teachers_and_encoders_are_refused_before_anything_is_done(
    place: str, config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "find_tars", lambda data: pytest.fail("the tars were looked at"))
    monkeypatch.setattr(networks_module, "load_network", lambda source, name: pytest.fail("a network was loaded"))
    named = {"teacher": ("resnet50",)} if place == "teacher" else {place: "resnet50"}
    with pytest.raises(RefusedTeacher, match="resnet50 learned from labels"):
        plan.survey(replace(config, label_free=True, **named))  # type: ignore[arg-type]


def test_the_guard_and_its_exceptions_are_recorded_and_change_no_fingerprint(
    config: ExtractConfig, networks: Path
) -> None:
    from emkum.shards.reader import Cache
    from emkum.stage1_extract.extract import extract

    labelled = str(networks / "labelled")
    fields = {}
    for folder, change in {
        "open": {},
        "free": {"label_free": True},
        "but": {"text_free": True, "teacher": (labelled,), "encoder": labelled, "allow_teacher": (labelled,)},
    }.items():
        cache = Path(config.cache).with_name(folder)
        extract(replace(config, cache=cache, **change), say=lambda line: None)  # type: ignore[arg-type]
        found = Cache.open(cache)
        fields[folder] = {path: found.field(path).record for path in found.fields if "/cls" in path}
    (plain,), (free,), (but,) = (records.values() for records in fields.values())
    assert "guard" not in plain["environment"]
    assert free["environment"]["guard"] == "label-free"
    assert "allowed_by_name" not in free["environment"]
    assert plain["fingerprint"] == free["fingerprint"]
    assert but["environment"]["guard"] == "text-free"
    assert but["environment"]["allowed_by_name"] == [labelled]
    assert but["environment"]["supervision"] == "class_labels"


def test_the_command_refuses_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["extract", "--data", str(tmp_path), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    assert cli.run([*words, "--teacher", "resnet50", "--label-free"]) == 2
    assert "RefusedTeacher: --label-free: resnet50 learned from labels" in capsys.readouterr().err
    assert cli.run([*words, "--teacher", "dinov2-s", "--encoder", "beit2", "--text-free"]) == 2
    assert "--text-free: beit2" in capsys.readouterr().err
    assert cli.run([*words, "--teacher", "resnet50", "--label-free", "--allow-teacher", "resnet101"]) == 2
    shown = capsys.readouterr()
    assert "--allow-teacher resnet101: no network of this command is called that" in shown.err
    assert "taken by name" not in shown.out + shown.err
    assert cli.run([*words, "--teacher", "resnet50", "--label-free", "--allow-teacher", "resnet50"]) == 2
    shown = capsys.readouterr()
    assert "NoData" in shown.err
    assert "taken by name whatever they learned from: resnet50; the fields this begins say so" in shown.out + shown.err
    assert not (tmp_path / "cache").exists()
