"""VLMo gives the numbers of its published equations: random weights under the original names, and a plain reference.

The original does not install beside a current torch, so the reference stands here: loops over layers, heads and pairs
of tokens, sharing nothing with emkum. It has texts in front of pictures, as the original; emkum has them behind.
B batch, T tokens, D width.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.errors import RefusedTeacher, UnsupportedNetwork, UsageError
from emkum.models import targets
from emkum.models.backbone import Backbone
from emkum.models.catalogue import load_network
from emkum.models.families.checkpoint import of_tensors
from emkum.models.families.family import Family
from emkum.models.families.registry import CATALOGUE, read_backbone
from emkum.models.families.vlmo import FAMILIES
from emkum.models.listing import show
from emkum.models.multiway import Multiway, MultiwaySpec
from emkum.models.network import save_network
from emkum.models.supervision import Guard
from tests.test_models_families import TOLERANCE, relative, write_tokenizer
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

WIDTH, DEPTH, FUSED, MLP, TEXT = 32, 4, 2, 48, 196
PICTURE_ROWS = (2 * GRID - 1) ** 2 + 3
State = dict[str, Tensor]


def original_state(seed: int = 0, heads: int = 4, absolute: bool = False, words: int = TEXT) -> State:
    """What the pre-training on pairs saves, or (absolute) that of base_plus. No number left at 0 or 1."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.cls_token": (1, 1, WIDTH),
        "transformer.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "transformer.patch_embed.proj.bias": (WIDTH,),
        "transformer.norm.weight": (WIDTH,),
        "transformer.norm.bias": (WIDTH,),
        "text_embeddings.word_embeddings.weight": (WORDS, WIDTH),
        "text_embeddings.position_embeddings.weight": (40, WIDTH),
        "text_embeddings.token_type_embeddings.weight": (2, WIDTH),
        "text_embeddings.LayerNorm.weight": (WIDTH,),
        "text_embeddings.LayerNorm.bias": (WIDTH,),
        "token_type_embeddings.weight": (2, WIDTH),
    }
    if absolute:
        shapes["transformer.pos_embed"] = (1, GRID * GRID + 1, WIDTH)
    else:
        shapes["relative_position_bias_table"] = (PICTURE_ROWS + 2 * words + 2, heads * DEPTH)
    for i in range(DEPTH):
        block = f"transformer.blocks.{i}"
        shapes |= {f"{block}.attn.qkv.weight": (3 * WIDTH, WIDTH), f"{block}.attn.proj.weight": (WIDTH, WIDTH)}
        for name in ("attn.q_bias", "attn.v_bias", "attn.proj.bias", "norm1.weight", "norm1.bias"):
            shapes[f"{block}.{name}"] = (WIDTH,)
        if not absolute:
            shapes |= {f"{block}.gamma_1": (WIDTH,), f"{block}.gamma_2": (WIDTH,)}
        for expert in ("text", "imag", "vl")[: 3 if i >= DEPTH - FUSED else 2]:
            shapes |= {f"{block}.norm2_{expert}.weight": (WIDTH,), f"{block}.norm2_{expert}.bias": (WIDTH,)}
            shapes |= {f"{block}.mlp_{expert}.fc1.weight": (MLP, WIDTH), f"{block}.mlp_{expert}.fc1.bias": (MLP,)}
            shapes |= {f"{block}.mlp_{expert}.fc2.weight": (WIDTH, MLP), f"{block}.mlp_{expert}.fc2.bias": (WIDTH,)}
    generator = torch.Generator().manual_seed(seed)
    heads_of_training = ("pooler.dense", "itm_score.fc", "itc_text_proj.fc", "itc_vl_text_proj.fc", "mlm_score.decoder")
    return {name: drawn(name, shape, generator) for name, shape in shapes.items()} | {
        **{f"{name}.weight": torch.zeros(2, WIDTH) for name in heads_of_training},
        "logit_scale": torch.zeros(()),
        "logit_vl_scale": torch.zeros(()),
        "text_embeddings.position_ids": torch.arange(40)[None],
    }


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if "gamma" in name or (name.endswith("weight") and len(shape) == 1):
        return 0.8 + 0.3 * noise
    # Small words, as they are in a trained network: the epsilon of the norm after them must be the right one.
    return noise * (0.002 if name.startswith("text_embeddings") else 0.5 if "table" in name else 0.2)


class Reference:
    """The published equations on a state dict, tokens [text; picture] as in the original."""

    def __init__(self, state: State, heads: int = 4) -> None:
        self.state, self.num_heads = state, heads
        self.hidden: list[Tensor] = []
        self.ffn: list[Tensor] = []

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + eps) * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def embed_image(self, images: Tensor) -> Tensor:
        stem = "transformer.patch_embed.proj"
        patches = F.conv2d(images, self.state[f"{stem}.weight"], self.state[f"{stem}.bias"], PATCH)
        rows, columns = patches.shape[2:]
        cls = self.state["transformer.cls_token"].expand(len(images), -1, -1)
        tokens = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)
        if "transformer.pos_embed" in self.state:
            table = self.state["transformer.pos_embed"][0]
            grid = table[1:].T.reshape(1, WIDTH, GRID, GRID)
            if (rows, columns) != (GRID, GRID):
                grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
            tokens = tokens + torch.cat([table[:1], grid.reshape(WIDTH, -1).T])
        return tokens + self.state["token_type_embeddings.weight"][1]

    def embed_text(self, ids: Tensor) -> Tensor:
        table = "text_embeddings.{}_embeddings.weight"
        x = self.state[table.format("word")][ids] + self.state[table.format("token_type")][0]
        if "transformer.pos_embed" in self.state:
            x = x + self.state[table.format("position")][: ids.shape[1]]
        return self.norm(x, "text_embeddings.LayerNorm", 1e-12) + self.state["token_type_embeddings.weight"][0]

    def bias(self, layer: int, num_text: int, grid: tuple[int, int] | None) -> Tensor | None:
        """[heads, T, T], entry by entry from the table's rows."""
        if "relative_position_bias_table" not in self.state:
            return None
        table = self.state["relative_position_bias_table"][:, layer * self.num_heads : (layer + 1) * self.num_heads]
        text_rows, last = PICTURE_ROWS + 2, len(table) - 1
        words = (len(table) - text_rows) // 2
        offsets = table[: PICTURE_ROWS - 3].reshape(2 * GRID - 1, 2 * GRID - 1, self.num_heads)
        rows, columns = grid or (0, 0)
        if grid and grid != (GRID, GRID):  # our rule for other sizes: the offsets, resized bilinearly
            size = (2 * rows - 1, 2 * columns - 1)
            resized = F.interpolate(offsets.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)
            offsets = resized[0].permute(1, 2, 0)
        places = [("word", i) for i in range(num_text)]
        places += [("patch", i) for i in range(-1, rows * columns)] if grid else []
        bias = torch.zeros(self.num_heads, len(places), len(places))
        for q, (query, i) in enumerate(places):
            for k, (key, j) in enumerate(places):
                if query != key:
                    found = table[PICTURE_ROWS + (query == "patch")]
                elif query == "word":
                    if i == 0 or j == 0:
                        found = table[last if i == j else last - 2 if i == 0 else last - 1]
                    else:
                        found = table[text_rows + words - 2 + j - i]
                elif i < 0 or j < 0:
                    found = table[PICTURE_ROWS - 1 if i == j else PICTURE_ROWS - 3 if i < 0 else PICTURE_ROWS - 2]
                else:
                    down, right = i // columns - j // columns, i % columns - j % columns
                    found = offsets[down + rows - 1, right + columns - 1]
                bias[:, q, k] = found
        return bias

    def run(self, x: Tensor, experts: str, mask: Tensor, num_text: int, grid: tuple[int, int] | None) -> Tensor:
        """The final tokens; fills `hidden` and `ffn`. experts: text, imag, or vl from the layer that has it on."""
        for i in range(DEPTH):
            block = f"transformer.blocks.{i}"
            bias = self.bias(i, num_text, grid)
            y = self.norm(x, f"{block}.norm1") @ self.state[f"{block}.attn.qkv.weight"].T
            q, k, v = y.chunk(3, dim=-1)
            q, v = q + self.state[f"{block}.attn.q_bias"], v + self.state[f"{block}.attn.v_bias"]
            size, heads = WIDTH // self.num_heads, []
            for h in range(self.num_heads):
                own = slice(h * size, (h + 1) * size)
                logits = (q[..., own] * size**-0.5) @ k[..., own].transpose(1, 2)
                logits = logits if bias is None else logits + bias[h]
                logits = logits.masked_fill(~mask[:, None, :], float("-inf"))
                heads.append(torch.softmax(logits, dim=-1) @ v[..., own])
            y = self.linear(torch.cat(heads, dim=-1), f"{block}.attn.proj")
            x = x + self.state.get(f"{block}.gamma_1", 1.0) * y
            if experts != "vl":
                ffn = self.feed_forward(x, block, experts)
            elif i >= DEPTH - FUSED:
                ffn = self.feed_forward(x, block, "vl")
            else:
                parts = ((x[:, :num_text], "text"), (x[:, num_text:], "imag"))
                ffn = torch.cat([self.feed_forward(part, block, expert) for part, expert in parts], dim=1)
            x = x + self.state.get(f"{block}.gamma_2", 1.0) * ffn
            self.ffn.append(ffn)
            self.hidden.append(x)
        return self.norm(x, "transformer.norm")

    def feed_forward(self, x: Tensor, block: str, expert: str) -> Tensor:
        y = self.linear(self.norm(x, f"{block}.norm2_{expert}"), f"{block}.mlp_{expert}.fc1")
        return self.linear(0.5 * y * (1 + torch.erf(y / 2**0.5)), f"{block}.mlp_{expert}.fc2")


VARIANTS = {"table": {"heads": 4, "absolute": False}, "base-plus": {"heads": 16, "absolute": True}}


def write(folder: Path, state: State) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "some_vlmo.pt"
    torch.save({"module": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    write_tokenizer(folder)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grid", [(5, 5), (7, 7), (3, 6)], ids=str)
def test_pictures_give_the_numbers_of_the_equations_layer_by_layer(
    variant: str, grid: tuple[int, int], tmp_path: Path
) -> None:
    state = original_state(**VARIANTS[variant])
    network = load_network(str(write(tmp_path, state)))
    backbone = network.backbone
    assert isinstance(backbone, Backbone)
    images = random(2, 3, grid[0] * PATCH, grid[1] * PATCH)
    reference = Reference(state, VARIANTS[variant]["heads"])
    tokens = reference.embed_image(images)
    final = reference.run(tokens, "imag", torch.ones(tokens.shape[:2], dtype=torch.bool), 0, grid)
    with torch.no_grad():
        ours = backbone.embed(images)
        out = backbone.run(ours, grid=grid)
    assert relative(ours, tokens) < TOLERANCE
    for one, other in zip([*out.hidden, *out.ffn], [*reference.hidden, *reference.ffn], strict=True):
        assert relative(one, other) < TOLERANCE
    assert relative(backbone(images), final) < TOLERANCE
    assert (network.family, network.width, network.depth, network.patch) == ("vlmo", WIDTH, DEPTH, PATCH)
    assert network.supervision == "paired_text+class_labels"
    assert network.preprocessing is not None
    assert network.preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_give_the_numbers_of_the_equations_under_a_pad_mask(variant: str, tmp_path: Path) -> None:
    state = original_state(**VARIANTS[variant])
    network = load_network(f"{write(tmp_path, state)}#text")
    backbone = network.backbone
    ids, mask = padded_texts()
    reference = Reference(state, VARIANTS[variant]["heads"])
    tokens = reference.embed_text(ids)
    final = reference.run(tokens, "text", mask, ids.shape[1], None)
    with torch.no_grad():
        ours = backbone.embed(ids.int(), mask)
        out = backbone.run(ours, mask_BT=mask)
    assert relative(ours, tokens) < TOLERANCE
    for one, other in zip([*out.hidden, *out.ffn], [*reference.hidden, *reference.ffn], strict=True):
        assert relative(one[mask], other[mask]) < TOLERANCE
    assert relative(backbone(ids, mask)[mask], final[mask]) < TOLERANCE
    assert network.max_tokens == (64 if variant == "table" else 40)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grid", [(5, 5), (4, 6)], ids=str)
def test_pairs_give_the_numbers_of_the_equations_with_pads(variant: str, grid: tuple[int, int], tmp_path: Path) -> None:
    state = original_state(**VARIANTS[variant])
    network = load_network(f"{write(tmp_path, state)}#pair")
    backbone = network.backbone
    assert isinstance(backbone, Multiway)
    images = random(4, 3, grid[0] * PATCH, grid[1] * PATCH)
    ids, mask = padded_texts()
    reference = Reference(state, VARIANTS[variant]["heads"])
    tokens = torch.cat([reference.embed_text(ids), reference.embed_image(images)], dim=1)
    num_text, num_image = ids.shape[1], 1 + grid[0] * grid[1]
    theirs_mask = torch.cat([mask, torch.ones(4, num_image, dtype=torch.bool)], dim=1)
    final = reference.run(tokens, "vl", theirs_mask, num_text, grid)

    def picture_first(theirs: Tensor) -> Tensor:
        return torch.cat([theirs[:, num_text:], theirs[:, :num_text]], dim=1)

    real = picture_first(theirs_mask)
    with torch.no_grad():
        ours, layout = backbone.embed(images, ids, mask)
        out = backbone.run(ours, layout)
    assert relative(ours, picture_first(tokens)) < TOLERANCE
    theirs = [picture_first(theirs) for theirs in [*reference.hidden, *reference.ffn]]
    for one, other in zip([*out.hidden, *out.ffn], theirs, strict=True):
        assert relative(one[real], other[real]) < TOLERANCE
    assert relative(backbone(images, ids, mask)[real], picture_first(final)[real]) < TOLERANCE
    averaged, expected = (targets.layers(hidden, real, True) for hidden in (out.hidden, theirs[:DEPTH]))
    assert relative(averaged, expected) < TOLERANCE
    assert (network.modality, backbone.spec.num_fused) == ("pair", FUSED)


def test_texts_beyond_the_table_are_refused(tmp_path: Path) -> None:
    backbone = load_network(f"{write(tmp_path, original_state())}#text").backbone
    whole = torch.randint(4, WORDS, (1, TEXT))
    assert backbone(whole).shape == (1, TEXT, WIDTH)
    with pytest.raises(UsageError, match="texts of 197 tokens; vlmo-text has positions for 196"):
        backbone(torch.cat([whole, whole[:, :1]], dim=1))


def test_the_index_in_the_file_says_how_the_table_is_divided(tmp_path: Path) -> None:
    index = {"relative_position_index": torch.zeros(GRID * GRID + 1, GRID * GRID + 1)}
    state = original_state(words=30) | index
    path = write(tmp_path / "with", state)
    reference = Reference(state)
    ids, mask = padded_texts()
    final = reference.run(reference.embed_text(ids), "text", mask, ids.shape[1], None)
    text = load_network(f"{path}#text")
    assert relative(text.backbone(ids, mask)[mask], final[mask]) < TOLERANCE
    assert text.backbone.spec.max_positions == 30
    with pytest.raises(UnsupportedNetwork, match=r"has 146 rows, which are not those of a square picture"):
        load_network(str(write(tmp_path / "without", original_state(words=30))))


@pytest.mark.parametrize("tower", ["", "#text", "#pair"])
def test_a_missing_a_left_over_and_a_misshapen_tensor_are_each_refused(tower: str, tmp_path: Path) -> None:
    name = "transformer.blocks.1.norm1.bias"
    assert_strict(lambda state: load_network(f"{write(tmp_path, state)}{tower}"), original_state(), name)


@pytest.mark.parametrize("absolute", [False, True], ids=["table", "base-plus"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_without_any_one_tensor_of_its_own_a_tower_is_refused(family: Family, absolute: bool) -> None:
    state = original_state(absolute=absolute, heads=16 if absolute else 4)
    unused = r"^(pooler|itm|itc|mlm|logit)|_ids$" + ("" if absolute else r"|position_embeddings")
    unused += {
        "vlmo": r"|^text_|_text\.|_vl\.",
        "vlmo-text": r"|patch_embed|cls_token|_imag\.|_vl\.",
        "vlmo-pair": rf"|blocks\.[{DEPTH - FUSED}-{DEPTH - 1}]\.\w+_(imag|text)\.",
    }[family.name]
    for name in state:
        without = of_tensors({other: tensor for other, tensor in state.items() if other != name}, "file", {})
        if re.search(unused, name) and not name.startswith("itc_vl"):  # without these it is one tuned for retrieval
            read_backbone(family, without)
            continue
        with pytest.raises(UnsupportedNetwork):
            read_backbone(family, without)


@pytest.mark.parametrize("sign", ["vqa_classifier.0.weight", "nlvr2_classifier.3.weight"])
def test_a_file_fine_tuned_with_labels_is_refused(sign: str, tmp_path: Path) -> None:
    path = write(tmp_path, original_state() | {sign: torch.zeros(5, WIDTH)})
    with pytest.raises(UnsupportedNetwork, match=f"fine-tuned with labels: it has {sign}") as caught:
        load_network(str(path))
    assert caught.value.way_out == "use the file of the pre-training, such as vlmo in the catalogue"


def test_a_file_tuned_for_retrieval_is_refused(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in original_state().items() if not name.startswith("itc_vl")}
    with pytest.raises(UnsupportedNetwork, match=r"is tuned for retrieval: it has itc_text_proj\.fc\.weight alone"):
        load_network(str(write(tmp_path, state)))


def test_the_step_before_pairs_has_towers_but_no_experts_of_pairs(tmp_path: Path) -> None:
    state = {name: t for name, t in original_state().items() if "_vl" not in name and not name.startswith("itc_")}
    path = write(tmp_path, state)
    whole = write(tmp_path / "whole", original_state())
    for tower in ("", "#text"):
        assert load_network(f"{path}{tower}").weights_sha256 == load_network(f"{whole}{tower}").weights_sha256
    with pytest.raises(UnsupportedNetwork, match="has no experts of pairs in its last blocks"):
        load_network(f"{path}#pair")


@pytest.mark.parametrize("tower", ["", "#text", "#pair"])
def test_saved_and_loaded_again_it_is_the_same_network(tower: str, tmp_path: Path) -> None:
    network = load_network(f"{write(tmp_path / 'from', original_state())}{tower}")
    assert_saved_and_rounded(network, tmp_path / "kept")


def test_a_folder_of_one_network_is_no_other_tower(tmp_path: Path) -> None:
    save_network(load_network(str(write(tmp_path, original_state()))), tmp_path / "kept")
    with pytest.raises(UnsupportedNetwork, match=r"kept reads image, not pair") as caught:
        load_network(f"{tmp_path / 'kept'}#pair")
    assert caught.value.way_out == "leave #pair out, or name another folder"
    assert load_network(f"{tmp_path / 'kept'}#image").modality == "image"
    assert show(f"{tmp_path / 'kept'}#pair")["refused"] == "it reads image, not pair: leave #pair out"


def test_a_folder_that_does_not_say_what_stands_for_the_pair_is_refused(tmp_path: Path) -> None:
    """So were those of the first days, whose CLS would be the picture's."""
    network = load_network(f"{write(tmp_path, original_state())}#pair")
    shape = network.backbone.spec.to_json()
    assert shape["pooled"] == "text"
    del shape["pooled"]
    with pytest.raises(UnsupportedNetwork, match="does not say whose first token stands for the pair"):
        MultiwaySpec.from_json(shape)


def test_one_attention_serves_both_modalities_of_a_pair(tmp_path: Path) -> None:
    backbone = load_network(f"{write(tmp_path, original_state())}#pair").backbone
    names = {name for name, _ in backbone.named_parameters()}
    assert sum(name.endswith("qkv.weight") for name in names) == DEPTH
    assert {name.split(".")[4] for name in names if "blocks.0.feed_forwards" in name} == {"image", "text"}
    assert {name.split(".")[4] for name in names if f"blocks.{DEPTH - 1}.feed_forwards" in name} == {"both"}


def test_the_towers_run_through_a_frozen_pass(tmp_path: Path) -> None:
    assert_towers_pass(write(tmp_path, original_state()), WIDTH)


@pytest.mark.parametrize("guard", [Guard(label_free=True), Guard(text_free=True)], ids=["label-free", "text-free"])
def test_it_has_seen_captions_and_labels_and_is_refused_where_either_must_not_be(guard: Guard, tmp_path: Path) -> None:
    path = write(tmp_path, original_state())
    for name in ("vlmo", "vlmo-large", "vlmo-text", "vlmo-pair", str(path)):
        with pytest.raises(RefusedTeacher, match=f"{guard.flag}: {name} learned from"):
            guard.check([name])
    assert {entry.supervision for entry in CATALOGUE.values() if entry.family.startswith("vlmo")} == {
        "paired_text+class_labels"
    }


def test_the_heads_are_said_to_be_inferred_where_no_table_tells_them() -> None:
    for absolute, inferred in ((False, {}), (True, {"heads": 16})):
        state = original_state(absolute=absolute, heads=16 if absolute else 4)
        checkpoint = of_tensors(state, "vlmo.pt", {})
        assert [family.key_map(checkpoint).inferred for family in FAMILIES] == [inferred] * 3
