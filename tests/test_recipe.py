"""Recipes: the files that ship, overrides, and what is said when a recipe and a cache do not fit."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
from tiny_cache import make_cache

from emkum.errors import EmkumError, MissingCaptions, MissingField, UnknownRecipe, UsageError
from emkum.shards.reader import Cache
from emkum.stage2_train.fits import check_live
from emkum.stage2_train.recipe import RECIPES_DIR, load_recipe, recipe_from_table, shipped_recipes
from emkum.stage2_train.recipe_fields import FieldNames, choose_recipe, required_fields


@dataclass
class FakeCache:
    """The few calls of a cache that a recipe makes."""

    fields: dict[str, None] = field(default_factory=dict)
    splits: list[str] = field(default_factory=lambda: ["train"])
    models: list[str] = field(default_factory=list)
    paired: bool = True
    path: Path = Path("shards")

    def captions(self, split: str) -> pa.Table:
        return pa.table({"image_row": pa.array([0, 1] if self.paired else [None, None], pa.int64())})


TOKENS, IDS, CLS = "image/dinov2-s@6/tokens", "text/minilm/ids", "teacher/dinov2-s/image/cls"
LOGITS = "teacher/resnet50-a1/image/logits"
OF_PAIRS = "text/beit3-pair/ids", "teacher/beit3-pair/pair/cls"
LAYERS, TEXT_LAYERS = "teacher/dinov2-s/image/layers", "teacher/minilm/text/layers"


def cache(*fields: str, **changes: object) -> FakeCache:
    return FakeCache(dict.fromkeys(fields), **changes)  # type: ignore[arg-type]


def message(error: pytest.ExceptionInfo[EmkumError]) -> str:
    return error.value.line()


# --- files -------------------------------------------------------------------------------------------------------


def test_the_recipes_that_ship() -> None:
    """Those of THESIS.md section 3 and of its outline."""
    own = {"cls-mse", "itc-only", "filip", "vit-kd", "finetune-retrieval"}
    assert set(shipped_recipes()) - own == {
        *("image-kd", "image-kd-early", "text-kd", "text-kd-frozen-attention"),
        *("shre", "shre-ddp", "shre-ranking", "shre-transformer"),
        *("ssmke", "ssmke-ctl", "ssmke-large", "heads", "tte-before", "tte-after", "tte-noscale", "uni2multi"),
        *("queue", "momentum-queue", "whole-cache-bank", "itm-random", "itm-hard", "cmli", "cmli-empty"),
        *("reduced", "codes-kmeans", "codes-vq", "dino", "mvlm", "distil-beit3", "no-itc", "regions", "freeze"),
        *("vl-from-text", "positions-shared", "resnet-kd"),
    }
    assert load_recipe("ssmke-mse") == load_recipe("cls-mse")
    assert load_recipe("no-teacher") == load_recipe("itc-only")


def test_a_recipe_on_a_base_has_all_of_it_but_what_it_says_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "ssmke"\n[optimiser]\nlr = 1e-3\n[objectives]\nitc = "none"\n[objectives.cls-mse]\nweight = 2.0\n'
    )
    mine, base = load_recipe(path, ["training.epochs=3"]), load_recipe("ssmke")
    assert mine.name == "mine"
    assert mine.terms == ("ctl", "cls_mse")
    assert (mine.optimiser.lr, mine.training.epochs) == (1e-3, 3)
    assert mine.optimiser.betas == base.optimiser.betas
    assert mine.student == base.student
    for text, said in (
        ('base = "smke"', "has base = 'smke', which is no shipped recipe"),
        ('base = "heads"', "has base = 'heads', which has a base itself | use 'ssmke'"),
        ("base = 3", "has base = 3, which is no shipped recipe"),
    ):
        path.write_text(text)
        with pytest.raises(UnknownRecipe) as error:
            load_recipe(path)
        assert said in message(error)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_loads_and_comes_back_from_its_own_toml(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe_from_table(tomllib.loads(recipe.to_toml())) == recipe
    assert recipe_from_table(recipe.to_json()) == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_opens_with_command_fields_cost_and_result(name: str) -> None:
    head = (RECIPES_DIR / f"{name}.toml").read_text().split("\nkind =")[0]
    assert f"emkum train --cache ./shards --recipe {name}" in head
    for word in ("Reads", "Trains", "Costs", "Reaches"):
        assert f"\n# {word} " in head


def test_the_published_hyper_parameters_are_the_defaults() -> None:
    recipe = load_recipe("ssmke")
    assert recipe.terms == ("itc", "ctl")
    optimiser = recipe.optimiser
    assert (optimiser.lr, optimiser.encoder_lr, optimiser.betas, optimiser.eps) == (5e-4, 5e-5, (0.9, 0.98), 1e-6)
    assert (optimiser.weight_decay, optimiser.schedule, optimiser.warmup) == (0.01, "cosine", 0.1)
    assert (recipe.training.batch, recipe.training.epochs) == (256, 10)


def test_a_file_of_ones_own_is_a_recipe_named_after_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('kind = "texts"\n[objectives.layers-mse]\nweight = 2\n')
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.objectives.layers_mse is not None
    assert recipe.objectives.layers_mse.weight == 2.0


# --- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_are_toml_values_and_bare_words_are_strings() -> None:
    overrides = ["training.batch=64", "optimiser.betas=[0.8, 0.9]", "student.text_blocks=6", "data.captions=all"]
    recipe = load_recipe("ssmke", [*overrides, "student.token_types=false", "objectives.ctl.bank=all"])
    assert recipe.training.batch == 64
    assert recipe.optimiser.betas == (0.8, 0.9)
    assert recipe.student.text_blocks == 6
    assert recipe.data.captions == "all"
    assert recipe.student.token_types is False
    assert recipe.objectives.ctl is not None
    assert recipe.objectives.ctl.bank == "all"


def test_an_objective_is_taken_out_with_none_and_put_in_by_any_of_its_keys() -> None:
    assert load_recipe("ssmke", ["objectives.ctl=none"]).terms == ("itc",)
    assert load_recipe("itc-only", ["objectives.cls-mse.weight=0.5"]).terms == ("itc", "cls_mse")


@pytest.mark.parametrize(
    ("name", "override", "kind", "expected"),
    [
        ("smke", "", UnknownRecipe, "UnknownRecipe: no such recipe: smke | did you mean ssmke? `emkum recipes` lists"),
        ("no.toml", "", UnknownRecipe, "UnknownRecipe: no such file: no.toml | `emkum recipes` lists"),
        ("ssmke", "optimizer.lr=1", UnknownRecipe,
         "UnknownRecipe: recipe ssmke has no key optimizer | did you mean optimiser?"),
        ("ssmke", "optimiser.learning_rate=1", UnknownRecipe,
         "UnknownRecipe: recipe ssmke has no key optimiser.learning_rate | keys there: lr, encoder_lr, "),
        ("ssmke", "student.image_block=1", UnknownRecipe, "did you mean student.image_blocks?"),
        ("ssmke", "optimiser.lr=-1", UsageError, "recipe ssmke: optimiser.lr = -1 is not within 0 and 1"),
        ("ssmke", "training.batch=0", UsageError, "recipe ssmke: training.batch = 0 is not >= 1"),
        ("ssmke", "training.batch=1.5", UsageError, "recipe ssmke: training.batch = 1.5 is not an integer"),
        ("ssmke", "training.batch=true", UsageError, "recipe ssmke: training.batch = True is not an integer"),
        ("ssmke", "data.captions=two", UsageError, "data.captions = 'two' is not 'one' or 'all'"),
        ("ssmke", "student.text_blocks=-1", UsageError, "student.text_blocks = -1 is not >= 0"),
        ("ssmke", "student.text_blocks=most", UsageError, "is not an integer or 'half' or 'all'"),
        ("ssmke", "optimiser.betas=[1]", UsageError, "optimiser.betas = [1] is not 2 numbers"),
        ("ssmke", "optimiser=5", UsageError, "recipe ssmke: optimiser = 5 is not a table | write [optimiser]"),
        ("ssmke", "training", UsageError, "--set training is not path=value | for example --set training.batch=128"),
        ("ssmke", "training.batch.size=5", UsageError, "--set training.batch.size=5: batch is a value, not a table"),
        ("ssmke", "objectives.layers-mse.weight=1", UsageError,
         "ssmke: objectives.layers_mse is not for kind pairs | pairs take itc, itc_queue, ctl, cls_mse"),
        ("ssmke", "objectives.logits-kl.weight=1", UsageError,
         "recipe ssmke: objectives.ctl reads cls, objectives.logits_kl reads logits, and a recipe has one target | "
         "take one out: --set objectives.logits_kl=none"),
        ("image-kd", "objectives.logits-kl.weight=1", UsageError,
         "objectives.layers_mse reads layers, objectives.logits_kl reads logits, and a recipe has one target"),
        ("image-kd", "objectives.ranking.margin=0.1", UsageError, "objectives.ranking is not for kind images"),
        ("shre", "objectives.ranking.margin=3", UsageError, "objectives.ranking.margin = 3 is not within 0 and 2"),
        ("shre", "objectives.logits-kl.temperature=0", UsageError, "temperature = 0 is not within 0.01 and 100"),
        ("image-kd", "student.shared=mlp", UsageError,
         "recipe image-kd: student.shared = 'mlp' is for pairs | leave student.shared out"),
        ("shre", "student.shared_blocks=2", UsageError,
         "recipe shre: student.shared_blocks = 2 has no effect: student.shared = 'mlp' takes the place of the blocks | "
         "leave student.shared_blocks out, or --set student.shared=blocks"),
        ("shre", "student.shared=blocks", UsageError,
         "recipe shre: objectives.itc.layers = 'all' has no effect: student.shared = 'blocks' has one output | --set "
         'objectives.itc.layers=last, or student.shared="mlp" or "attention-mlp"'),
        ("itc-only", "objectives.itc=none", UsageError, "recipe itc-only has no objective | pairs take"),
        ("image-kd", "objectives.itc.weight=1", UsageError, "objectives.itc is not for kind images"),
        ("image-kd", "student.head_width=8", UsageError, "student.head_width is for pairs"),
        ("ssmke", "student.head_width=0", UsageError, "student.head_width = 0 is not >= 1"),
        ("ssmke", "optimiser.betas=[0.9, 1.0]", UsageError, "betas = [0.9, 1.0] is not within 0 and 1, below 1"),
        ("ssmke", "objectives.itc.weight=inf", UsageError, "weight = inf is not >= 0 and finite"),
        ("ssmke", "objectives.itc.weight=nan", UsageError, "weight = nan is not >= 0 and finite"),
        ("text-kd", "data.cut=3", UsageError, "data.cut = 3 has no effect: a sample of kind texts has no such part"),
        ("image-kd", "student.text_blocks=3", UsageError, "student.text_blocks = 3 has no effect"),
        ("itc-only", "data.targets=teacher/a/image/cls", UsageError, "has no effect: no objective reads a target"),
    ],
)  # fmt: skip
def test_what_is_said_about_a_recipe_that_is_wrong(
    name: str, override: str, kind: type[EmkumError], expected: str
) -> None:
    with pytest.raises(kind) as error:
        load_recipe(name, [override] if override else [])
    assert expected in message(error)
    assert error.value.exit_code == 2
    assert error.value.way_out


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("kind = pairs")
    with pytest.raises(UsageError, match=r"bad\.toml is not TOML"):
        load_recipe(path)


# --- against a cache ---------------------------------------------------------------------------------------------


def test_auto_takes_the_only_fields_that_fit() -> None:
    found = required_fields(load_recipe("ssmke"), cache(TOKENS, IDS, CLS, LAYERS))  # type: ignore[arg-type]
    assert found == FieldNames(TOKENS, "dinov2-s", 6, IDS, {"cls": CLS})
    assert found.text_encoder == "minilm"
    assert found.needed() == (TOKENS, IDS, CLS)
    assert not found.live_prefix


@pytest.mark.parametrize("recipe", ["shre", "shre-transformer"])
def test_shre_reads_the_logits_of_a_classifier(recipe: str) -> None:
    found = required_fields(load_recipe(recipe), cache(TOKENS, IDS, CLS, LOGITS))  # type: ignore[arg-type]
    assert found == FieldNames(TOKENS, "dinov2-s", 6, IDS, {"logits": LOGITS})
    alone = ["objectives.layers-mse=none", "objectives.logits-kl.weight=1"]
    pictures = required_fields(load_recipe("image-kd", alone), cache(TOKENS, LAYERS, LOGITS))  # type: ignore[arg-type]
    assert pictures.needed() == (TOKENS, LOGITS)


def test_a_recipe_without_teacher_needs_no_target() -> None:
    assert required_fields(load_recipe("itc-only"), cache(TOKENS, IDS, CLS)).targets == {}  # type: ignore[arg-type]


def test_unimodal_recipes_need_one_modality() -> None:
    everything = cache(TOKENS, IDS, CLS, LAYERS, TEXT_LAYERS, paired=False)
    assert required_fields(load_recipe("image-kd"), everything).needed() == (TOKENS, LAYERS)  # type: ignore[arg-type]
    assert required_fields(load_recipe("text-kd"), everything).needed() == (IDS, TEXT_LAYERS)  # type: ignore[arg-type]


def test_ids_of_a_network_of_pairs_are_left_out_where_a_text_encoders_fit() -> None:
    found = required_fields(load_recipe("ssmke"), cache(TOKENS, *OF_PAIRS, IDS, CLS))  # type: ignore[arg-type]
    assert found.ids == IDS
    found = required_fields(load_recipe("ssmke"), cache(TOKENS, *OF_PAIRS, CLS))  # type: ignore[arg-type]
    assert found.ids == OF_PAIRS[0]  # and the student says why that cannot be
    chosen = load_recipe("ssmke", [f"data.ids={OF_PAIRS[0]}"])
    assert required_fields(chosen, cache(TOKENS, *OF_PAIRS, IDS, CLS)).ids == OF_PAIRS[0]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"2 fields fit data\.ids: text/bert-base/ids, text/minilm/ids"):
        required_fields(load_recipe("ssmke"), cache(TOKENS, *OF_PAIRS, IDS, "text/bert-base/ids", CLS))  # type: ignore[arg-type]


def test_crops_go_through_the_only_image_network_the_cache_keeps() -> None:
    made = cache("image/crops-224", IDS, CLS, models=["dinov2-s", "minilm"])
    found = required_fields(load_recipe("ssmke", ["data.cut=3"]), made)  # type: ignore[arg-type]
    assert found == FieldNames("image/crops-224", "dinov2-s", 3, IDS, {"cls": CLS})
    assert found.live_prefix


@pytest.mark.parametrize(
    ("recipe", "overrides", "made", "kind", "expected"),
    [
        ("ssmke", [], cache(TOKENS, IDS), MissingField,
         "MissingField: recipe ssmke needs a teacher's cls targets; the cache shards has image/dinov2-s@6/tokens, "
         "text/minilm/ids | make it: emkum extract --cache shards --split train --data <tars> "
         "--teacher <image network> --targets cls --encoder dinov2-s --cut 6 --text-encoder minilm"),
        ("shre", [], cache(TOKENS, IDS, CLS), MissingField,
         "MissingField: recipe shre needs a teacher's logits targets; the cache shards has image/dinov2-s@6/tokens, "
         "teacher/dinov2-s/image/cls, text/minilm/ids | make it: emkum extract --cache shards --split train --data "
         "<tars> --teacher <image classifier> --targets logits --encoder dinov2-s --cut 6 --text-encoder minilm"),
        ("shre", [f"data.targets={CLS}"], cache(TOKENS, IDS, CLS, LOGITS), UsageError,
         f"data.targets = {CLS} is not a teacher's logits targets (teacher/<network>/image/logits[-top]) | choose one "
         f"that fits: --set data.targets={LOGITS}"),
        ("ssmke", [], cache(IDS, CLS), MissingField, "recipe ssmke needs image inputs; the cache shards has teacher/"),
        ("ssmke", [], cache(TOKENS, CLS), MissingField, "needs token ids of the texts"),
        ("text-kd", [], cache(IDS), MissingField, "--teacher <text network> --targets layers"),
        ("image-kd", [], cache(), MissingField, "the cache shards has nothing"),
        ("ssmke", ["data.targets=teacher/x/image/cls"], cache(TOKENS, IDS, CLS), MissingField,
         "recipe ssmke reads teacher/x/image/cls; the cache shards has image/dinov2-s@6/tokens, teacher/dinov2-s/"),
        ("ssmke", [], cache(TOKENS, IDS, CLS, "teacher/beit2/image/cls"), UsageError,
         "UsageError: recipe ssmke: 2 fields fit data.targets: teacher/beit2/image/cls, teacher/dinov2-s/image/cls | "
         "choose one: --set data.targets=teacher/beit2/image/cls"),
        ("ssmke", [], cache(TOKENS, "image/dinov2-s@0/tokens", IDS, CLS), UsageError, "2 fields fit data.inputs"),
        ("ssmke", [f"data.targets={LAYERS}"], cache(TOKENS, IDS, CLS, LAYERS), UsageError,
         f"data.targets = {LAYERS} is not a teacher's cls targets (teacher/<network>/image/cls) | choose one that "
         f"fits: --set data.targets={CLS}"),
        ("text-kd", [f"data.ids={TEXT_LAYERS}"], cache(IDS, TEXT_LAYERS), UsageError,
         f"is not token ids of the texts (text/<network>/ids) | choose one that fits: --set data.ids={IDS}"),
        ("ssmke", [f"data.inputs={CLS}"], cache(TOKENS, IDS, CLS), UsageError,
         "is not image inputs (image/<network>@<cut>/tokens or image/crops-<size>) | choose one that fits"),
        ("ssmke", ["data.cut=3"], cache(TOKENS, IDS, CLS), UsageError,
         "data.cut = 3, and the inputs image/dinov2-s@6/tokens have cut 6 | leave data.cut out"),
        ("ssmke", ["data.encoder=clip"], cache(TOKENS, IDS, CLS), UsageError,
         "data.encoder = 'clip', and the inputs image/dinov2-s@6/tokens have encoder 'dinov2-s'"),
        ("ssmke", [], cache("image/crops-224", IDS, CLS, models=["a", "b", "minilm"]), UsageError,
         "the cache keeps 2 image networks (a, b) | choose one: --set data.encoder=NAME"),
        ("ssmke", [], cache(TOKENS, IDS, CLS, paired=False), MissingCaptions,
         "MissingCaptions: recipe ssmke trains on picture-caption pairs; split 'train' of shards has no captions of "
         "pictures (splits: train)"),
        ("ssmke", ["data.split=test"], cache(TOKENS, IDS, CLS), MissingCaptions,
         "split 'test' of shards has no captions"),
    ],
)  # fmt: skip
def test_what_is_said_when_recipe_and_cache_do_not_fit(
    recipe: str, overrides: list[str], made: FakeCache, kind: type[EmkumError], expected: str
) -> None:
    with pytest.raises(kind) as error:
        required_fields(load_recipe(recipe, overrides), made)  # type: ignore[arg-type]
    assert expected in message(error)
    assert error.value.exit_code == 2


def test_the_command_that_is_named_repeats_how_the_cache_was_made(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", pictures=4, val_pictures=0, fields=("tokens", "ids"))
    with pytest.raises(MissingField) as error:
        required_fields(load_recipe("ssmke"), Cache.open(made.path))
    assert error.value.way_out == (
        f"make it: emkum extract --cache {made.path} --split train --data <tars> --teacher <image network> "
        "--targets cls --encoder random:tokens --cut 2 --size 16 --text-encoder random:ids"
    )


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (cache(TOKENS, IDS, CLS, LAYERS), "ssmke"),
        (cache("image/crops-224", IDS, CLS), "ssmke"),
        (cache(TOKENS, IDS, CLS, LOGITS), "ssmke"),
        (cache(TOKENS, IDS, LOGITS, LAYERS), "shre-transformer"),
        (cache(TOKENS, IDS, LOGITS, LAYERS, paired=False), "image-kd"),
        (cache(TOKENS, IDS), "itc-only"),
        (cache(TOKENS, LAYERS), "image-kd"),
        (cache(IDS, TEXT_LAYERS), "text-kd"),
        (cache(TOKENS, IDS, CLS, LAYERS, paired=False), "image-kd"),
        (cache(TOKENS, IDS, *OF_PAIRS, CLS), "ssmke"),
        (cache(TOKENS, *OF_PAIRS, CLS, LAYERS), "image-kd"),
    ],
)
def test_the_recipe_is_chosen_by_what_the_cache_has(made: FakeCache, expected: str) -> None:
    name, why = choose_recipe(made)  # type: ignore[arg-type]
    assert name == expected
    assert why.startswith("the cache has ")


def test_a_cache_that_no_recipe_fits_says_what_it_has() -> None:
    with pytest.raises(UsageError, match=r"no shipped recipe fits the fields of shards: teacher/dinov2-s/image/cls"):
        choose_recipe(cache(CLS))  # type: ignore[arg-type]
    with pytest.raises(UsageError) as error:
        choose_recipe(cache(TOKENS, *OF_PAIRS, CLS))  # type: ignore[arg-type]
    assert message(error) == (
        "UsageError: shards holds no token ids but text/beit3-pair/ids, of a network of pairs: no student's text side "
        "starts from it | add those of a text network: emkum extract --cache shards --split train --data <tars> "
        "--teacher <network> --text-encoder <text network> --encoder dinov2-s --cut 6"
    )


def test_layers_of_pairs_come_from_the_cache_alone() -> None:
    with pytest.raises(UsageError, match=r"--live with teacher/beit3-pair/pair/layers: networks of pairs are run by"):
        check_live(FieldNames(targets={"pair_layers": "teacher/beit3-pair/pair/layers"}))
    check_live(FieldNames(targets={"layers": LAYERS, "text_layers": TEXT_LAYERS}))
