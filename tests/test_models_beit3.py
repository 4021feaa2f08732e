"""BEiT-3 gives the numbers of its published equations: random weights under the original names, and a plain reference.

The original does not install beside a current torch, so the reference stands here: loops over layers and heads, sharing
nothing with emkum. Sub-norm blocks (Magneto, arXiv:2210.06423) of which pictures (A) and texts (B) have their own.
B batch, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.errors import UnsupportedNetwork, WeightsUnavailable
from emkum.models import targets
from emkum.models.backbone import Backbone
from emkum.models.catalogue import load_network
from emkum.models.families.beit3 import FAMILIES
from emkum.models.families.checkpoint import of_tensors
from emkum.models.families.family import Family
from emkum.models.families.registry import CATALOGUE, read_backbone
from emkum.models.multiway import Layout, Multiway, MultiwaySpec
from emkum.models.network import Network
from tests.test_models_families import TOLERANCE, relative
from tests.test_models_tokenizer import trained_spm
from tests.towers import (
    GRID,
    PATCH,
    WORDS,
    assert_saved_and_rounded,
    assert_strict,
    assert_towers_pass,
    padded_texts,
    random,
)

WIDTH, HEADS, DEPTH, MLP = 128, 2, 3, 96  # heads of 64 channels, as in every BEiT-3
State = dict[str, Tensor]


def original_state(seed: int = 0, prefix: str = "beit3.") -> State:
    """What the pre-training saves. No number left at 0 or 1."""
    shapes = {
        "text_embed.weight": (WORDS, WIDTH),
        "vision_embed.mask_token": (1, 1, WIDTH),
        "vision_embed.cls_token": (1, 1, WIDTH),
        "vision_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "vision_embed.proj.bias": (WIDTH,),
        "encoder.embed_positions.A.weight": (GRID * GRID + 1 + 2, WIDTH),
        "encoder.embed_positions.B.weight": (40, WIDTH),
    }
    for way in "AB":
        for i in range(DEPTH):
            layer = f"encoder.layers.{i}"
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                shapes[f"{layer}.self_attn.{name}.{way}.weight"] = (WIDTH, WIDTH)
                shapes[f"{layer}.self_attn.{name}.{way}.bias"] = (WIDTH,)
            shapes |= norm(f"{layer}.self_attn.inner_attn_ln.{way}", WIDTH)
            shapes |= norm(f"{layer}.self_attn_layer_norm.{way}", WIDTH)
            shapes |= norm(f"{layer}.final_layer_norm.{way}", WIDTH)
            shapes |= norm(f"{layer}.ffn.{way}.ffn_layernorm", MLP)
            shapes |= {f"{layer}.ffn.{way}.fc1.weight": (MLP, WIDTH), f"{layer}.ffn.{way}.fc1.bias": (MLP,)}
            shapes |= {f"{layer}.ffn.{way}.fc2.weight": (WIDTH, MLP), f"{layer}.ffn.{way}.fc2.bias": (WIDTH,)}
        shapes |= norm(f"encoder.layer_norm.{way}", WIDTH)
    generator = torch.Generator().manual_seed(seed)
    state = {f"{prefix}{name}": drawn(name, shape, generator) for name, shape in shapes.items()}
    return state | {"mlm_head.weight": torch.zeros(WORDS, WIDTH), "mlm_head.bias": torch.zeros(WORDS)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("weight") and len(shape) == 1:
        return 0.8 + 0.3 * noise
    return noise * (0.1 if len(shape) == 2 else 0.3)


class Reference:
    """The published equations on a state dict. `split`: so many tokens at the front take way A, the others way B."""

    def __init__(self, state: State) -> None:
        self.state = {name.removeprefix("beit3."): tensor for name, tensor in state.items()}
        self.hidden: list[Tensor] = []
        self.ffn: list[Tensor] = []

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def ways(self, x: Tensor, split: int, apply: Callable[[Tensor, str], Tensor], name: str) -> Tensor:
        """`apply` with the weights called `name`, of way A or B, on the tokens of either way."""
        parts = [(x[:, :split], "A"), (x[:, split:], "B")]
        return torch.cat([apply(part, name.format(way)) for part, way in parts if part.shape[1]], dim=1)

    def embed_image(self, images: Tensor) -> Tensor:
        patches = F.conv2d(images, self.state["vision_embed.proj.weight"], self.state["vision_embed.proj.bias"], PATCH)
        rows, columns = patches.shape[2:]
        table = self.state["encoder.embed_positions.A.weight"][2:]
        grid = table[1:].T.reshape(1, WIDTH, GRID, GRID)
        if (rows, columns) != (GRID, GRID):
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        positions = torch.cat([table[:1], grid.reshape(WIDTH, -1).T])
        cls = self.state["vision_embed.cls_token"].expand(len(images), -1, -1)
        return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1) + positions

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = self.state["encoder.embed_positions.B.weight"][2 : 2 + ids.shape[1]]
        return (self.state["text_embed.weight"][ids] + positions) * mask[..., None]

    def run(self, x: Tensor, split: int, mask: Tensor) -> Tensor:
        """The final tokens; fills `hidden` and `ffn`."""
        for i in range(DEPTH):
            layer = f"encoder.layers.{i}"
            y = self.ways(x, split, self.norm, layer + ".self_attn_layer_norm.{}")
            q, k, v = (self.ways(y, split, self.linear, f"{layer}.self_attn.{name}_proj.{{}}") for name in "qkv")
            heads = []
            for h in range(HEADS):
                own = slice(h * 64, (h + 1) * 64)
                logits = (q[..., own] / 8) @ k[..., own].transpose(1, 2)
                logits = logits.masked_fill(~mask[:, None, :], float("-inf"))
                heads.append(torch.softmax(logits, dim=-1) @ v[..., own])
            y = self.ways(torch.cat(heads, dim=-1), split, self.norm, layer + ".self_attn.inner_attn_ln.{}")
            x = x + self.ways(y, split, self.linear, layer + ".self_attn.out_proj.{}")
            y = self.ways(x, split, self.norm, layer + ".final_layer_norm.{}")
            y = self.ways(y, split, self.linear, layer + ".ffn.{}.fc1")
            y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
            y = self.ways(y, split, self.norm, layer + ".ffn.{}.ffn_layernorm")
            self.ffn.append(self.ways(y, split, self.linear, layer + ".ffn.{}.fc2"))
            x = x + self.ffn[-1]
            self.hidden.append(x)
        return self.ways(x, split, self.norm, "encoder.layer_norm.{}")


def write(folder: Path, state: State) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "beit3_base_patch16_224.pth"
    torch.save({"model": state}, path)
    trained_spm(folder / "beit3.spm")
    return path


def in_float32(path: Path, tower: str) -> tuple[Network, Backbone]:
    network = load_network(f"{path}{tower}")
    assert isinstance(network.backbone, Backbone)
    return network, network.backbone


@pytest.mark.parametrize("grid", [(5, 5), (8, 8), (3, 7)], ids=str)
def test_pictures_give_the_numbers_of_the_equations_layer_by_layer(grid: tuple[int, int], tmp_path: Path) -> None:
    state = original_state()
    network, backbone = in_float32(write(tmp_path, state), "")
    images = random(2, 3, grid[0] * PATCH, grid[1] * PATCH)
    reference = Reference(state)
    tokens = reference.embed_image(images)
    final = reference.run(tokens, tokens.shape[1], torch.ones(tokens.shape[:2], dtype=torch.bool))
    with torch.no_grad():
        ours = backbone.embed(images)
        out = backbone.run(ours, grid=grid)
    assert relative(ours, tokens) < TOLERANCE
    for one, other in zip([*out.hidden, *out.ffn], [*reference.hidden, *reference.ffn], strict=True):
        assert relative(one, other) < TOLERANCE
    assert relative(backbone.finish(out.hidden[-1]), final) < TOLERANCE
    assert torch.equal(backbone(images), backbone.finish(out.hidden[-1]))
    assert (network.family, network.width, network.depth, network.patch) == ("beit3", WIDTH, DEPTH, PATCH)


def test_texts_give_the_numbers_of_the_equations_under_a_pad_mask(tmp_path: Path) -> None:
    state = original_state()
    network, backbone = in_float32(write(tmp_path, state), "#text")
    ids, mask = padded_texts()
    reference = Reference(state)
    tokens = reference.embed_text(ids, mask)
    final = reference.run(tokens, 0, mask)
    with torch.no_grad():
        ours = backbone.embed(ids.int(), mask)
        out = backbone.run(ours, mask_BT=mask)
    assert relative(ours, tokens) < TOLERANCE  # pads too: they enter block 0 as zeros
    for one, other in zip([*out.hidden, *out.ffn], [*reference.hidden, *reference.ffn], strict=True):
        assert relative(one[mask], other[mask]) < TOLERANCE
    assert relative(backbone(ids, mask)[mask], final[mask]) < TOLERANCE
    assert (network.modality, network.max_tokens, backbone.spec.pad_id) == ("text", 38, 1)
    with torch.no_grad():  # without a mask the pad id tells pads apart
        assert torch.equal(backbone.embed(ids.masked_fill(~mask, 1)), ours)


@pytest.mark.parametrize("grid", [(5, 5), (4, 7)], ids=str)
def test_pairs_give_the_numbers_of_the_equations_with_pads(grid: tuple[int, int], tmp_path: Path) -> None:
    state = original_state()
    network = load_network(f"{write(tmp_path, state)}#pair")
    backbone = network.backbone
    assert isinstance(backbone, Multiway)
    images = random(4, 3, grid[0] * PATCH, grid[1] * PATCH)
    ids, mask = padded_texts()
    reference = Reference(state)
    tokens = torch.cat([reference.embed_image(images), reference.embed_text(ids, mask)], dim=1)
    split = 1 + grid[0] * grid[1]
    whole = torch.cat([torch.ones(4, split, dtype=torch.bool), mask], dim=1)
    final = reference.run(tokens, split, whole)
    with torch.no_grad():
        ours, layout = backbone.embed(images, ids, mask)
        out = backbone.run(ours, layout)
    assert relative(ours, tokens) < TOLERANCE
    for one, other in zip([*out.hidden, *out.ffn], [*reference.hidden, *reference.ffn], strict=True):
        assert relative(one[whole], other[whole]) < TOLERANCE
    assert relative(backbone(images, ids, mask)[whole], final[whole]) < TOLERANCE
    assert relative(targets.layers(out.hidden, whole, True), targets.layers(reference.hidden, whole, True)) < TOLERANCE
    assert (network.modality, network.width, network.depth) == ("pair", WIDTH, DEPTH)


def test_more_pads_change_nothing_about_a_pair(tmp_path: Path) -> None:
    backbone = load_network(f"{write(tmp_path, original_state())}#pair").backbone
    assert isinstance(backbone, Multiway)
    images = random(2, 3, GRID * PATCH, GRID * PATCH)
    ids = torch.randint(4, WORDS, (2, 7))
    short = backbone(images, ids, torch.ones(2, 7, dtype=torch.bool))
    assert relative(short, backbone(images, ids)) < TOLERANCE
    longer = torch.cat([ids, torch.full((2, 9), 5)], dim=1)
    long = backbone(images, longer, (torch.arange(16) < 7).expand(2, -1))
    assert relative(long[:, : short.shape[1]], short) < TOLERANCE


def test_the_stack_of_pairs_gives_a_picture_alone_or_a_text_alone_what_their_towers_give(tmp_path: Path) -> None:
    path = write(tmp_path, original_state())
    pair = load_network(f"{path}#pair").backbone
    image, text = load_network(str(path)).backbone, load_network(f"{path}#text").backbone
    assert isinstance(pair, Multiway)
    tokens = image.embed(random(2, 3, 20, 20))
    out = pair.run(tokens, Layout(tokens.shape[1], (5, 5)))
    assert relative(pair.finish(out.hidden[-1], Layout(26)), image(random(2, 3, 20, 20))) < TOLERANCE
    ids, mask = padded_texts()
    words = text.embed(ids, mask)
    out = pair.run(words, Layout(0, mask_BT=mask))
    assert relative(pair.finish(out.hidden[-1], Layout(0))[mask], text(ids, mask)[mask]) < TOLERANCE


@pytest.mark.parametrize("tower", ["", "#text", "#pair"])
def test_a_missing_a_left_over_and_a_misshapen_tensor_are_each_refused(tower: str, tmp_path: Path) -> None:
    way = "B" if tower == "#text" else "A"
    name = f"beit3.encoder.layers.1.self_attn.inner_attn_ln.{way}.bias"
    assert_strict(lambda state: load_network(f"{write(tmp_path, state)}{tower}"), original_state(), name)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_without_any_one_tensor_of_its_own_a_tower_is_refused(family: Family) -> None:
    state = original_state()
    not_its_own = {"beit3": (".B.", "text_embed"), "beit3-text": (".A.", "vision_embed"), "beit3-pair": ()}[family.name]
    for name in state:
        without = of_tensors({other: tensor for other, tensor in state.items() if other != name}, "file", {})
        if name.startswith("mlm_head") or name.endswith("mask_token") or any(part in name for part in not_its_own):
            read_backbone(family, without)
            continue
        with pytest.raises(UnsupportedNetwork, match=rf"lacks {name.removeprefix('beit3.')}"):
            read_backbone(family, without)


@pytest.mark.parametrize("sign", ["head.weight", "head.dense1.weight", "fc_norm.weight", "pooler.dense.weight"])
def test_a_file_fine_tuned_with_labels_is_refused(sign: str, tmp_path: Path) -> None:
    path = write(tmp_path, original_state() | {sign: torch.zeros(5, WIDTH)})
    for tower in ("", "#text", "#pair"):
        with pytest.raises(UnsupportedNetwork, match=f"fine-tuned with labels: it has {sign}") as caught:
            load_network(f"{path}{tower}")
        assert caught.value.way_out == "use the file of the pre-training, such as beit3 in the catalogue"


@pytest.mark.parametrize("tower", ["", "#text", "#pair"])
@pytest.mark.parametrize("width", [96, 1408])
def test_a_width_whose_heads_are_not_known_is_refused(width: int, tower: str, tmp_path: Path) -> None:
    """The giant of the paper is 1408 wide, with 16 heads of 88 channels."""
    state = {}
    for name, tensor in original_state().items():
        wide = tensor.repeat_interleave(11, 0) if tensor.shape[0] == WIDTH else tensor
        wide = wide.repeat_interleave(11, -1) if tensor.ndim > 1 and tensor.shape[-1] == WIDTH else wide
        state[name] = wide[tuple(slice(width) if side == 11 * WIDTH else slice(None) for side in wide.shape)].clone()
    with pytest.raises(UnsupportedNetwork, match=f"is {width} wide and does not say how many heads") as caught:
        load_network(f"{write(tmp_path, state)}{tower}")
    assert caught.value.way_out == "use a released file; docs/teachers.md lists them"


@pytest.mark.parametrize("sign", ["language_head.weight", "vision_head.weight", "logit_scale"])
def test_a_file_tuned_for_retrieval_is_refused(sign: str, tmp_path: Path) -> None:
    path = write(tmp_path, original_state() | {sign: torch.zeros(WIDTH, WIDTH)})
    with pytest.raises(UnsupportedNetwork, match=f"is tuned for retrieval: it has {sign}"):
        load_network(str(path))


@pytest.mark.parametrize("tower", ["#text", "#pair"])
def test_a_tokenizer_of_more_pieces_than_the_network_has_words_is_refused(tower: str, tmp_path: Path) -> None:
    state = original_state()
    words = {name: tensor[:28] for name, tensor in state.items() if tensor.shape[0] == WORDS}
    path = write(tmp_path, state | words)  # a model of 28 pieces, whose ids begin at 1
    with pytest.raises(UnsupportedNetwork, match="a tokenizer of 29 ids, up to 28; the network knows 28 words"):
        load_network(f"{path}{tower}")


@pytest.mark.parametrize("prefix", ["", "beit3."])
@pytest.mark.parametrize("tower", ["", "#text", "#pair"])
def test_saved_and_loaded_again_it_is_the_same_network(tower: str, prefix: str, tmp_path: Path) -> None:
    network = load_network(f"{write(tmp_path / 'from', original_state(prefix=prefix))}{tower}")
    assert_saved_and_rounded(network, tmp_path / "kept")


def test_the_towers_run_through_a_frozen_pass(tmp_path: Path) -> None:
    assert_towers_pass(write(tmp_path, original_state()), WIDTH)


def test_the_catalogue_has_a_name_for_every_tower_of_every_size() -> None:
    for size in ("beit3", "beit3-large"):
        image, text, pair = (CATALOGUE[f"{size}{tower}"] for tower in ("", "-text", "-pair"))
        assert image.source == text.source == pair.source
        assert (image.modality, text.modality, pair.modality) == ("image", "text", "pair")
        assert {entry.supervision for entry in (image, text, pair)} == {"paired_text"}
        assert text.companions[0].endswith("/beit3.spm")


def test_without_its_sentencepiece_file_the_text_tower_says_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, original_state())
    (tmp_path / "beit3.spm").unlink()
    assert load_network(str(path)).tokenizer is None
    for tower in ("#text", "#pair"):
        with pytest.raises(WeightsUnavailable, match=r"has no beit3\.spm, BEiT-3's tokenizer") as caught:
            load_network(f"{path}{tower}")
        assert caught.value.way_out.endswith("/beit3.spm")


def test_towers_of_unlike_blocks_make_no_network_of_pairs(tmp_path: Path) -> None:
    network = load_network(f"{write(tmp_path, original_state())}#pair")
    spec = network.backbone.spec
    assert isinstance(spec, MultiwaySpec)
    with pytest.raises(UnsupportedNetwork, match="whose blocks differ"):
        dataclasses.replace(spec, text=dataclasses.replace(spec.text, heads=4))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_heads_are_said_to_be_inferred(family: Family) -> None:
    assert family.key_map(of_tensors(original_state(prefix=""), "beit3.pth", {})).inferred == {"heads": HEADS}
