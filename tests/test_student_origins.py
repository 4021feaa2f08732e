"""Where a student's weights start: the encoders, a teacher, networks of the cache, folders, earlier runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_students import CLS, build, message, names, networks
from tiny_cache import WIDTH, TinyCache, make_cache, tiny_network

from emkum.errors import NotARun, NothingFits, UsageError
from emkum.models.network import Network, save_network
from emkum.shards.reader import Cache
from emkum.stage2_train.evaluate.contestants import student_before
from emkum.stage2_train.recipe import Recipe, load_recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.run_folder import RunFolder, load_run, tensors_digest, write_info, write_student
from emkum.stage2_train.student import Student, build_student
from emkum.stage2_train.train import TrainConfig, train

TEACHER = "teacher/wiser/image/cls"


def kept(tmp_path: Path, *made: Network, fields: tuple[str, ...] = ()) -> Any:
    """A cache that keeps these networks, and nothing else that a student asks for."""
    for network in made:
        save_network(network, tmp_path / network.name)
    return SimpleNamespace(
        models=[network.name for network in made],
        model_dir=lambda name: tmp_path / name,
        fields=dict.fromkeys(fields),
    )


def of_run(folder: Path, student: Student, recipe: Recipe) -> Path:
    """A run folder with this student, as a finished run leaves it."""
    folder.mkdir()
    info = {"command": "", "continue": "", "recipe": recipe.to_json(), "cache": {"path": "shards", "uuid": "u"}}
    info |= {"identity": {}, "seed": 0, "precision": "float32", "total_steps": 1}
    write_info(RunFolder(folder), info)
    write_student(RunFolder(folder), student)
    return folder


def moved(student: Student) -> Student:
    """With weights that no start has."""
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters()):
            parameter.fill_(number / 64 + 0.25)
    return student


def pair_run(tmp_path: Path, *overrides: str, name: str = "earlier", **text: object) -> Path:
    return of_run(tmp_path / name, moved(build(*overrides, **text)), load_recipe("ssmke", overrides))


def started(*overrides: str, recipe: str = "ssmke", cache: Any = None, targets: str = CLS, cut: int = 0) -> Student:
    loaded = load_recipe(recipe, overrides)
    image, text = networks()
    fields = FieldNames(names(cut).inputs, "tinyvit", cut, "text/tinybert/ids", {"cls": targets})
    return build_student(
        loaded,
        fields,
        None if loaded.kind == "texts" else image,
        None if loaded.kind == "images" else text,
        9 if loaded.kind == "pairs" else None,
        0,
        cache=cache,
    )


def blocks_equal(student: Student, side: str, network: Network, first: int = 0) -> bool:
    stack = student.image_blocks if side == "image" else student.text_blocks
    assert stack is not None
    theirs = network.backbone.stack.blocks[first : first + stack.depth]  # type: ignore[union-attr]
    return all(
        torch.equal(tensor, block.state_dict()[name])
        for own, block in zip(stack.blocks, theirs, strict=True)
        for name, tensor in own.state_dict().items()
    )


# --- networks ----------------------------------------------------------------------------------------------------


def test_the_image_blocks_start_as_the_teachers(tmp_path: Path) -> None:
    wiser = tiny_network("wiser", "image", seed=9, depth=6, layer_scale=False)
    student = started("student.init=teacher", cache=kept(tmp_path, wiser), targets=TEACHER, cut=1)
    assert student.image_blocks is not None
    assert student.image_blocks.depth == 2  # what is left of the first half of the teacher's six
    assert blocks_equal(student, "image", wiser, first=1)
    assert student.spec.image is not None
    assert student.spec.image.encoder == "tinyvit"  # whose tokens it reads
    assert blocks_equal(student, "text", networks()[1])  # a teacher of pictures has none for texts


def test_blocks_start_as_those_of_a_network_in_a_folder_or_in_the_cache(tmp_path: Path) -> None:
    other = tiny_network("other", "image", seed=9)
    cache = kept(tmp_path, other)
    assert blocks_equal(started(f"student.init_image={tmp_path / 'other'}"), "image", other)
    assert blocks_equal(started("student.init_image=other", cache=cache), "image", other)
    words = tiny_network("words", "text", seed=8, width=12, depth=3)
    save_network(words, tmp_path / "words")
    student = started(f"student.init_text={tmp_path / 'words'}")
    assert blocks_equal(student, "text", words)
    assert student.text_embedding is not None
    assert torch.equal(student.text_embedding.tokens, words.backbone.embedding.tokens)  # type: ignore[union-attr]
    assert student.spec.text is not None
    assert (student.spec.text.encoder, student.spec.text.width) == ("tinybert", 12)


@pytest.mark.parametrize(
    ("override", "made", "expected"),
    [
        ("student.init=techer", None,
         'student.init = "techer" is neither "encoder" nor "teacher", nor a network the cache keeps, nor a folder | '
         "did you mean teacher?"),
        ("student.init_text=runs/none", None,
         'student.init_text = "runs/none" is neither "encoder" nor "teacher", nor a network the cache keeps, nor a '
         "folder | name the folder of a run or of a network"),
        ("student.init=teacher", tiny_network("other", "image"),
         "student.init: the cache does not keep the network wiser (it keeps other) | extract with it as --encoder or "
         "--text-encoder, or name its folder: --set student.init=FOLDER"),
        ("student.init=teacher", tiny_network("wiser", "image", width=32),
         "student.init: wiser has 32 channels, the tokens of tinyvit have 16"),
        ("student.init_text=teacher", tiny_network("wiser", "image"),
         "student.init_text: the recipe reads no target of a teacher of kind text | leave student.init_text out"),
        ("student.init_image=words", tiny_network("words", "text"),
         "student.init_image: words is a network of kind text, and the blocks are for image"),
        ("student.init_image=biased",
         tiny_network("biased", "image", relative_bias="per_block", position="none", num_registers=2),
         "student.init_image: blocks of biased count 3 tokens in front of the patches, tinyvit has 1"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_start_that_is_none(
    tmp_path: Path, override: str, made: Network | None, expected: str
) -> None:
    with pytest.raises(UsageError) as error:
        started(override, cache=kept(tmp_path, made) if made else None, targets=TEACHER)
    assert expected in message(error)
    assert error.value.way_out


def test_a_text_network_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(tiny_network("words", "text"), tokenizer=b"{}")
    with pytest.raises(UsageError) as error:
        started("student.init_text=words", cache=kept(tmp_path, other))
    assert "words has another tokenizer than tinybert, which made the ids | extract ids with" in message(error)


# --- the attention of an image network, for texts alone ------------------------------------------------------------


def test_texts_alone_take_the_attention_of_the_only_image_network_the_cache_keeps(tmp_path: Path) -> None:
    image, text = networks()
    cache = kept(tmp_path, image, text, fields=("text/tinybert/ids",))
    for overrides in (["student.frozen_text=attention"], ["student.text_attention=tinyvit"]):
        student = started(*overrides, recipe="text-kd", cache=cache)
        assert student.text_blocks is not None
        own = student.text_blocks.blocks[1]
        assert torch.equal(own.qkv.weight, image.backbone.stack.blocks[1].qkv.weight)  # type: ignore[union-attr]
        assert own.qkv.weight.requires_grad == (overrides == ["student.text_attention=tinyvit"])


def test_without_one_image_network_the_way_out_is_said(tmp_path: Path) -> None:
    image, text = networks()
    ids = ("text/tinybert/ids",)
    with pytest.raises(UsageError) as error:
        started("student.frozen_text=attention", recipe="text-kd", cache=kept(tmp_path, text, fields=ids))
    assert message(error) == (
        "UsageError: student.frozen_text: the text blocks take their attention from an image network, and the cache "
        "keeps none | extract pictures with an image network of the text network's width as --encoder"
    )
    two = kept(tmp_path, image, tiny_network("second", "image"), text, fields=ids)
    with pytest.raises(UsageError) as error:
        started("student.frozen_text=attention", recipe="text-kd", cache=two)
    assert "keeps second, tinyvit | choose one: --set student.text_attention=NAME" in message(error)
    with pytest.raises(UsageError) as error:
        started("student.text_attention=tinybert", recipe="text-kd", cache=two)
    assert message(error) == (
        "UsageError: student.text_attention: tinybert is a network of kind text | name an image network"
    )
    with pytest.raises(UsageError) as error:
        started("student.text_attention=tinyvitt", recipe="text-kd", cache=two)
    assert "student.text_attention: the cache does not keep the network tinyvitt" in message(error)


# --- earlier runs ------------------------------------------------------------------------------------------------


def test_a_run_gives_all_its_parts_to_a_student_like_its_own(tmp_path: Path) -> None:
    run = pair_run(tmp_path)
    student = started(f"student.init={run}")
    earlier = load_run(run).student.state_dict()
    assert all(torch.equal(tensor, earlier[name]) for name, tensor in student.state_dict().items())
    assert student.origins == (
        f"weights of {run} (sha256 {tensors_digest(earlier)[:12]}): image blocks, text embedding, text blocks, shared "
        "blocks, final norm, head, token types",
    )
    assert not student.text_embedding.tokens.requires_grad  # type: ignore[union-attr]


def test_parts_that_differ_are_named_and_start_as_without_the_run(tmp_path: Path) -> None:
    run = pair_run(tmp_path, "student.image_blocks=1", "student.shared_blocks=2", "student.token_types=none")
    student, plain = started(f"student.init={run}", "student.positions=shared"), started("student.positions=shared")
    earlier = load_run(run).student
    assert student.origins[0].endswith(
        "text embedding, text blocks, final norm, head; not taken: image blocks (depth 1 there, 2 here), shared blocks "
        "(depth 2 there, 1 here), token types (the run has none), positions (the run has none)"
    )
    for name, tensor in student.state_dict().items():
        source = earlier if name.split(".")[0] in ("text_embedding", "text_blocks", "norm", "head") else plain
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_a_head_of_another_width_is_not_taken(tmp_path: Path) -> None:
    run = of_run(tmp_path / "narrow", moved(build(target=5)), load_recipe("ssmke"))
    student = started(f"student.init={run}")
    assert student.origins[0].endswith("; not taken: head (head.weight [5, 16] there, [9, 16] here)")
    assert student.head is not None
    assert torch.equal(student.head.weight, started().head.weight)  # type: ignore[union-attr]


def test_equal_shapes_of_another_kind_are_not_taken(tmp_path: Path) -> None:
    """Post-norm blocks have the shapes of pre-norm blocks, and blocks of another cut those of this one."""
    run = pair_run(tmp_path, norm_order="pre")
    assert "text blocks (blocks of another kind)" in started(f"student.init={run}").origins[0]
    student = started(f"student.init={run}", "student.image_blocks=2", cut=1)
    assert "image blocks (cut 0 there, 1 here)" in student.origins[0]
    assert blocks_equal(student, "image", networks()[0], first=1)


def test_unimodal_students_distilled_before_give_one_modality_each(tmp_path: Path) -> None:
    runs = {}
    for recipe in ("image-kd", "text-kd"):
        overrides = ["student.text_blocks=all"] if recipe == "text-kd" else []
        student = moved(build(*overrides, recipe=recipe))
        runs[recipe] = of_run(tmp_path / recipe, student, load_recipe(recipe, overrides))
    student = started(f"student.init_image={runs['image-kd']}", f"student.init_text={runs['text-kd']}")
    image, text = (load_run(folder).student for folder in runs.values())
    for part, source in (("image_blocks", image), ("text_blocks", text), ("text_embedding", text)):
        own = getattr(student, part).state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in getattr(source, part).state_dict().items())
    plain = started()
    assert all(torch.equal(student.state_dict()[name], plain.state_dict()[name]) for name in ("head.weight",))
    assert [line.split("): ")[1] for line in student.origins] == ["image blocks", "text embedding, text blocks"]


def test_blocks_that_are_to_be_new_are_not_taken_from_a_run(tmp_path: Path) -> None:
    run = pair_run(tmp_path)
    student = started(f"student.init={run}", "student.image_start=random")
    assert "image blocks" not in student.origins[0]
    assert student.image_blocks is not None
    assert student.image_blocks.blocks[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_a_run_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    run = of_run(tmp_path / "words", build(recipe="text-kd"), load_recipe("text-kd"))
    with pytest.raises(NothingFits) as error:
        started(f"student.init_image={run}")
    assert message(error) == (
        f"NothingFits: nothing of the student of {run} fits into this one; not taken: image blocks (the run has none) "
        "| name a run of the same networks and shapes, or leave student.init out"
    )
    assert error.value.exit_code == 2


def test_a_run_without_a_student_is_named(tmp_path: Path) -> None:
    run = pair_run(tmp_path)
    RunFolder(run).spec.unlink()
    with pytest.raises(NotARun, match="holds a run without a student yet"):
        started(f"student.init={run}")


def test_the_frozen_attention_of_a_run_is_taken_with_its_blocks(tmp_path: Path) -> None:
    """VLMo's order: pictures first, then texts with that attention frozen, then both."""
    run = pair_run(tmp_path, "student.frozen_text=attention")
    student = started(f"student.init_text={run}", "student.text_attention=image")
    earlier = load_run(run).student
    assert student.text_blocks is not None
    assert earlier.text_blocks is not None
    assert torch.equal(student.text_blocks.blocks[0].qkv.weight, earlier.text_blocks.blocks[0].qkv.weight)
    assert student.text_blocks.blocks[0].qkv.weight.requires_grad
    assert "text blocks (" in started(f"student.init_text={run}").origins[0]  # its own attention: another kind


# --- in a run ----------------------------------------------------------------------------------------------------

SMALL = ("training.batch=8", "training.epochs=1", "evaluation.split=none")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    return make_cache(tmp_path_factory.mktemp("cache") / "shards", cut=0, val_pictures=0)


def run(cache: TinyCache, folder: Path, recipe: str, *overrides: str) -> list[str]:
    lines: list[str] = []
    wanted = (*SMALL, *overrides)
    train(TrainConfig(cache.path, recipe, wanted, folder, precision="float32", device="cpu", max_steps=2), lines.append)
    return lines


def test_training_starts_from_a_run_and_says_what_it_took_and_what_runs_in_front(
    cache: TinyCache, tmp_path: Path
) -> None:
    run(cache, tmp_path / "first", "image-kd")
    lines = run(cache, tmp_path / "second", "ssmke", f"student.init_image={tmp_path / 'first'}")
    (said,) = (line for line in lines if line.startswith("weights of "))
    assert said.startswith(f"weights of {tmp_path / 'first'} (sha256 ")
    assert said.endswith("): image blocks")
    (encoder,) = (line.split() for line in lines if line.startswith("  image encoder"))
    patches = 3 * 8 * 8 * WIDTH + WIDTH
    assert encoder[2:] == ["0", "trained", f"{patches + WIDTH + 5 * WIDTH:,}", "frozen"]
    info = load_run(tmp_path / "second").info
    assert info["origins"] == [said]
    assert info["parameters"]["image encoder"] == {"trainable": 0, "frozen": patches + WIDTH + 5 * WIDTH}


def test_evaluation_knows_the_student_as_it_was_before_the_first_step(cache: TinyCache, tmp_path: Path) -> None:
    """Also where its weights came from a run, a network of the cache, and with heads of its own."""
    heads = ("student.heads=separate", "student.head_width=5", "student.shared=mome")
    run(cache, tmp_path / "first", "ssmke", "student.init_image=tinyvit", *heads)
    after = (f"student.init={tmp_path / 'first'}", *heads)
    run(cache, tmp_path / "second", "ssmke", *after)
    opened = Cache.open(cache.path)
    before = student_before(load_run(tmp_path / "second"), cache.encoder, cache.text_encoder, opened).state_dict()
    first = load_run(tmp_path / "first").student.state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in before.items())
    assert [tuple(before[f"heads.{term}.weight"].shape) for term in ("itc", "ctl")] == [(5, WIDTH), (WIDTH, WIDTH)]
    assert student_before(load_run(tmp_path / "first"), cache.encoder, cache.text_encoder, opened).spec.heads


@pytest.mark.parametrize(
    "overrides",
    [
        ("student.shared=mome", "student.token_types=before"),
        ("student.positions=shared", "student.projection=true", "student.image_start=every-second"),
        ("student.frozen_image=all", "student.frozen_text=all-but-last"),
    ],
)
def test_every_kind_of_student_trains_and_loads(cache: TinyCache, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run(cache, tmp_path / "run", "ssmke", *overrides)
    student = load_run(tmp_path / "run").student
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
