"""`emkum recipes`: what is read out of the files that ship, and the commands that feed them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_cache import make_cache

from emkum.cli import run as emkum
from emkum.errors import UnknownRecipe, UsageError
from emkum.models.families.registry import CATALOGUE
from emkum.shards.reader import Cache
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage2_train.recipe import RECIPES_DIR, load_recipe, shipped_recipes, target_roles
from emkum.stage2_train.recipe_listing import (
    extract_commands,
    listing,
    needs,
    read_header,
    shipped_headers,
    show,
    show_json,
)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_that_ships_opens_with_all_that_is_listed_of_it(name: str) -> None:
    header = read_header(RECIPES_DIR / f"{name}.toml")
    assert header.name == name
    assert header.what
    assert header.what[0] not in "#: "
    assert not header.what.startswith(name)
    assert header.command.startswith(f"emkum train --cache ./shards --recipe {name}")
    for part in (header.reads, header.trains, header.costs, header.reaches):
        assert part
        assert "#" not in part


def test_a_header_is_parsed_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "# mine: something\n# on two lines.\n#\n#   emkum train --cache ./shards --recipe mine\n#\n"
        "# Reads    a field,\n#          and another.\n# Trains   all.\n# Costs    nothing.\n# Reaches  the moon.\n\n"
        "# Reads no more\nkind = 'texts'\n[objectives.layers-mse]\n"
    )
    header = read_header(path)
    assert header.to_json() == {
        "name": "mine",
        "what": "something on two lines.",
        "command": "emkum train --cache ./shards --recipe mine",
        "reads": "a field, and another.",
        "trains": "all.",
        "costs": "nothing.",
        "reaches": "the moon.",
    }
    shown = show(str(path))
    assert shown.startswith(
        "mine: something on two lines.\n\n  emkum train --cache ./shards --recipe mine\n\nReads    a field"
    )
    assert "[training]\nepochs = 10\n" in shown
    path.write_text("kind = 'texts'\n[objectives.layers-mse]\n")
    assert read_header(path).what == ""
    assert show(str(path)).startswith("mine\n\n\nSettings")


def test_the_list_has_every_recipe_with_what_it_is_reads_and_reached() -> None:
    text = listing(shipped_headers())
    assert max(map(len, text.splitlines())) <= 120
    assert re.findall(r"^(\S+)  ", text, re.MULTILINE) == shipped_recipes()
    flat = " ".join(text.split())
    for header in shipped_headers():
        for part in (header.what, header.reads, header.reaches):
            assert " ".join(part.split()) in flat


def test_show_explains_and_has_the_settings_that_are_not_in_the_file_too() -> None:
    text = show("ssmke")
    assert "Costs    published: 3.26 M pairs, 7 epochs, batch 2 x 256" in text
    assert "[objectives.ctl]\nweight = 1.0\ntemperature = 0.07\n" in text
    assert "accumulate = 1" in text
    assert show_json("ssmke")["settings"] == load_recipe("ssmke").to_json()
    with pytest.raises(UnknownRecipe, match="no such recipe: ssmk"):
        show("ssmk")


# --- what feeds a recipe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_command_that_feeds_a_recipe_names_known_teachers_and_all_its_targets(name: str) -> None:
    recipe = load_recipe(name)
    commands = extract_commands(recipe)
    assert [shlex.split(command)[5] for command in commands] == ["train", "val"]
    words = shlex.split(re.sub(r"<tars of \w+>", "tars", commands[0]))
    assert words[:2] == ["emkum", "extract"]
    flags: dict[str, list[str]] = {}
    for flag, value in zip(words[2::2], words[3::2], strict=True):
        flags.setdefault(flag, []).append(value)
    networks = [*flags["--teacher"], *flags.get("--encoder", []), *flags.get("--text-encoder", [])]
    assert {network for network in networks if network != "none"} <= set(CATALOGUE)
    targets = tuple(flags["--targets"][0].split(","))
    assert {role.rpartition("_")[2] for role in target_roles(recipe)} <= set(targets)
    ExtractConfig(teacher=tuple(flags["--teacher"]), data=("tars",), targets=targets)


def test_the_commands_of_published_teachers() -> None:
    text = needs("ssmke").text()
    assert text.startswith("# reads image/<encoder>@<cut>/tokens")
    assert text.splitlines()[-2:] == [
        f"emkum extract --cache ./shards --split {split} --data <tars of {split}> --teacher beit2 "
        "--text-encoder bert-base --targets cls"
        for split in ("train", "val")
    ]
    assert all(line.startswith(("# ", "emkum ")) for line in text.splitlines())
    assert (
        "--teacher resnet50-a1 --text-encoder bert-base --encoder beit2 --targets logits" in needs("shre").commands[0]
    )
    assert "--teacher data2vec2-image --text-encoder none --targets layers" in needs("image-kd").commands[0]
    assert needs("text-kd").commands[0].endswith("--teacher bert-base --targets layers")


def test_a_cache_says_what_it_lacks_or_that_it_has_all(tmp_path: Path) -> None:
    cache = Cache.open(make_cache(tmp_path / "c", fields=("tokens", "ids", "cls")).path)
    found = needs("ssmke", cache)
    assert found.text() == (
        "ssmke has all it reads: image/tinyvit@2/tokens, text/tinybert/ids, teacher/tinyvit/image/cls"
    )
    lacking = needs("image-kd", cache)
    assert lacking.lacks.startswith("recipe image-kd needs a teacher's layers targets; the cache")
    assert lacking.commands[0].startswith(
        f"emkum extract --cache {tmp_path / 'c'} --split train --data <tars> --teacher"
    )
    assert lacking.text().splitlines() == [f"image-kd lacks something: {lacking.lacks}", lacking.commands[0]]


def test_a_statistic_that_a_recipe_reads_is_among_what_a_cache_may_lack(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c", fields=("tokens", "ids", "cls")).path
    (tmp_path / "few.toml").write_text('base = "itc-only"\n[objectives.codes]\ncodes = 4\n')
    lacking = needs(str(tmp_path / "few.toml"), Cache.open(path))
    assert lacking.lacks.endswith("keeps no teacher/tinyvit/image/cls/codebook-4")
    (command,) = lacking.commands
    assert command == f"emkum cache stats {path} --field teacher/tinyvit/image/cls --what codebook --codes 4"
    assert emkum(shlex.split(command)[1:]) == 0
    assert not needs(str(tmp_path / "few.toml"), Cache.open(path)).lacks


def test_a_cache_without_captions_of_pictures_is_told_what_to_extract(tmp_path: Path) -> None:
    cache = Cache.open(make_cache(tmp_path / "c", captions=0, fields=("tokens", "cls")).path)
    found = needs("itc-only", cache)
    assert found.commands == ()
    assert "has no captions of pictures" in found.text()
    assert found.text().endswith("with --text-encoder, or train image-kd")


def test_a_cache_in_which_several_fields_fit_lacks_nothing(tmp_path: Path) -> None:
    class Twice:
        """Two fields of token ids."""

        def __init__(self, cache: Cache) -> None:
            self.fields = {**cache.fields, "text/other/ids": None}
            self.splits, self.models, self.captions, self.path = cache.splits, cache.models, cache.captions, cache.path

    cache = Cache.open(make_cache(tmp_path / "c").path)
    with pytest.raises(UsageError, match=r"2 fields fit data\.ids"):
        needs("ssmke", Twice(cache))  # type: ignore[arg-type]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emkum(["recipes"]) == 0
    assert capsys.readouterr().out.startswith("audio-kd" if "audio-kd" in shipped_recipes() else shipped_recipes()[0])
    assert emkum(["recipes", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == shipped_recipes()
    assert emkum(["recipes", "show", "ssmke", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["kind"] == "pairs"
    cache = str(make_cache(tmp_path / "c").path)
    assert emkum(["recipes", "needs", "ssmke", "--cache", cache, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fields"][-1] == "teacher/tinyvit/image/cls"
    assert emkum(["recipes", "needs", "smke"]) == 2
    assert "did you mean ssmke?" in capsys.readouterr().err


def test_listing_recipes_does_not_load_torch() -> None:
    code = "import sys\nfrom emkum.cli import run\n"
    code += "for words in (['recipes'], ['recipes', 'show', 'ssmke'], ['recipes', 'needs', 'ssmke']):\n"
    code += "    assert run(words) == 0\nassert not {'torch', 'zarr', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
