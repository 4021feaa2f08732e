"""The thesis's students come out at their published numbers of parameters, built of the published shapes, unfilled."""

from __future__ import annotations

import pytest
import torch

from emkum.models.backbone import BackboneSpec
from emkum.models.network import Network
from emkum.stage2_train.origins import Origins
from emkum.stage2_train.recipe import load_recipe
from emkum.stage2_train.recipe_fields import FieldNames
from emkum.stage2_train.student import Student, freeze, numbers_in_front, parameter_table, student_spec

NAMES = FieldNames("image/data2vec2-base@0/tokens", "data2vec2-base", 0, "text/bert-base/ids")
BLOCK = 12 * 768**2 + 13 * 768  # four matrices of attention, two of the feed-forward network, two norms, biases
WORDS = (30522 + 512 + 2) * 768 + 2 * 768  # tokens, positions, segment types, norm
PATCHES = 3 * 16 * 16 * 768 + 768 + 768 + 2 * 768  # patch embedding, CLS, norm; the sine table is no parameter
COMMON = {"depth": 12, "width": 768, "heads": 12, "mlp_width": 3072, "norm_order": "post", "pre_norm": True}


def network(name: str, spec: BackboneSpec) -> Network:
    """Of the published shape, on a device that keeps no numbers."""
    with torch.device("meta"):
        backbone = spec.build()
    return Network(name, spec.family, spec.modality, backbone, None, None, 0, "", "", "", "", "")


def table(recipe: str, *overrides: str) -> dict[str, int]:
    """Parameters of each part, trained and frozen, the frozen encoder in front among them."""
    loaded = load_recipe(recipe, overrides)
    image = text = None
    if loaded.kind != "texts":
        d2v2 = BackboneSpec(
            "data2vec2-image",
            "image",
            patch=16,
            image_size=224,
            final_norm=False,
            **COMMON,  # type: ignore[arg-type]
        )
        image = network("data2vec2-base", d2v2)
    if loaded.kind != "images":
        bert = BackboneSpec(
            "bert",
            "text",
            vocab_size=30522,
            max_positions=512,
            token_types=2,
            final_norm=False,
            **COMMON,  # type: ignore[arg-type]
        )
        text = network("bert-base", bert)
    origins = Origins(image, text, image, text)
    with torch.device("meta"):
        student = Student(student_spec(loaded, NAMES, origins, 768 if loaded.kind == "pairs" else None))
    freeze(student, loaded)
    student.in_front = numbers_in_front(image, 0) if image is not None else 0
    return {count.part: count.trainable + count.frozen for count in parameter_table(student, with_encoder=True)}


def test_image_kd_has_43_1_million() -> None:
    """Six blocks, and the frozen embedding of the pictures in front of them, without its fixed positions."""
    found = table("image-kd", "student.image_blocks=6")
    assert found == {"image encoder": PATCHES, "image blocks": 6 * BLOCK}
    assert sum(found.values()) == 43_120_128


def test_text_kd_has_66_million() -> None:
    """Six blocks and the frozen embedding of the words, the larger part of which is the vocabulary."""
    found = table("text-kd", "student.text_blocks=6")
    assert found == {"text blocks": 6 * BLOCK, "text embedding": WORDS}
    assert sum(found.values()) == 66_364_416  # DistilBERT's count: its shape


@pytest.mark.parametrize("overrides", [(), ("student.token_types=false",)])
def test_the_thesis_student_has_117_million(overrides: tuple[str, ...]) -> None:
    """Both embeddings, 6 + 6 blocks, a shared block, the linear head; with its norm and the token types."""
    found = table("ssmke", "student.image_blocks=6", "student.text_blocks=6", *overrides)
    types = {} if overrides else {"token types": 3 * 768}
    assert found == {
        "image encoder": PATCHES,
        "image blocks": 6 * BLOCK,
        "text embedding": WORDS,
        "text blocks": 6 * BLOCK,
        "shared blocks": BLOCK,
        "final norm": 2 * 768,
        "head": 768 * 768 + 768,
        **types,
    }
    assert round(sum(found.values()) / 1e6) == 117
    assert sum(found.values()) == 43_120_128 + 66_364_416 + BLOCK + 769 * 768 + 2 * 768 + sum(types.values())


@pytest.mark.parametrize(
    ("attention", "fused", "copies"), [("shared", 0, (1, 2)), ("own", 0, (2, 2)), ("own", 1, (2, 1))]
)
def test_experts_count_by_what_is_shared(attention: str, fused: int, copies: tuple[int, int]) -> None:
    mome = ("student.shared=mome", f"student.mome_attention={attention}", f"student.mome_fused={fused}")
    found = table("ssmke", "student.image_blocks=6", "student.text_blocks=6", *mome)
    halves = 4 * 768**2 + 4 * 768 + 2 * 768, 8 * 768**2 + 5 * 768 + 2 * 768  # attention, feed-forward; each with a norm
    assert sum(halves) == BLOCK
    assert found["shared MoME"] == copies[0] * halves[0] + copies[1] * halves[1]
