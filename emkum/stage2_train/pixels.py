"""A student of pixels: which network it is, the weights it starts from, and the pictures it reads.

B batch, H height, W width, C colour.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from emkum.errors import UsageError
from emkum.models.backbone import Backbone, BackboneSpec, ImageEmbedding
from emkum.models.catalogue import load_network
from emkum.models.network import MODEL_JSON, Network, load_saved
from emkum.models.preprocessing import normalised
from emkum.models.resnet import BatchNorm, ResNet, ResNetSpec
from emkum.stage2_train.loader import Prefix, other_layers_rule
from emkum.stage2_train.origins import FIXED_POSITIONS
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.shared_mlp import start_anew
from emkum.stage2_train.student_network import Student
from emkum.stage2_train.student_shape import head_width
from emkum.stage2_train.student_spec import ImageSide, PixelSide, StudentSpec

if TYPE_CHECKING:
    from emkum.shards.reader import Cache


def build_pixel_student(
    recipe: Recipe, names: FieldNames, target_width: int | None, seed: int, cache: Cache | None
) -> Student:
    """The network of `student.pixels`, all of it trained, and a head where the target asks for one.

    Weights are the network's; after `random:` all are new, drawn from `seed`. The head starts as the network's own
    classifier where that has the target's classes, else anew. cache: whose networks are known by name.
    Raises UsageError for a network that cannot learn so; UnknownNetwork, WeightsUnavailable.
    """
    network, anew = pixel_network(recipe, cache), recipe.student.pixels_start_anew
    spec = _spec(recipe, names, network, target_width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(spec)
        own = student.network
        assert own is not None
        if anew:
            start_network_anew(own)
        else:
            kept = own.state_dict()
            own.load_state_dict({name: t for name, t in network.backbone.state_dict().items() if name in kept})
        origin = f"network: {network.name} (weights sha256 {network.weights_sha256[:12]}, {network.supervision})"
        if student.head is not None:
            start_anew(student.head)
            theirs = network.backbone.head if isinstance(network.backbone, ResNet) else None
            fits = theirs is not None and "logits" in names.targets and len(theirs.weight) == spec.head_width
            if fits and theirs is not None and not anew:
                student.head.load_state_dict(theirs.state_dict())
                origin += ", with its own classifier"
    if network.family.startswith(FIXED_POSITIONS):  # a sine: no parameter, and nothing that new weights replace
        _fix_positions(own, network)
    student.origins = (f"network: new weights in the shape of {network.name}" if anew else origin,)
    return student.float().train()


def pixel_network(recipe: Recipe, cache: Cache | None) -> Network:
    """What `student.pixels` names: a network that the cache keeps, a folder, or a name of the catalogue."""
    wanted = recipe.student.pixels.removeprefix("random:")
    if cache is not None and wanted in cache.models:
        network = load_saved(cache.model_dir(wanted))
    elif (Path(wanted) / MODEL_JSON).is_file():
        network = load_saved(wanted)
    else:
        network = load_network(wanted)
    key = f'student.pixels = "{recipe.student.pixels}"'
    if network.modality != "image":
        raise UsageError(f"{key}: {network.name} is a network of kind {network.modality}", "name one of pictures")
    if not isinstance(network.backbone, Backbone | ResNet):
        raise UsageError(
            f"{key}: {network.name} ({network.family}) is run in one piece, frozen, and cannot be trained",
            "name a ResNet or a Transformer; emkum teachers lists them",
        )
    if recipe.objectives.layers_mse is not None and isinstance(network.backbone, ResNet):
        raise UsageError(
            f"{key}: {network.name} is a ResNet, and has no blocks whose outputs layers-mse could compare",
            "name a Transformer, or --set objectives.layers-mse=none objectives.logits-kl.weight=1",
        )
    return network


def _spec(recipe: Recipe, names: FieldNames, network: Network, target_width: int | None) -> StudentSpec:
    backbone, preprocessing = network.backbone, network.preprocessing
    assert isinstance(backbone, Backbone | ResNet)
    assert preprocessing is not None
    architecture: BackboneSpec | ResNetSpec = backbone.spec
    if isinstance(architecture, ResNetSpec):
        architecture = dataclasses.replace(architecture, num_classes=0)
    elif names.crop_size % architecture.patch != 0:
        raise UsageError(
            f"student.pixels: crops of {names.crop_size} px do not divide into patches of {architecture.patch} px "
            f"({network.name})",
            "extract crops of another --size, or name a network with other patches",
        )
    # Its CLS is compared as it is where the target is as wide.
    same = recipe.objectives.cls_mse is not None and target_width == network.width
    head = head_width(recipe, names, network.width, None if same else target_width)
    return StudentSpec(
        ImageSide(network.name, 0, network.num_prefix, None, recipe.student.image_pooling),
        None,
        network.width,
        None,
        token_types=False,
        head_width=head,
        pixels=PixelSide(architecture, preprocessing, names.crop_size),
    )


@torch.no_grad()
def start_network_anew(network: Backbone | ResNet) -> None:
    """New weights for a network as it was built, from torch's generator.

    A ResNet: He et al. 2015 (arXiv:1502.01852), by what goes out, as its originals; batch norm 1 and 0. A Transformer:
    matrices, patches and tables truncated normal with deviation 0.02, biases 0, LayerScale 1.
    """
    if isinstance(network, ResNet):
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return
    start_anew(network)
    embedding = network.embedding
    assert isinstance(embedding, ImageEmbedding)
    for table in (embedding.patch.weight, embedding.cls, embedding.registers, embedding.positions):
        if table is not None:
            nn.init.trunc_normal_(table, std=0.02)
    if embedding.patch.bias is not None:
        nn.init.zeros_(embedding.patch.bias)


@torch.no_grad()
def _fix_positions(own: Backbone | ResNet, network: Network) -> None:
    assert isinstance(own, Backbone)
    assert isinstance(network.backbone, Backbone)
    ours, theirs = own.embedding.positions, network.backbone.embedding.positions
    if ours is not None and theirs is not None:
        ours.copy_(theirs)
        ours.requires_grad_(False)


def pixel_input(spec: StudentSpec) -> Prefix:
    """uint8 crops [B, H, W, C] -> images_BCHW as the student reads them, float32."""
    assert spec.pixels is not None
    return functools.partial(normalised, spec.pixels.preprocessing)


def check_layers(cache: Cache, names: FieldNames, student: Student) -> None:
    """Layers are compared token by token: raise UsageError where teacher and student differ in tokens or width."""
    if "layers" not in names.targets or student.spec.pixels is None:
        return
    target, architecture = cache.field(names.targets["layers"]), student.spec.pixels.architecture
    rule = other_layers_rule(target)
    prefix = 0 if rule is not None and rule.prefix == "drop" else architecture.num_prefix
    own = prefix + (names.crop_size // architecture.patch) ** 2, architecture.width
    theirs = tuple(target.row_shape)
    if own != theirs:
        raise UsageError(
            f"{target.name} has {theirs[0]} tokens of {theirs[1]} channels, the student {own[0]} of {own[1]}: "
            "layers-mse compares them one by one",
            "name a student with the teacher's patch size and width, or compare another target: objectives.cls-mse",
        )


def has_batch_norm(student: Student) -> bool:
    """Whether a sample's output depends on the others of its batch in training."""
    return any(isinstance(module, BatchNorm) for module in student.modules())


def check_chunk(student: Student, chunk: int) -> None:
    """Raise UsageError where a batch in chunks would be another batch to its norms."""
    if chunk and has_batch_norm(student):
        raise UsageError(
            f"--chunk {chunk} with a ResNet as student: its batch norm is over the whole batch",
            "leave --chunk out; --set training.accumulate=2 with half the batch needs less memory, and norms of half",
        )


def batch_norm_line(student: Student, devices: int, accumulate: int) -> str:
    """For people: over what batch norm is, where that is not a step's whole batch; "" elsewhere."""
    parts = devices * accumulate
    if parts == 1 or not has_batch_norm(student):
        return ""
    kept = "; the statistics of the first process are kept" if devices > 1 else ""
    return f"batch norm is over each of the {parts} parts of a step's batch{kept}"
