"""Targets from the networks to the cache: rules of `layers`, means, top logits, the prenet; shared blocks run once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_extract import make_tar, objects, quiet, tiny_config, word_tokenizer
from test_models_targets import rule_reference
from tiny_cache import save_networks, tiny_classifier, tiny_network

from emkum import errors
from emkum.models import targets
from emkum.models.network import Network, load_saved, normalise
from emkum.models.passes import FrozenPass, Wanted, default_rule, rule_of
from emkum.models.targets import LayersRule, named_rule
from emkum.shards.audit import describe
from emkum.shards.digest import digest
from emkum.shards.reader import Cache
from emkum.shards.repair import repair
from emkum.shards.store import LocalStore
from emkum.shards.verify import verify
from emkum.stage1_extract import fields
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract
from emkum.stage1_extract.live_check import SampleConfig, check_sample, load_teachers, require_agreement

CLASSES = 7
LAYERS, TEXT_LAYERS = "teacher/vit/image/layers", "teacher/text/text/layers"
TOP = "teacher/classes/image/logits-top"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: vit (4 blocks, one register), prenet (its first 2 blocks are one), tail (vit's first 2 blocks, then
    its own), other (shares nothing), text, classes (a ResNet with logits).
    """
    tail = tiny_network("tail", "image", num_registers=1)
    with torch.no_grad():
        tail.backbone.stack.blocks[2].qkv.weight.add_(0.1)
    saved: dict[str, Network] = {
        "vit": tiny_network("vit", "image", num_registers=1),
        "prenet": tiny_network("prenet", "image", seed=4, prenet=2, norm_order="post", final_norm=False),
        "tail": tail,
        "other": tiny_network("other", "image", seed=9),
        "text": replace(tiny_network("text", "text"), tokenizer=word_tokenizer()),
        "classes": tiny_classifier("classes", classes=CLASSES),
    }
    return save_networks(tmp_path_factory.mktemp("networks"), saved)


@pytest.fixture
def config(tmp_path: Path, networks: Path) -> ExtractConfig:
    """20 pictures with 20 captions, blocks of 16 rows, float32."""
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars" / "a.tar", 20, captions=1)
    return tiny_config(tmp_path, networks, targets=("layers",))


def crops(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)


def blocks_of(network: Network, crops_BHWC: torch.Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs and feed-forward outputs of every block, float64 arrays."""
    out = network.backbone.run(network.backbone.embed(normalise(network, crops_BHWC)))
    return [h.double().numpy() for h in out.hidden], [f.double().numpy() for f in out.ffn]


RULES = [
    *(named_rule(name, "image", prenet=1) for name in targets.RULES),
    LayersRule("ffn", 2, 1, "layer", False, "keep"),
    LayersRule("block", None, 0, "none", True, "drop"),
]


# --- the pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.words)
def test_a_pass_gives_the_layers_of_a_rule(networks: Path, rule: LayersRule) -> None:
    vit = load_saved(networks / "vit")
    found = FrozenPass([vit], [Wanted("vit", "layers", rule=rule)], "float32", "cpu").pictures(crops())[0]
    want = rule_reference(rule, *blocks_of(vit, crops()), [6] * 3, vit.num_prefix)
    np.testing.assert_allclose(found.numpy(), want, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.words)
def test_a_network_that_wants_layers_borrows_the_blocks_it_shares(networks: Path, rule: LayersRule) -> None:
    vit, tail = load_saved(networks / "vit"), load_saved(networks / "tail")
    wanted = [Wanted("vit", "layers"), Wanted("tail", "layers", rule=rule), Wanted("tail", "mean")]
    together = FrozenPass([vit, tail], wanted, "float32", "cpu")
    outputs = together.pictures(crops())
    assert together.shared_blocks == {"tail": ("vit", 2)}
    assert together.block_runs == 4 + 2  # vit whole, of tail only what differs
    assert [together.own_blocks(name) for name in ("vit", "tail")] == [4, 2]
    for want, got in zip(wanted, outputs, strict=True):
        alone = FrozenPass([vit if want.network == "vit" else tail], [want], "float32", "cpu").pictures(crops())[0]
        torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-6)


def test_a_lender_of_which_nothing_is_wanted_itself_runs_only_what_is_borrowed(networks: Path) -> None:
    vit, tail = load_saved(networks / "vit"), load_saved(networks / "tail")
    wanted = [Wanted("vit", "cls"), Wanted("tail", "layers")]
    whole = FrozenPass([vit, tail], wanted, "float32", "cpu")
    part = whole.pictures(crops(), wanted[1:])[0]
    assert whole.block_runs == 2 + 2
    alone = FrozenPass([tail], wanted[1:], "float32", "cpu").pictures(crops())[0]
    torch.testing.assert_close(part, alone, rtol=1e-6, atol=1e-6)


def test_two_rules_and_a_cut_of_one_network_take_one_run(networks: Path) -> None:
    vit = load_saved(networks / "vit")
    wanted = [Wanted("vit", "tokens", 2), *(Wanted("vit", "layers", rule=rule) for rule in RULES)]
    frozen = FrozenPass([vit], wanted, "float32", "cpu")
    frozen.pictures(crops())
    assert frozen.block_runs == 4


def test_texts_leave_pads_out_of_every_rule_and_of_the_mean(networks: Path) -> None:
    text = load_saved(networks / "text")
    ids = torch.randint(4, 14, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths = [9, 5, 1]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    out = text.backbone.run(text.backbone.embed(ids, mask), mask_BT=mask)
    hidden, ffn = [h.double().numpy() for h in out.hidden], [f.double().numpy() for f in out.ffn]
    rules = [named_rule(name, "text") for name in targets.RULES]
    wanted = [Wanted("text", "mean"), *(Wanted("text", "layers", rule=rule) for rule in rules)]
    mean, *layers = FrozenPass([text], wanted, "float32", "cpu").texts(ids, mask)
    for rule, found in zip(rules, layers, strict=True):
        np.testing.assert_allclose(found.numpy(), rule_reference(rule, hidden, ffn, lengths, 1), atol=1e-5)
        assert not found[~mask].any()
    want = [hidden[-1][i, :length].mean(0) for i, length in enumerate(lengths)]  # there is no final norm
    np.testing.assert_allclose(mean.numpy(), want, atol=1e-6)


def test_the_mean_of_pictures_is_of_the_patches_and_a_convnet_has_one_too(networks: Path) -> None:
    vit, classes = load_saved(networks / "vit"), load_saved(networks / "classes")
    mean, patches = FrozenPass([vit], [Wanted("vit", "mean"), Wanted("vit", "patches")], "float32", "cpu").pictures(
        crops()
    )
    torch.testing.assert_close(mean, patches.mean(1))
    wanted = [Wanted("classes", what) for what in ("mean", "patches", "logits")]
    wanted.append(Wanted("classes", "top_logits", top=3))
    mean, patches, logits, top = FrozenPass([classes], wanted, "float32", "cpu").pictures(crops())
    torch.testing.assert_close(mean, patches.mean(1))
    assert torch.equal(top, targets.packed(targets.top_logits(logits, 3)))


@pytest.mark.parametrize(
    ("name", "want", "words", "way_out"),
    [
        ("vit", {"what": "layers", "rule": LayersRule(skip=4)}, "layers of vit but the first 4: it has 4", "at most 3"),
        ("text", {"what": "layers", "rule": LayersRule(prefix="drop")}, "without CLS and registers", "prefix=keep"),
        ("classes", {"what": "top_logits", "top": CLASSES}, "the 7 largest logits of classes, which has 7", "1 to 6"),
        ("vit", {"what": "top_logits", "top": 2}, "target logits-top of vit, a dinov2 network", "a classifier"),
        ("classes", {"what": "layers"}, "target layers of classes, a resnet network", "needs a Transformer"),
    ],
)
def test_what_a_network_cannot_give_is_refused(
    networks: Path, name: str, want: dict[str, Any], words: str, way_out: str
) -> None:
    with pytest.raises(errors.UnsupportedNetwork) as caught:
        FrozenPass([load_saved(networks / name)], [Wanted(name, **want)], "float32", "cpu")
    assert words in caught.value.what
    assert way_out in caught.value.way_out


@pytest.mark.parametrize(
    ("family", "modality", "changes", "rule"),
    [
        ("dinov2", "image", {}, named_rule("thesis", "image")),
        ("bert", "text", {}, named_rule("thesis", "text")),
        ("data2vec-vision", "image", {"depth": 12}, named_rule("data2vec", "image")),
        ("data2vec-text", "text", {"depth": 12}, named_rule("data2vec", "text")),
        ("nobody-knows", "image", {}, named_rule("thesis", "image")),
        ("data2vec2-image", "image", {"depth": 12, "prenet": 2}, named_rule("data2vec2", "image", prenet=2)),
        ("data2vec2-image", "image", {"depth": 24}, replace(named_rule("data2vec2", "image"), last=18)),
        ("data2vec2-image", "image", {"depth": 32}, replace(named_rule("data2vec2", "image"), last=24)),
        ("data2vec2-image-ema", "image", {"depth": 24}, replace(named_rule("data2vec2", "image"), last=18)),
        ("data2vec2-image-ema", "image", {"depth": 32}, replace(named_rule("data2vec2", "image"), last=24)),
        ("dinov2", "image", {"depth": 24}, named_rule("thesis", "image")),
    ],
)
def test_a_network_follows_the_rule_it_was_trained_with(
    family: str, modality: str, changes: dict[str, Any], rule: LayersRule
) -> None:
    network = replace(tiny_network("n", modality, **changes), family=family)
    assert default_rule(network) == rule
    assert rule_of(network, "site=ffn,last=2") == replace(named_rule("thesis", modality), site="ffn", last=2)


@pytest.mark.parametrize("text", ["last=4", "last=40", "skip=1,last=3", "skip=1,last=9"])
def test_the_last_so_many_blocks_that_are_all_are_all(text: str) -> None:
    skip = 1 if "skip" in text else 0
    assert rule_of(tiny_network("n", "image"), text) == replace(named_rule("thesis", "image"), skip=skip)
    assert rule_of(tiny_network("n", "image"), "last=3").last == 3


def test_a_convnets_logits_are_of_a_float32_classifier_whatever_the_rest_computes_in(networks: Path) -> None:
    classes = load_saved(networks / "classes")
    wanted = [Wanted("classes", "logits"), Wanted("classes", "cls")]
    logits, pooled = FrozenPass([classes], wanted, "bfloat16", "cpu").pictures(crops())
    head = classes.backbone.head
    assert torch.equal(logits, torch.nn.functional.linear(pooled, head.weight, head.bias))
    assert not torch.equal(logits, logits.bfloat16().float())


# --- the cache -----------------------------------------------------------------------------------------------


def crops_of(cache: Cache, config: ExtractConfig) -> torch.Tensor:
    """The crops that the rows were computed from, in row order."""
    from emkum.shards.views import Box, replay_view

    boxes = next(field for name, field in cache.fields.items() if name.startswith("views/"))
    found = []
    for sample in cache.samples("train").to_pylist():
        data = (Path(config.data[0]) / sample["tar"]).read_bytes()[sample["offset"] :][: sample["size"]]
        found.append(replay_view(data, 16, Box.from_row(boxes.values(np.array([sample["image_row"]]))[0])))
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize(
    ("flag", "rule"),
    [
        (None, named_rule("thesis", "image")),
        ("thesis", named_rule("thesis", "image")),
        ("data2vec", LayersRule("block", None, 0, "layer", True, "drop")),  # the last 6 of 4 blocks are all
        ("data2vec2", named_rule("data2vec2", "image")),
        ("site=ffn,last=2,norm=layer,final=no,prefix=drop", LayersRule("ffn", 2, 0, "layer", False, "drop")),
    ],
)
def test_a_field_of_layers_is_what_its_rule_says_and_says_which(
    config: ExtractConfig, networks: Path, flag: str | None, rule: LayersRule
) -> None:
    quiet(replace(config, layers=flag))
    cache = Cache.open(config.cache)
    field = cache.field(LAYERS)
    vit = load_saved(networks / "vit")
    want = rule_reference(rule, *blocks_of(vit, crops_of(cache, config)), [6] * 20, vit.num_prefix)
    np.testing.assert_allclose(field.values(field.rows("train")), want, atol=2e-5)
    assert field.fingerprint["output"] == rule.words
    assert targets.recorded_rule(field.fingerprint, "image") == rule
    is_thesis = rule == named_rule("thesis", "image")
    assert ("layers" in field.fingerprint) != is_thesis  # old digests stay
    assert is_thesis or field.fingerprint["layers"] == rule.to_json()


def test_the_thesis_by_its_name_or_by_keys_goes_on_with_a_cache_made_without_a_rule(config: ExtractConfig) -> None:
    quiet(config)
    before = objects(config.cache)
    for flag in ("thesis", "last=4", "site=block,last=all,skip=0,norm=instance,final=yes,prefix=keep"):
        assert quiet(replace(config, layers=flag))[-1].startswith("nothing to do: ")
    assert objects(config.cache) == before


def test_another_rule_for_the_same_field_is_refused_with_both_and_goes_beside_it_under_a_name(
    config: ExtractConfig, networks: Path
) -> None:
    quiet(replace(config, layers="data2vec"))
    with pytest.raises(errors.FingerprintMismatch) as caught:
        quiet(replace(config, layers="site=block,last=6,norm=layer,prefix=drop,final=no"))
    assert "output mean over all blocks of layer-normalised outputs, layer norm, CLS and" in caught.value.what
    assert (
        "rule of layers {final_layer_norm True, last None, norm layer, prefix drop, site block, skip 0} in the cache, "
        in (caught.value.what)
    )
    assert "{final_layer_norm False, " in caught.value.what
    assert "--name" in caught.value.way_out
    quiet(replace(config, layers="thesis", name="vit-thesis", encoder=str(networks / "vit")))
    cache = Cache.open(config.cache)
    assert cache.field("teacher/vit-thesis/image/layers").row_shape == (6, 16)
    assert cache.field(LAYERS).row_shape == (4, 16)


@pytest.mark.parametrize(
    ("flag", "way_back"),
    [(None, "thesis"), ("last=2,prefix=drop", "site=block,last=2,skip=0,norm=instance,final=yes,prefix=drop")],
)
def test_the_refusal_of_another_rule_names_the_flag_that_goes_on(
    config: ExtractConfig, flag: str | None, way_back: str
) -> None:
    quiet(replace(config, layers=flag))
    with pytest.raises(errors.FingerprintMismatch) as caught:
        quiet(replace(config, layers="data2vec2"))
    assert f"--layers {way_back}; or give the teacher another name with --name" in caught.value.way_out
    assert quiet(replace(config, layers=way_back))[-1].startswith("nothing to do: ")
    with pytest.raises(errors.FingerprintMismatch) as caught:  # not the rule alone
        quiet(replace(config, layers="data2vec2", storage="float16", encoder="none"))
    assert caught.value.way_out.startswith("repeat the settings of the cache")


def test_a_default_target_that_is_new_beside_others_is_said(config: ExtractConfig) -> None:
    quiet(replace(config, targets=("cls", "layers")))
    said = "\n".join(quiet(replace(config, targets=())))
    assert (
        "new field teacher/vit/image/patches beside cls, layers: the default targets of vit are now cls, patches; "
        "--targets cls,layers goes on with what is there" in said
    )
    assert "new field" not in "\n".join(quiet(replace(config, targets=("mean",))))  # which was named
    assert "new field" not in "\n".join(quiet(replace(config, targets=(), views=2)))  # they are there
    assert "new field" not in "\n".join(quiet(replace(config, targets=(), name="beside")))


def test_a_text_teachers_layers_follow_the_rule_and_its_mean_is_pooled(config: ExtractConfig, networks: Path) -> None:
    quiet(replace(config, teacher=(str(networks / "text"),), targets=("layers", "mean"), layers="data2vec"))
    cache = Cache.open(config.cache)
    field, mean, ids = (cache.field(name) for name in (TEXT_LAYERS, "teacher/text/text/mean", "text/text/ids"))
    text, rows = load_saved(networks / "text"), field.rows("train")
    lengths = ids.lengths(rows)
    mask = torch.from_numpy(np.arange(16) < lengths[:, None])
    tokens = text.backbone.embed(torch.from_numpy(ids.read(rows)).long(), mask)
    out = text.backbone.run(tokens, mask_BT=mask)
    rule = named_rule("data2vec", "text")
    want = rule_reference(rule, [], [f.double().numpy() for f in out.ffn], lengths.tolist(), 1)
    np.testing.assert_allclose(field.values(rows), want, atol=2e-5)
    assert (field.kind, mean.kind, mean.row_shape) == ("ragged", "text_pooled", (12,))
    np.testing.assert_allclose(mean.values(rows), targets.mean(out.hidden[-1], mask_BT=mask).numpy(), atol=2e-5)
    assert mean.fingerprint["output"].startswith("mean of the real tokens, special ones among them")


def test_one_rule_holds_for_teachers_of_pictures_and_of_texts_each_as_it_is_for_them(
    config: ExtractConfig, networks: Path
) -> None:
    teachers = (str(networks / "prenet"), str(networks / "text"))
    quiet(replace(config, teacher=teachers, layers="data2vec2", cut="prenet"))
    cache = Cache.open(config.cache)
    image, text = cache.field("teacher/prenet/image/layers"), cache.field(TEXT_LAYERS)
    assert image.fingerprint["layers"] == named_rule("data2vec2", "image", prenet=2).to_json()
    assert text.fingerprint["layers"] == named_rule("data2vec2", "text").to_json()
    assert image.row_shape == (4, 16)
    tokens = cache.field("image/prenet@2/tokens")  # the cut lies after the prenet
    prenet = load_saved(networks / "prenet")
    seen = crops_of(cache, config)
    hidden = prenet.backbone.run(prenet.backbone.embed(normalise(prenet, seen)), 0, 2).hidden[-1]
    np.testing.assert_allclose(tokens.values(tokens.rows("train")), hidden.numpy(), atol=2e-5)
    assert quiet(replace(config, teacher=teachers, layers="data2vec2", cut=2))[-1].startswith("nothing to do: ")


@pytest.mark.parametrize(
    ("change", "words", "way_out"),
    [
        ({"cut": "prenet"}, "--cut prenet of vit, a dinov2 network, which has no prenet blocks", "between 0"),
        ({"layers": "thesis", "targets": ("cls",)}, "--layers thesis, and layers is no target", "--targets layers"),
        ({"logits_top": 3}, "--logits-top 3, and no teacher of", "a classifier"),
        ({"logits_top": 3, "targets": ("logits",)}, "target logits-top of vit", "a classifier"),
    ],
)
def test_a_flag_that_has_no_effect_or_no_meaning_is_refused_before_anything_is_made(
    config: ExtractConfig, change: dict[str, Any], words: str, way_out: str
) -> None:
    with pytest.raises(errors.UsageError) as caught:
        quiet(replace(config, **change))
    assert words in caught.value.what
    assert way_out in caught.value.way_out
    assert not list(Path(config.cache).glob("teacher"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cut": "postnet"}, "--cut postnet"),
        ({"cut": -1}, "--cut -1"),
        ({"layers": "d2v"}, "--layers d2v: no such rule"),
        ({"logits_top": 0}, "--logits-top 0"),
        ({"targets": ("median",)}, "unknown target median"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(change: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.UsageError, match=words):
        ExtractConfig(teacher=("vit",), **change)


# --- top logits on disk --------------------------------------------------------------------------------------


@pytest.fixture
def top(config: ExtractConfig, networks: Path) -> ExtractConfig:
    """The 3 largest of 7 logits, and in a cache of its own all of them."""
    return replace(config, teacher=(str(networks / "classes"),), targets=("logits",), encoder="none", logits_top=3)


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_the_largest_logits_are_kept_with_their_classes_and_the_rest(
    top: ExtractConfig, tmp_path: Path, storage: str
) -> None:
    import zarr

    quiet(replace(top, storage=storage))
    assert Cache.open(top.cache).field(TOP).record["environment"]["classes"] == CLASSES
    quiet(replace(top, logits_top=None, cache=tmp_path / "all"))
    cache = Cache.open(top.cache)
    field, whole = cache.field(TOP), Cache.open(tmp_path / "all").field("teacher/classes/image/logits")
    assert "teacher/classes/image/logits" not in cache.fields  # in place of all
    rows = field.rows("train")
    want = targets.top_logits(torch.from_numpy(whole.values(rows)), 3)
    assert (field.kind, field.storage) == ("top_logits", "float16" if storage == "int8" else storage)
    classes, values = field.classes(rows), field.values(rows)
    assert (classes.dtype, classes.shape, values.shape) == (np.int32, (20, 3), (20, 4))
    np.testing.assert_array_equal(classes, want.classes_BK.numpy())
    expected = np.concatenate([want.values_BK.numpy(), want.rest_B[:, None].numpy()], 1)
    np.testing.assert_allclose(values, expected, rtol=0 if storage == "float32" else 1e-3)
    softmax = torch.from_numpy(whole.values(rows)).double().softmax(1).numpy()
    kept = torch.from_numpy(values).double().softmax(1).numpy()[:, :3]  # e^rest is the sum of the others
    tolerance = 1e-5 if storage == "float32" else 0.1  # float16 rounds a logit of 100 by up to 0.03
    np.testing.assert_allclose(kept, np.take_along_axis(softmax, classes.astype(np.int64), 1), rtol=tolerance)
    assert field.fingerprint["output"] == "the 3 largest classifier logits, log-sum-exp of the others"
    plain = zarr.open_array(f"{top.cache}/{TOP}/classes", mode="r")
    assert plain.metadata.dimension_names == ("image_row", "view", "rank")
    np.testing.assert_array_equal(np.asarray(plain)[rows, 0], classes)
    plain = zarr.open_array(f"{top.cache}/{TOP}/values", mode="r")
    assert plain.metadata.dimension_names == ("image_row", "view", "logit")


def test_one_logit_alone_and_another_number_of_them(top: ExtractConfig) -> None:
    quiet(replace(top, logits_top=1))
    field = Cache.open(top.cache).field(TOP)
    assert field.classes(field.rows("train")).shape == (20, 1)
    with pytest.raises(errors.FingerprintMismatch, match=r"row_shape \[2\] in the cache, \[4\] asked for") as caught:
        quiet(top)
    assert "--logits-top 1; or give the teacher another name with --name" in caught.value.way_out


def test_logits_that_were_rounded_are_not_mixed_with_exact_ones(
    top: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = replace(top, compute="bfloat16", logits_top=None, targets=("cls", "logits"))
    with monkeypatch.context() as before:
        before.setattr(fields, "EXACT", "")
        quiet(narrow)
    with pytest.raises(errors.FingerprintMismatch, match="classifier logits in the cache, classifier logits, float32"):
        quiet(narrow)
    quiet(replace(narrow, targets=("cls",)))  # which is as it was
    with pytest.raises(errors.FingerprintMismatch) as caught:
        quiet(narrow)
    assert caught.value.way_out.startswith("they were rounded to bfloat16 by emkum 0.2 and are not any more: give the")
    quiet(replace(top, name="exact", logits_top=None))
    fingerprint = Cache.open(top.cache).field("teacher/exact/image/logits").fingerprint
    assert (fingerprint["compute"], fingerprint["output"]) == ("float32", "classifier logits")


@pytest.mark.parametrize(
    ("chosen", "fields"),
    [
        ((), ["cls", "logits-top"]),
        (("cls",), ["cls", "logits-top"]),
        (("logits", "mean"), ["logits-top", "mean"]),
    ],
)
def test_where_the_largest_logits_stand_among_the_targets(
    top: ExtractConfig, chosen: tuple[str, ...], fields: list[str]
) -> None:
    quiet(replace(top, targets=chosen))
    found = Cache.open(top.cache).fields
    assert [name.rpartition("/")[2] for name in sorted(found) if name.startswith("teacher/")] == fields


def test_top_logits_of_several_teachers_are_those_of_the_classifiers(top: ExtractConfig, networks: Path) -> None:
    quiet(replace(top, teacher=(*top.teacher, str(networks / "vit")), targets=("cls",)))
    found = Cache.open(top.cache).fields
    assert TOP in found
    assert "teacher/vit/image/logits-top" not in found


def test_info_verify_digest_and_a_sample_know_the_new_targets(top: ExtractConfig, networks: Path) -> None:
    teachers = (*top.teacher, str(networks / "vit"), str(networks / "text"))
    quiet(replace(top, teacher=teachers, targets=("mean",)))
    quiet(replace(top, teacher=teachers[1:], targets=("layers",), logits_top=None, layers="data2vec2"))
    found = describe(Cache.open(top.cache))["fields"]
    assert found[TOP]["kind"] == "top_logits"
    assert found[LAYERS]["fingerprint"]["layers"]["site"] == "ffn"
    assert not verify(LocalStore(top.cache)).findings
    assert len(digest(top.cache)) == 64
    chosen = SampleConfig(rows=8, teacher=teachers)
    report = check_sample(top.cache, chosen, load_teachers(top.cache, chosen))
    require_agreement(report)
    checked = {sample.field for sample in report.fields}
    assert {TOP, LAYERS, TEXT_LAYERS, "teacher/vit/image/mean", "teacher/text/text/mean"} <= checked


def test_a_sample_finds_a_class_that_is_not_among_the_largest(top: ExtractConfig) -> None:
    quiet(top)
    chosen = SampleConfig(rows=20, teacher=top.teacher)
    networks = load_teachers(top.cache, chosen)
    head = networks[0].backbone.head
    with torch.no_grad():  # the same logits, of other classes
        head.weight.copy_(head.weight.roll(1, 0))
        head.bias.copy_(head.bias.roll(1, 0))
    report = check_sample(top.cache, chosen, networks)
    wrong = {sample.field: sample.wrong for sample in report.fields if sample.wrong}
    assert list(wrong) == [TOP]
    assert len(wrong[TOP]) == 20
    assert "a number differs by" in wrong[TOP][0].problem or "its cosine" in wrong[TOP][0].problem


DAMAGES: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "a class below zero": lambda values, classes: classes.__setitem__((3, 0, 0), -1),
    "a class twice": lambda values, classes: classes.__setitem__((3, 0, 1), classes[3, 0, 0]),
    "logits that ascend": lambda values, classes: values.__setitem__((3, 0, 1), values[3, 0, 0] + 1),
    "a rest that is not finite": lambda values, classes: values.__setitem__((3, 0, 3), np.nan),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_numbers_that_cannot_be_top_logits_are_found_by_verify_and_redone_after_repair(
    top: ExtractConfig, what: str
) -> None:
    """Written by a writer that was wrong: every checksum and digest agrees with the numbers."""
    import hashlib
    import struct

    import google_crc32c

    from emkum.shards.layout import canonical_json, pretty_json

    quiet(top)
    whole = objects(Path(top.cache))
    arrays = {}
    for name, dtype, width in (("values", "<f4", 4), ("classes", "<i4", 3)):
        path = Path(top.cache) / TOP / name / "c.0.0.0"
        arrays[name] = path, np.frombuffer(path.read_bytes()[:-4], dtype).reshape(16, 1, width).copy()
    DAMAGES[what](arrays["values"][1], arrays["classes"][1])
    receipt_path = Path(top.cache) / "_emkum/receipts" / TOP / "000000-0.json"
    receipt = json.loads(receipt_path.read_text())
    for path, array in arrays.values():
        data = array.tobytes()
        data += struct.pack("<I", google_crc32c.value(data))
        path.write_bytes(data)
        stated = next(o for o in receipt["objects"] if o["path"].endswith(f"{path.parent.name}/c.0.0.0"))
        stated["sha256"] = hashlib.sha256(data).hexdigest()
    del receipt["digest"]
    receipt["digest"] = hashlib.sha256(canonical_json(receipt)).hexdigest()
    receipt_path.write_bytes(pretty_json(receipt))
    found = verify(LocalStore(top.cache))
    assert len(found.findings) == 1
    assert "holds numbers that cannot be" in found.findings[0].what
    repair(LocalStore(top.cache))
    quiet(top)
    assert objects(Path(top.cache)) == whole


def test_a_record_that_calls_int8_or_a_single_number_top_logits_is_refused() -> None:
    from emkum.shards.layout import FieldSpec, field_from_record

    for storage, shape in (("int8", [4]), ("float16", [1]), ("int32", [4])):
        values = {"dtype": storage, "row_shape": shape}
        with pytest.raises(ValueError, match="are not the largest logits and the rest"):
            field_from_record({"field": TOP, "kind": "top_logits", "arrays": {"values": values}})
    assert FieldSpec(TOP, "top_logits", "float16", (2,)).array("classes").row_shape == (1,)


def test_a_row_with_inf_among_its_logits_is_left_out_with_its_classes(
    top: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = FrozenPass.pictures

    def spoilt(self: FrozenPass, *inputs: Any) -> list[torch.Tensor]:
        found = [out.clone() for out in pictures(self, *inputs)]
        if len(found[0]) > 1:
            found[0][1, 0] = float("inf")
        return found

    monkeypatch.setattr(FrozenPass, "pictures", spoilt)
    quiet(replace(top, on_nonfinite="quarantine", max_bad=1.0))
    field = Cache.open(top.cache).field(TOP)
    rows = field.rows("train")
    assert rows.tolist() == [row for row in range(20) if row not in (1, 9, 17)]
    monkeypatch.setattr(FrozenPass, "pictures", pictures)
    quiet(replace(top, cache=top.cache.with_name("clean")))
    clean = Cache.open(top.cache.with_name("clean")).field(TOP)
    np.testing.assert_array_equal(field.classes(rows), clean.classes(rows))
    np.testing.assert_array_equal(field.values(rows), clean.values(rows))


# --- the plan says so ----------------------------------------------------------------------------------------


def test_the_bill_says_what_is_shared_and_what_runs_for_each(config: ExtractConfig, networks: Path) -> None:
    teachers = tuple(str(networks / name) for name in ("tail", "other", "classes"))
    said = quiet(replace(config, teacher=teachers, targets=("cls",), encoder=str(networks / "vit")))
    lines = [line.strip() for line in said]
    assert (
        "a picture runs through vit (2 blocks); tail (2 blocks of its own, the first 2 blocks shared with vit); "
        "other (4 blocks); classes (whole)"
    ) in lines
    assert not any(line.startswith("a caption runs") for line in lines)


def test_the_command_takes_the_flags(config: ExtractConfig, networks: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from emkum.cli import app

    flags = ["extract", "--teacher", str(networks / "prenet"), "--data", config.data[0], "--cache", str(tmp_path / "c")]
    flags += [
        "--text-encoder",
        "none",
        "--size",
        "16",
        "--compute",
        "float32",
        "--storage",
        "float32",
        "--device",
        "cpu",
    ]
    flags += ["--targets", "layers,mean", "--layers", "data2vec2", "--cut", "prenet", "--rows-per-block", "16"]
    done = CliRunner().invoke(app, flags)
    assert done.exit_code == 0, done.output
    found = Cache.open(tmp_path / "c").fields
    assert {"image/prenet@2/tokens", "teacher/prenet/image/mean", "teacher/prenet/image/layers"} <= set(found)
    shutil.rmtree(tmp_path / "c")
    flags = flags[: flags.index("--targets")]
    flags[2] = str(networks / "classes")
    done = CliRunner().invoke(app, [*flags, "--encoder", "none", "--logits-top", "2"])
    assert done.exit_code == 0, done.output
    assert TOP in Cache.open(tmp_path / "c").fields


def test_all_logits_beside_the_largest_are_announced_with_the_flag_that_goes_on(
    config: ExtractConfig, networks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = replace(config, teacher=(str(networks / "classes"),), encoder="none", logits_top=3, targets=())
    quiet(top)
    lines: list[str] = []
    extract(replace(top, logits_top=None), say=lines.append)
    said = "new field teacher/classes/image/logits beside the 3 largest; --logits-top 3 goes on with those alone"
    assert said in "\n".join(lines)
    with pytest.raises(errors.UsageError, match="--targets logits-top") as caught:
        replace(top, logits_top=None, targets=("logits-top",))
    assert caught.value.way_out == "say how many of the largest logits to keep: --logits-top 5"
