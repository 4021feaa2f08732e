"""Models of timm, by a stub of its interface: how they are built, what is taken of them, what is said when timm fails.

B batch, H height, W width, T tokens, D width.
"""

from __future__ import annotations

import fnmatch
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models_families import randomised, relative
from test_models_whole import SIDE, TOLERANCE, crops_of, passed, whole
from torch import Tensor, nn

from emkum.errors import MissingPackage, RefusedTeacher, UnknownNetwork, UnsupportedNetwork, WeightsUnavailable
from emkum.models import whole_timm
from emkum.models.catalogue import load_network
from emkum.models.network import normalise
from emkum.models.supervision import Guard


class StubViT(nn.Module):
    """What timm's VisionTransformer shows: forward_features, forward_head, blocks, cls_token, num_prefix_tokens."""

    def __init__(self, num_classes: int = 5, global_pool: str = "token", norm_behind: bool = False) -> None:
        super().__init__()
        self.num_classes, self.num_prefix_tokens, self.global_pool = num_classes, 2, global_pool
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.register = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.norm: nn.Module = nn.Identity() if norm_behind else nn.LayerNorm(8)
        self.fc_norm: nn.Module = nn.LayerNorm(8) if norm_behind else nn.Identity()
        self.head: nn.Module = nn.Linear(8, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        first = torch.cat([self.cls_token, self.register], 1).expand(len(images), -1, -1)
        return self.norm(self.blocks(torch.cat([first, patches], 1)))  # type: ignore[no-any-return]

    def forward_head(self, tokens: Tensor) -> Tensor:
        return self.head(self.fc_norm(tokens[:, 0]))  # type: ignore[no-any-return]


class StubConv(nn.Module):
    """What a convolutional model of timm shows; Swin's maps have the channels last."""

    def __init__(self, num_classes: int = 5, output_fmt: str = "NCHW") -> None:
        super().__init__()
        self.num_classes, self.output_fmt = num_classes, output_fmt
        self.conv, self.head = nn.Conv2d(3, 6, 16, 16), nn.Linear(6, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        return features.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else features  # type: ignore[no-any-return]

    def forward_head(self, features: Tensor) -> Tensor:
        axes = (1, 2) if self.output_fmt == "NHWC" else (2, 3)
        return self.head(features.mean(axes))  # type: ignore[no-any-return]


def stub_timm(monkeypatch: pytest.MonkeyPatch, made: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    """A module `timm` with three models; what it made, with which options, goes into `made`."""
    models: dict[str, tuple[Callable[..., nn.Module], int]] = {
        "vit_tiny.dino": (StubViT, 0),
        "vit_tiny.a1_in1k": (StubViT, 5),
        "beit_tiny.in22k_ft_in1k": (lambda **more: StubViT(norm_behind=True, **more), 5),
        "resnet_tiny.a1_in1k": (lambda dynamic_img_size=None, **more: unsized(dynamic_img_size, **more), 5),
        "swin_tiny.ms_in1k": (lambda **more: StubConv(output_fmt="NHWC", **more), 5),
    }

    def unsized(dynamic_img_size: Any, **more: Any) -> nn.Module:
        if dynamic_img_size is not None:
            raise TypeError("unexpected keyword argument 'dynamic_img_size'")
        return StubConv(**more)

    @dataclass
    class Published:
        tag: str
        num_classes: int
        has_weights: bool
        input_size: tuple[int, int, int] = (3, SIDE, SIDE)
        mean: tuple[float, ...] = (0.5, 0.4, 0.3)
        std: tuple[float, ...] = (0.2, 0.3, 0.25)
        crop_pct: float = 0.875
        interpolation: str = "bicubic"
        license: str | None = "apache-2.0"

    def full(name: str) -> str:
        return next(model for model in [*models, "vit_tiny.none"] if model == name or model.startswith(f"{name}."))

    def create_model(name: str, pretrained: bool, **options: Any) -> nn.Module:
        assert pretrained
        if name.startswith("swin"):
            raise OSError("We couldn't connect to the hub to load the files\nand more")
        make = models[full(name)][0]
        sized = options if name.startswith("resnet") else {k: v for k, v in options.items() if k != "dynamic_img_size"}
        model = randomised(make(**sized))
        made.append((model, options))
        return model

    def get_pretrained_cfg(name: str) -> Published:
        if name == "vit_tiny.nosuch":
            raise RuntimeError("Invalid pretrained tag (nosuch)")
        tag = full(name).partition(".")[2]
        return Published(tag, models.get(full(name), (None, 0))[1], tag != "none")

    stub = types.ModuleType("timm")
    stub.__dict__.update(
        __version__="1.0.29",
        is_model=lambda name: name.partition(".")[0] in {model.partition(".")[0] for model in models},
        list_models=lambda pattern="*", pretrained=False: [m for m in models if fnmatch.fnmatch(m, pattern)],
        create_model=create_model,
        get_pretrained_cfg=get_pretrained_cfg,
    )
    monkeypatch.setitem(sys.modules, "timm", stub)


def test_a_self_supervised_model_of_timm_is_built_for_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[nn.Module, dict[str, Any]]] = []
    stub_timm(monkeypatch, made)
    network = load_network("timm:vit_tiny.dino")
    model, options = made[0]
    assert options == {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}
    assert (network.name, network.source, network.revision) == (
        "timm-vit_tiny.dino",
        "timm:vit_tiny.dino",
        "timm 1.0.29",
    )
    assert (network.supervision, network.licence) == ("none", "apache-2.0")
    assert network.preprocessing is not None
    assert (network.preprocessing.std, network.preprocessing.crop_fraction) == ((0.2, 0.3, 0.25), 0.875)
    assert whole(network).spec.outputs == ("cls", "patches", "mean", "layers")
    crops = crops_of(SIDE, 24)
    with torch.no_grad():
        tokens = model.forward_features(normalise(network, crops))  # type: ignore[operator]
    ours = passed(network, ["cls", "patches", "mean", "layers"], crops)
    assert relative(ours["cls"], tokens[:, 0]) < TOLERANCE
    assert relative(ours["patches"], tokens[:, 2:]) < TOLERANCE
    assert relative(ours["mean"], tokens[:, 2:].mean(1)) < TOLERANCE
    assert ours["layers"].shape == tokens.shape
    with pytest.raises(UnsupportedNetwork, match=r"timm-vit_tiny\.dino \(timm/vit_tiny\.dino\) has no classifier"):
        load_network("timm:vit_tiny.dino#logits")
    Guard(text_free=True).check(["timm:vit_tiny.dino"])


def test_a_classifier_of_timm_gives_its_logits_and_its_map(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[nn.Module, dict[str, Any]]] = []
    stub_timm(monkeypatch, made)
    network, named = load_network("timm:resnet_tiny"), load_network("timm:resnet_tiny.a1_in1k", name="mine")
    assert made[0][1] == {}  # it has no option for the size of its pictures
    assert (network.name, named.name) == ("timm-resnet_tiny.a1_in1k", "mine")
    assert network.supervision == "class_labels"
    crops = crops_of(SIDE, SIDE)
    with torch.no_grad():
        features = made[0][0].forward_features(normalise(network, crops))  # type: ignore[operator]
        logits = made[0][0].forward_head(features)  # type: ignore[operator]
    ours = passed(network, ["logits", "patches", "cls"], crops)
    assert relative(ours["logits"], logits) < TOLERANCE
    assert relative(ours["patches"], features.flatten(2).transpose(1, 2)) < TOLERANCE
    assert relative(ours["cls"], features.mean((2, 3))) < TOLERANCE
    with pytest.raises(RefusedTeacher, match="its tag in timm is a1_in1k"):
        Guard(label_free=True).check(["timm:resnet_tiny.a1_in1k"])


def test_channels_last_and_a_norm_behind_the_pooling_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    last = randomised(StubConv(output_fmt="NHWC"))
    images = torch.randn(2, 3, SIDE, 48)
    with torch.no_grad():
        ours = whole_timm._run(last, images, None, ("patches",))["tokens"]
        expected = last.conv(images).flatten(2).transpose(1, 2)  # type: ignore[operator]
    assert torch.equal(ours, expected)
    stub_timm(monkeypatch, [])
    network = load_network("timm:beit_tiny.in22k_ft_in1k")
    assert whole(network).spec.outputs == ("layers", "logits")  # its tokens never got the norm
    assert (network.width, network.supervision) == (8, "class_labels")


def test_what_timm_cannot_give_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_timm(monkeypatch, [])
    with pytest.raises(UnknownNetwork, match="timm has no model resnet_tinny") as unknown:
        load_network("timm:resnet_tinny")
    assert unknown.value.way_out == "did you mean timm:resnet_tiny.a1_in1k?"
    with pytest.raises(UnknownNetwork, match=r"timm has no model vit_tiny\.nosuch"):
        load_network("timm:vit_tiny.nosuch")
    with pytest.raises(UnsupportedNetwork, match=r"timm has no weights for vit_tiny\.none") as weightless:
        load_network("timm:vit_tiny.none")
    assert weightless.value.way_out == "name one of timm:vit_tiny.dino, timm:vit_tiny.a1_in1k"
    with pytest.raises(WeightsUnavailable, match="timm cannot load swin_tiny: We couldn't connect to the hub"):
        load_network("timm:swin_tiny")


def test_timm_that_is_absent_or_beside_a_wrong_torchvision_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackage, match="timm is not installed") as absent:
        load_network("timm:resnet18")
    assert absent.value.way_out == "pip install 'emkum[timm]'"
    monkeypatch.delitem(sys.modules, "timm")
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        MissingPackage, match=r"torchvision::nms does not exist\. Its torchvision.* built for another"
    ) as bad:
        load_network("timm:resnet18")
    assert "uninstall it: everything but timm works without it" in bad.value.way_out


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("a1_in1k", "class_labels"),
        ("augreg_in21k_ft_in1k", "class_labels"),
        ("fb_ssl_yfcc100m_ft_in1k", "class_labels"),
        ("in22k_ft_in22k", "class_labels"),
        ("fcmae_ft_in22k_in1k", "class_labels"),
        ("dino", "none"),
        ("lvd142m", "none"),
        ("mae", "none"),
        ("fcmae", "none"),
        ("in1k_ijepa", "none"),
        ("mim_in22k", "none+clip_tokenizer"),
        ("mim_in22k_ft_in1k", "class_labels"),
        ("openai", "paired_text"),
        ("laion2b", "paired_text"),
        ("openai_ft_in1k", "class_labels"),
        ("new_thing", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_tag_of_timm_tells_the_supervision(tag: str, expected: str) -> None:
    assert whole_timm.supervision(tag) == expected
