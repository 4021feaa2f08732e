"""A function of one's own as a teacher: what it gives, what makes it this one, where it is found, what is refused."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_models_families import relative, write_tokenizer
from test_models_whole import SIDE, TOLERANCE, crops_of, passed, texts, whole

from emkum.errors import RefusedTeacher, UnknownNetwork, UnsupportedNetwork, UsageError
from emkum.models import targets, whole_user
from emkum.models.catalogue import load_network
from emkum.models.network import normalise, save_network
from emkum.models.passes import FrozenPass, Wanted
from emkum.models.supervision import Guard

TEACHERS = """
import dataclasses
from pathlib import Path
import torch
from emkum.models.whole import UserTeacher

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 8, 8), torch.nn.Dropout(), torch.nn.Linear(6, 4))

def outputs(net, images):
    places = net[0](images).flatten(2).transpose(1, 2)
    return {"patches": places, "logits": net[2](net[1](places.mean(1)))}

def build():
    return UserTeacher(net(), outputs, MEAN, STD, 32, labels=("a", "b", "c", "d"), supervision="class_labels",
                       licence="mine")

def cls_only():
    return dataclasses.replace(build(), run=lambda net, images: {"cls": net[0](images).amax((2, 3))}, name="Own Name")

def random():
    return dataclasses.replace(build(), run=lambda net, images: {"cls": torch.randn(len(images), 4)})

def shapes():
    return dataclasses.replace(build(), run=lambda net, images: {"cls": images.mean((2, 3))[0]})

def elsewhere():
    return dataclasses.replace(build(), run=lambda net, images: {"logits": net[0](images).amax((2, 3))})

def names():
    return dataclasses.replace(build(), run=lambda net, images: {"class": images.mean((2, 3))})

def infinite():
    return dataclasses.replace(build(), run=lambda net, images: {"cls": images.mean((2, 3)) / 0})

def broken():
    raise KeyError("weights")

def number():
    return 5

def words():
    return dataclasses.replace(build(), supervision="some")

def encode(net, ids, mask):
    tokens = net(ids)
    pooled = (tokens * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
    return {"patches": tokens + pooled, "layers": [tokens + pooled, tokens]}

def text():
    torch.manual_seed(0)
    return UserTeacher(torch.nn.Embedding(60, 6), encode, modality="text", max_tokens=32,
                       tokenizer=Path(__file__).with_name("tokenizer.json").read_bytes())

def greedy():
    return dataclasses.replace(text(), run=lambda net, ids, mask: {"patches": net(ids) + net(ids).mean(1)[:, None]})

def causal():
    return dataclasses.replace(text(), run=lambda net, ids, mask: {"patches": net(ids).cumsum(1)})

def short():
    return dataclasses.replace(text(), max_tokens=4)

NOT_A_FUNCTION = 5
"""


@pytest.fixture
def teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with my_teachers.py in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "my_teachers.py").write_text(TEACHERS)
    write_tokenizer(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_teachers", raising=False)
    yield folder
    sys.modules.pop("my_teachers", None)


def test_the_classifier_of_a_pass_in_bfloat16_runs_in_float32(teachers: Path) -> None:
    network, crops = load_network("my_teachers:build"), crops_of(SIDE, 24)
    head = whole(network).classifiers
    assert [module.out_features for module in head] == [4]
    given = passed(network, ["logits", "cls", "mean"], crops, "bfloat16")
    expected = torch.nn.functional.linear(given["mean"], head[0].weight, head[0].bias)
    assert relative(given["logits"], expected) < 2e-3  # the mean itself is rounded in front of it, differently
    assert not torch.equal(given["logits"], given["logits"].bfloat16().float())
    other = load_network("my_teachers:elsewhere")  # its 6 logits come from a convolution
    assert whole(other).classifiers == []
    rounded = passed(other, ["logits"], crops, "bfloat16")["logits"]
    assert torch.equal(rounded, rounded.bfloat16().float())


def test_a_function_of_ones_own_is_a_teacher(teachers: Path) -> None:
    network = load_network("my_teachers:build")
    assert (network.name, network.source) == ("my_teachers-build", "my_teachers:build")
    assert (network.supervision, network.licence) == ("class_labels", "mine")
    spec = whole(network).spec
    assert (spec.outputs, spec.width, spec.patch, spec.num_classes) == (("cls", "patches", "mean", "logits"), 6, 8, 4)
    assert whole(network).labels == ("a", "b", "c", "d")
    sha256 = hashlib.sha256(TEACHERS.encode()).hexdigest()
    assert (spec.config, network.revision) == ({"source_sha256": sha256}, sha256)
    crops = crops_of(SIDE, 24)
    module = importlib.import_module("my_teachers")
    with torch.no_grad():
        expected = module.outputs(module.net().eval(), normalise(network, crops))
    ours = passed(network, ["cls", "patches", "logits", "mean"], crops)
    assert relative(ours["patches"], expected["patches"]) < TOLERANCE
    assert relative(ours["logits"], expected["logits"]) < TOLERANCE
    assert relative(ours["cls"], expected["patches"].mean(1)) < TOLERANCE
    only = load_network("my_teachers:cls_only")
    assert (only.name, whole(only).spec.outputs) == ("own-name", ("cls",))


def test_another_version_of_the_function_is_another_network(teachers: Path) -> None:
    first = load_network("my_teachers:build")
    (teachers / "my_teachers.py").write_text(TEACHERS + "# changed\n")
    sys.modules.pop("my_teachers")
    second = load_network("my_teachers:build")
    assert first.weights_sha256 == second.weights_sha256
    assert whole(first).spec != whole(second).spec


def test_a_text_teacher_of_ones_own(teachers: Path) -> None:
    network = load_network("my_teachers:text")
    assert (network.modality, network.max_tokens) == ("text", 32)
    ids, mask = texts()
    module = importlib.import_module("my_teachers")
    with torch.no_grad():
        expected = module.encode(network.backbone.module, ids, mask)
    names = ["cls", "mean", "patches", "layers"]
    wanted = [Wanted(network.name, name) for name in names]  # type: ignore[arg-type]
    ours = dict(zip(names, FrozenPass([network], wanted, "float32", "cpu").texts(ids, mask), strict=True))
    assert relative(ours["cls"], expected["patches"][:, 0]) < TOLERANCE
    words = expected["patches"] * mask[..., None]
    assert relative(ours["mean"], words.sum(1) / mask.sum(1, keepdim=True)) < TOLERANCE
    assert relative(ours["layers"], targets.layers(expected["layers"], mask, final_layer_norm=False)) < TOLERANCE
    assert not ours["patches"][~mask].any()
    with pytest.raises(
        UnsupportedNetwork, match=r"my_teachers-text \(module/my_teachers:text\) cannot be kept as files"
    ):
        save_network(network, teachers / "kept")


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("random", UnsupportedNetwork, "gives other cls for the same input every time: it masks or drops at random"),
        ("shapes", UnsupportedNetwork, r"module/my_teachers:shapes: cls of torch.float32 \(3,\) for 2 inputs"),
        ("names", UnsupportedNetwork, "module/my_teachers:names gives class"),
        ("infinite", UnsupportedNetwork, "gives cls that are inf or NaN for noise"),
        ("broken", UsageError, "my_teachers:broken raised KeyError: 'weights'"),
        ("number", UsageError, "my_teachers:number returns int, not a UserTeacher with a torch module"),
        ("words", UsageError, "my_teachers:words says supervision='some'"),
        ("greedy", UnsupportedNetwork, "reads what stands at the pads"),
        ("causal", UnsupportedNetwork, "reads from left to right"),
        ("short", UsageError, "my_teachers:short reads texts, and has max_tokens=4"),
        ("missing", UnknownNetwork, r"my_teachers \(.*my_teachers.py\) has no function missing"),
        ("NOT_A_FUNCTION", UnknownNetwork, "has no function NOT_A_FUNCTION"),
    ],
)
def test_a_function_that_is_no_teacher_is_refused(
    function: str, error: type[UsageError], message: str, teachers: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        load_network(f"my_teachers:{function}")
    assert caught.value.way_out


def test_a_module_is_looked_for_here_and_in_a_folder_that_is_named(
    teachers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNetwork, match="there is no module no_such_thing in") as caught:
        load_network("no_such_thing:build")
    assert caught.value.way_out.endswith("FOLDER/no_such_thing:build")
    (teachers / "lacks.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(UsageError, match="lacks imports a_package_that_nobody_has, which is not installed"):
        load_network("lacks:build")
    (teachers / "wrong.py").write_text("1 +\n")
    with pytest.raises(UsageError, match="wrong cannot be imported: SyntaxError"):
        load_network("wrong:build")
    here = load_network("my_teachers:build")
    anywhere = whole_user.anywhere("my_teachers:build")
    assert anywhere == f"{teachers}/my_teachers:build"
    assert whole_user.anywhere("os:getcwd") == "os:getcwd"  # installed: found by its name
    other = teachers.parent / "there/package"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    (other / "my_teachers.py").write_text(TEACHERS.replace("manual_seed(0)", "manual_seed(1)"))
    monkeypatch.chdir(teachers.parent)
    assert load_network(anywhere).weights_sha256 == here.weights_sha256
    dotted = load_network("there/package.my_teachers:build")
    assert (dotted.name, dotted.weights_sha256 == here.weights_sha256) == ("package-my_teachers-build", False)
    (teachers.parent / "my_teachers.py").write_text(TEACHERS.replace("manual_seed(0)", "manual_seed(2)"))
    nearer = load_network("my_teachers:build")  # of two with one name the one that is named
    assert nearer.weights_sha256 not in (here.weights_sha256, dotted.weights_sha256)
    sys.modules.pop("package.my_teachers", None)


def test_label_free_asks_the_function_itself(teachers: Path) -> None:
    guard = Guard(label_free=True)
    guard.check(["my_teachers:build"])  # nothing is known before it is called
    network = load_network("my_teachers:build")
    with pytest.raises(RefusedTeacher, match=r"my_teachers:build learned from labels \(it says so itself\)"):
        guard.check_loaded("my_teachers:build", network.supervision, network.modality)


@pytest.mark.parametrize("source", ["https://host/weights:latest", "a/b@c", "C:", "my_teachers", "my-teachers:build"])
def test_what_reads_otherwise_is_no_function(source: str) -> None:
    assert not whole_user.is_named(source)
