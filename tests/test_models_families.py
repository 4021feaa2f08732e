"""Every family gives the numbers of its original implementation: random weights, saved by transformers, read by us.

B batch, T tokens, D width.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emkum.errors import UnsupportedNetwork, WeightsUnavailable
from emkum.models.catalogue import load_network
from emkum.models.network import Network
from emkum.models.resnet import ResNet

TOLERANCE = 1e-5  # relative, in the L2 norm
VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40, "patch_size": 4}
DINO = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 2, "patch_size": 4}
TEXT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 60}
BEIT = VIT | {"image_size": 20, "layer_norm_eps": 1e-6}
SHARED = {"use_shared_relative_position_bias": True, "use_mean_pooling": False}


@dataclass(frozen=True)
class Case:
    """A model of transformers. `ffn`: where its feed-forward outputs are. `flag`: it must be told to interpolate."""

    make: Callable[[], nn.Module]
    ffn: str
    size: int = 20
    flag: bool = False


def beit(**more: Any) -> nn.Module:
    return transformers.BeitModel(transformers.BeitConfig(**BEIT, **more), add_pooling_layer=False)


def data2vec() -> nn.Module:
    return transformers.Data2VecVisionModel(transformers.Data2VecVisionConfig(**BEIT, **SHARED))


def clip() -> nn.Module:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT, image_size=20))


def dinov2(**more: Any) -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**DINO, image_size=20, **more))


def dinov2_registers(**more: Any) -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(**DINO, image_size=20, num_register_tokens=2, **more)
    return transformers.Dinov2WithRegistersModel(config)


def vit(**more: Any) -> nn.Module:
    config = transformers.ViTConfig(**VIT, image_size=20, layer_norm_eps=1e-6, **more)
    return transformers.ViTModel(config, add_pooling_layer=False)


IMAGES = {
    "vit": Case(vit, "layers.{}.mlp", flag=True),
    "vit-no-qkv-bias": Case(lambda: vit(qkv_bias=False), "layers.{}.mlp", flag=True),
    "dinov2": Case(dinov2, "encoder.layer.{}.mlp"),
    "dinov2-registers": Case(dinov2_registers, "encoder.layer.{}.mlp"),
    "dinov2-giant": Case(lambda: dinov2(use_swiglu_ffn=True), "encoder.layer.{}.mlp"),
    "dinov2-registers-giant": Case(lambda: dinov2_registers(use_swiglu_ffn=True), "encoder.layer.{}.mlp"),
    "beit-per-block": Case(lambda: beit(use_relative_position_bias=True, use_mean_pooling=False), "layers.{}.mlp"),
    "beit-shared": Case(lambda: beit(**SHARED, use_mask_token=True), "layers.{}.mlp"),
    "beit-absolute-no-scale": Case(
        lambda: beit(use_absolute_position_embeddings=True, use_mean_pooling=True, layer_scale_init_value=0.0),
        "layers.{}.mlp",
    ),
    "data2vec-vision": Case(data2vec, "encoder.layer.{}.output.dense"),
    "clip-vision": Case(clip, "encoder.layers.{}.mlp", flag=True),
}
TEXTS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**TEXT, max_position_embeddings=80)),
    "data2vec-text": lambda: transformers.Data2VecTextModel(
        transformers.Data2VecTextConfig(**TEXT, max_position_embeddings=80)
    ),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """No weight left at 0 or 1: norms, scales, tables, tokens and biases all take part."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "running_var" in name:
            tensor.copy_(noise.abs() + 0.5)
        elif tensor.ndim <= 1 and (("norm" in name.lower() and name.endswith("weight")) or "lambda" in name):
            tensor.copy_(0.8 + 0.3 * noise)
        else:
            tensor.copy_(noise * (0.3 if tensor.ndim != 2 else 0.2))
    return model.eval()


def saved(model: nn.Module, folder: Path, tokenizer: bool = False) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    Tokenizer(models.WordLevel(vocabulary, "[UNK]")).save(str(folder / "tokenizer.json"))


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def ffn_outputs(model: nn.Module, pattern: str, depth: int) -> list[Tensor]:
    """Filled by the next pass of `model`."""
    outputs: list[Tensor] = []
    for index in range(depth):
        module = model.get_submodule(pattern.format(index))
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


def their_pass(model: nn.Module, case: Case, images: Tensor) -> Any:
    more = {"interpolate_pos_encoding": True} if case.flag else {}
    with torch.no_grad():
        return model(images, output_hidden_states=True, **more)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("grid", [(5, 5), (8, 8), (3, 3), (7, 4)], ids=str)
def test_an_image_network_equals_transformers_layer_by_layer_on_any_grid(
    name: str, grid: tuple[int, int], tmp_path: Path
) -> None:
    case = IMAGES[name]
    model = randomised(case.make())
    network = load_network(str(saved(model, tmp_path)))
    theirs_ffn = ffn_outputs(model, case.ffn, network.depth)
    images = torch.randn(2, 3, grid[0] * 4, grid[1] * 4, generator=torch.Generator().manual_seed(1))
    theirs = their_pass(model, case, images)
    with torch.no_grad():
        tokens = network.backbone.embed(images)
        out = network.backbone.run(tokens, grid=network.backbone.grid(*images.shape[2:]))
        final = network.backbone.finish(out.hidden[-1])
    for ours, their in zip([tokens, *out.hidden], theirs.hidden_states, strict=True):
        assert relative(ours, their) < TOLERANCE
    for ours, their in zip(out.ffn, theirs_ffn, strict=True):
        assert relative(ours, their) < TOLERANCE
    if name == "clip-vision":  # transformers norms CLS alone
        assert relative(final[:, 0], theirs.pooler_output) < TOLERANCE
    else:
        assert relative(final, theirs.last_hidden_state) < TOLERANCE
    assert torch.equal(network.backbone(images), final)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_network_equals_transformers_layer_by_layer_under_a_pad_mask(name: str, tmp_path: Path) -> None:
    model = randomised(TEXTS[name]())
    network = load_network(str(saved(model, tmp_path, tokenizer=True)))
    pad = network.backbone.spec.pad_id
    lengths = torch.tensor([9, 4, 1, 16])
    mask = torch.arange(16) < lengths[:, None]
    ids = torch.randint(5, 60, (4, 16), generator=torch.Generator().manual_seed(2)).masked_fill(~mask, pad)
    theirs_ffn = ffn_outputs(model, "encoder.layer.{}.output.dense", network.depth)
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask.long(), output_hidden_states=True)
        tokens = network.backbone.embed(ids.int(), mask)
        out = network.backbone.run(tokens, mask_BT=mask)
        final = network.backbone.finish(out.hidden[-1])
    for ours, their in zip([tokens, *out.hidden, final], [*theirs.hidden_states, theirs[0]], strict=True):
        assert relative(ours[mask], their[mask]) < TOLERANCE
    for ours, their in zip(out.ffn, theirs_ffn, strict=True):
        assert relative(ours[mask], their[mask]) < TOLERANCE
    with torch.no_grad():  # without a mask the pad id tells pads apart
        assert torch.equal(network.backbone.embed(ids), tokens)


@pytest.mark.parametrize("name", TEXTS)
def test_a_tokenizer_with_ids_that_the_network_has_no_words_for_is_refused(name: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    model = randomised(TEXTS[name]())
    num_words = model.config.vocab_size
    saved(model, tmp_path)
    for highest in (num_words - 1, num_words):
        vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "dog": highest}
        Tokenizer(models.WordLevel(vocabulary, "[UNK]")).save(str(tmp_path / "tokenizer.json"))
        if highest < num_words:
            load_network(str(tmp_path))
    with pytest.raises(UnsupportedNetwork) as caught:
        load_network(str(tmp_path))
    numbers = f"has a tokenizer of {num_words + 1} ids, up to {num_words}; the network knows {num_words} words"
    assert caught.value.what == f"{tmp_path} {numbers}"
    assert caught.value.way_out == "put the tokenizer of the network's own release beside the weights"


@pytest.mark.parametrize("name", TEXTS)
def test_more_pads_change_nothing_about_the_real_tokens(name: str, tmp_path: Path) -> None:
    network = load_network(str(saved(randomised(TEXTS[name]()), tmp_path, tokenizer=True)))
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(3))
    short = network.backbone(ids, torch.ones(3, 12, dtype=torch.bool))
    padded = torch.cat([ids, torch.full((3, 20), 7)], dim=1)  # whatever stands in the pads
    long = network.backbone(padded, torch.arange(32).expand(3, -1) < 12)
    assert relative(long[:, :12], short) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{}, {"layer_type": "basic"}, {"downsample_in_first_stage": True, "downsample_in_bottleneck": True}],
    ids=["bottleneck", "basic", "strided"],
)
def test_a_resnet_equals_transformers_in_pooled_map_and_logits(options: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=5, **options)
    model = randomised(transformers.ResNetForImageClassification(config))
    network = load_network(str(saved(model, tmp_path)))
    backbone = network.backbone
    assert isinstance(backbone, ResNet)
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        theirs, logits = model.resnet(images), model(images).logits
        tokens = backbone.embed(images)
    assert relative(backbone.cls(tokens), theirs.pooler_output.flatten(1)) < TOLERANCE
    assert relative(backbone.patches(tokens), theirs.last_hidden_state.flatten(2).transpose(1, 2)) < TOLERANCE
    assert relative(backbone.logits(tokens), logits) < TOLERANCE
    assert (network.supervision, network.depth, network.width) == ("class_labels", 0, 32)
    assert 64 // network.patch * (48 // network.patch) == backbone.patches(tokens).shape[1]


def test_a_resnet_without_a_classifier_has_no_logits_and_says_so(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])
    backbone = load_network(str(saved(transformers.ResNetModel(config), tmp_path))).backbone
    assert isinstance(backbone, ResNet)
    with pytest.raises(UnsupportedNetwork, match="without a classifier"):
        backbone.logits(backbone.embed(torch.zeros(1, 3, 64, 64)))


WHOLE_MODELS = {
    "vit": lambda: transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**VIT, image_size=20)),
    "beit": lambda: transformers.BeitForMaskedImageModeling(
        transformers.BeitConfig(**BEIT, use_shared_relative_position_bias=True, use_mask_token=True, vocab_size=9)
    ),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TEXT, vision_config=VIT | {"image_size": 20}, projection_dim=8)
    ),
    "clip-projection": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**VIT, image_size=20, projection_dim=8)
    ),
    "bert": lambda: transformers.BertForPreTraining(transformers.BertConfig(**TEXT)),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**TEXT)),
    "data2vec-text": lambda: transformers.Data2VecTextForMaskedLM(transformers.Data2VecTextConfig(**TEXT)),
}


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_heads_of_pretraining_and_prefixed_names_are_read_past(name: str, tmp_path: Path) -> None:
    model = randomised(WHOLE_MODELS[name]())
    network = load_network(str(saved(model, tmp_path, tokenizer=True)))
    if network.modality == "text":
        ids = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            theirs = getattr(model, str(model.base_model_prefix))(ids).last_hidden_state
        assert relative(network.backbone(ids), theirs) < TOLERANCE
        return
    images = torch.randn(1, 3, 20, 20)
    with torch.no_grad():
        if name.startswith("clip"):
            theirs = model.vision_model(images).pooler_output
        elif name == "beit":  # its norm stands outside the BeitModel
            theirs = model.layernorm(model.beit(images).last_hidden_state)
        else:
            theirs = model.vit(images).last_hidden_state
        ours = network.backbone(images)
    assert relative(ours[:, 0] if name.startswith("clip") else ours, theirs) < TOLERANCE


def respelled(folder: Path, model: nn.Module) -> Path:
    """The folder with the names that modules have in memory."""
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", IMAGES)
def test_names_of_modules_in_memory_are_read_as_well_as_those_on_disk(name: str, tmp_path: Path) -> None:
    model = randomised(IMAGES[name].make())
    one = load_network(str(saved(model, tmp_path / "disk")))
    other = load_network(str(respelled(saved(model, tmp_path / "memory"), model)))
    assert one.weights_sha256 == other.weights_sha256


def test_bert_as_first_released_calls_norms_gamma_and_beta(tmp_path: Path) -> None:
    model = randomised(TEXTS["bert"]())
    one = load_network(str(saved(model, tmp_path / "new", tokenizer=True)))
    old = saved(model, tmp_path / "old", tokenizer=True)
    respell = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for name, tensor in load_file(old / "model.safetensors").items():
        for new, first in respell.items():
            name = name.replace(new, first)
        state[f"bert.{name}"] = tensor
    state["bert.embeddings.position_ids"] = torch.arange(512)[None]
    (old / "model.safetensors").unlink()
    torch.save(state, old / "pytorch_model.bin")
    assert load_network(str(old)).weights_sha256 == one.weights_sha256


def test_weights_in_shards_and_in_half_precision_are_read(tmp_path: Path) -> None:
    model = randomised(dinov2())
    saved(model, tmp_path / "whole")
    model.half().save_pretrained(tmp_path / "shards", max_shard_size="8KB")  # type: ignore[operator]
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    one, other = load_network(str(tmp_path / "whole")), load_network(str(tmp_path / "shards"))
    for name, tensor in one.backbone.state_dict().items():
        found = other.backbone.state_dict()[name]
        assert found.dtype == torch.float32
        assert torch.equal(found, tensor.half().float())
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(WeightsUnavailable, match="lacks model-00002"):
        load_network(str(tmp_path / "shards"))


FINE_TUNED = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, image_size=20)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINO, image_size=20)),
    "registers": lambda: transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(**DINO, image_size=20)
    ),
    "beit": lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**BEIT)),
    "data2vec": lambda: transformers.Data2VecVisionForImageClassification(
        transformers.Data2VecVisionConfig(**BEIT, use_relative_position_bias=True)
    ),
    "clip": lambda: transformers.CLIPForImageClassification(
        transformers.CLIPConfig(text_config=TEXT, vision_config=VIT | {"image_size": 20}, projection_dim=8)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
    "roberta": lambda: transformers.RobertaForQuestionAnswering(transformers.RobertaConfig(**TEXT)),
}


@pytest.mark.parametrize("name", FINE_TUNED)
def test_a_fine_tuned_checkpoint_is_refused_with_what_gave_it_away(name: str, tmp_path: Path) -> None:
    saved(FINE_TUNED[name](), tmp_path, tokenizer=True)
    head = "qa_outputs" if name == "roberta" else "classifier"
    with pytest.raises(UnsupportedNetwork, match=f"fine-tuned with labels: it has {head}") as caught:
        load_network(str(tmp_path))
    assert caught.value.way_out.startswith("use ")


def test_the_body_of_a_fine_tuned_network_is_refused_by_its_configuration(tmp_path: Path) -> None:
    saved(randomised(vit()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["ViTForImageClassification"]}))
    with pytest.raises(UnsupportedNetwork, match="says ViTForImageClassification"):
        load_network(str(tmp_path))


def test_a_trained_pooler_norm_gives_a_fine_tuned_beit_away_and_an_untrained_one_does_not(tmp_path: Path) -> None:
    model = transformers.BeitModel(transformers.BeitConfig(**BEIT, use_relative_position_bias=True))
    saved(model, tmp_path / "untrained")
    assert load_network(str(tmp_path / "untrained")).backbone.spec.final_norm is False
    saved(randomised(model), tmp_path / "trained")
    with pytest.raises(UnsupportedNetwork, match=r"pooler.layernorm \(the original fc_norm\) is trained"):
        load_network(str(tmp_path / "trained"))


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> str:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")
    return str(folder)


def test_a_missing_a_left_over_and_a_misshapen_tensor_are_each_named(tmp_path: Path) -> None:
    model = randomised(dinov2())
    missing = edited(saved(model, tmp_path / "a"), lambda s: s.pop("encoder.layer.1.norm1.bias"))
    with pytest.raises(UnsupportedNetwork, match=r"it lacks encoder\.layer\.1\.norm1\.bias"):
        load_network(missing)
    left_over = edited(saved(model, tmp_path / "b"), lambda s: s.update({"encoder.extra": torch.zeros(1)}))
    with pytest.raises(UnsupportedNetwork, match=r"unknown tensors encoder\.extra"):
        load_network(left_over)
    misshapen = edited(saved(model, tmp_path / "c"), lambda s: s.update({"layernorm.bias": torch.zeros(7)}))
    with pytest.raises(UnsupportedNetwork, match=r"layernorm\.bias has shape \(7,\), config.json implies \(24,\)"):
        load_network(misshapen)
    transposed = edited(
        saved(model, tmp_path / "d"),
        lambda s: s.update({"encoder.layer.0.mlp.fc1.weight": s["encoder.layer.0.mlp.fc1.weight"].T.contiguous()}),
    )
    with pytest.raises(UnsupportedNetwork, match=r"fc1\.weight has shape"):
        load_network(transposed)


def test_an_unknown_type_lists_those_that_can_be_read(tmp_path: Path) -> None:
    saved(randomised(dinov2()), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-network"}')
    with pytest.raises(UnsupportedNetwork, match="of type 'no-such-network'") as caught:
        load_network(str(tmp_path))
    assert "dinov2_with_registers" in caught.value.way_out


def test_a_torch_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = saved(randomised(dinov2()), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return shutil.copytree, (str(folder), str(ran))

    torch.save({"a": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedNetwork, match="damaged or holds more than tensors"):
        load_network(str(folder))
    assert not ran.exists()


def test_a_torn_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = saved(randomised(dinov2()), tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnsupportedNetwork, match="not a whole safetensors file"):
        load_network(str(tmp_path))


@pytest.mark.parametrize("make", [vit, lambda: beit(**SHARED), data2vec], ids=["vit", "beit", "data2vec"])
def test_an_epsilon_that_transformers_copied_from_bert_is_read_as_the_one_of_training(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    config = json.loads((saved(make(), tmp_path) / "config.json").read_text())
    for written, read in ((1e-12, 1e-6), (1e-5, 1e-5)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": written}))
        assert load_network(str(tmp_path)).backbone.spec.eps == read


def test_data2vec_vision_is_normalised_as_it_was_trained_whatever_its_preprocessor_says(tmp_path: Path) -> None:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 224, "width": 224}, "resample": 2}
    for make, mean in ((data2vec, 0.485), (lambda: beit(**SHARED), 0.5)):
        folder = saved(make(), tmp_path / str(mean))
        (folder / "preprocessor_config.json").write_text(json.dumps(half))
        preprocessing = load_network(str(folder)).preprocessing
        assert preprocessing is not None
        assert preprocessing.mean[0] == mean


def test_texts_longer_than_the_positions_are_refused_with_the_number(tmp_path: Path) -> None:
    from emkum.errors import UsageError

    network = load_network(str(saved(randomised(TEXTS["roberta"]()), tmp_path, tokenizer=True)))
    with pytest.raises(UsageError, match="texts of 79 tokens; roberta has positions for 78"):
        network.backbone.embed(torch.full((1, 79), 5))


@pytest.mark.parametrize("name", ["dinov2", "beit-shared", "clip-vision"])
def test_bfloat16_weights_give_the_numbers_of_autocast_with_a_float32_residual_stream(
    name: str, tmp_path: Path
) -> None:
    network = load_network(str(saved(randomised(IMAGES[name].make()), tmp_path)))
    images = torch.randn(2, 3, 20, 20)
    exact = network.backbone(images)
    placed = network.placed("cpu", torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        cast_by_autocast = network.backbone(images)
    with torch.inference_mode():
        cast_once = placed.backbone(images)
    assert cast_once.dtype == torch.float32
    assert relative(cast_once, exact) < 0.03
    assert relative(cast_once, cast_by_autocast.float()) < 0.01
    with torch.inference_mode():
        all_bfloat16 = load_network(str(tmp_path)).backbone.to(torch.bfloat16)(images.bfloat16())
    assert all_bfloat16.dtype == torch.bfloat16
    assert relative(all_bfloat16.float(), exact) < 0.06


def test_networks_load_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    network: Network = load_network(str(saved(randomised(dinov2()), tmp_path)))
    assert not network.backbone.training
    assert not any(p.requires_grad for p in network.backbone.parameters())
    assert all(p.dtype == torch.float32 for p in network.backbone.parameters())


@pytest.fixture(autouse=True)
def _quiet_transformers() -> Any:
    """Its progress bars and notes about new weights are not ours to judge."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        yield
