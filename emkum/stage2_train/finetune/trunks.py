"""What is put under a new head: the student, or the whole frozen network to compare it with, as one pooled vector.

Legend: B batch, T tokens, L text tokens, D width, H height, W width of a picture.
"""

from __future__ import annotations

import copy
import re
from typing import Literal

import torch
from torch import Tensor, nn

from emkum.models import targets
from emkum.models.backbone import Backbone
from emkum.models.network import Network
from emkum.stage2_train.origins import transformer
from emkum.stage2_train.shared_mlp import SharedMlp
from emkum.stage2_train.student import Student, masked_mean

Modality = Literal["image", "text"]
BLOCK = re.compile(r"\b(image_blocks|text_blocks|shared_blocks|shared_mome|stack)\.(?:blocks|biases)\.(\d+)\.")
IN_FRONT = ("text_embedding.", "embedding.", "types_before.")
BETWEEN = ("image_projection.", "text_projection.", "token_types", "token_type_scale", "shared_positions")
OWN_PARTS = {  # of a student's modules and parameters, those that a sample of the modality goes through
    "image": ("image_blocks", "image_projection", "network"),
    "text": ("text_embedding", "text_blocks", "text_projection"),
}
COMMON_PARTS = (
    "token_types",
    "token_type_scale",
    "types_before",
    "shared_blocks",
    "shared_mome",
    "shared_positions",
    "shared_mlp",
    "norm",
)


class StudentTrunk(nn.Module):
    """A student up to its final norm: the mean of the patches of a picture, or a text pooled as in pre-training.

    Its heads are left out. A student with an MLP of one vector in its shared part has no final tokens: what its second
    layer gives is taken.
    """

    def __init__(self, student: Student, modality: Modality) -> None:
        super().__init__()
        self.student, self.modality, self.width = student, modality, student.spec.width
        trained = OWN_PARTS[modality] + COMMON_PARTS
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in trained)

    def forward(self, *inputs: Tensor) -> Tensor:
        """[B, D], float32. inputs: tokens_BTD at the student's cut, or ids_BL and mask_BL of texts.

        Of a student of pixels: normalised pictures, images_BCHW.
        """
        encode = self.student.encode_images if self.modality == "image" else self.student.encode_texts
        if isinstance(self.student.shared_mlp, SharedMlp):
            return encode(*inputs).layers[1]
        tokens_BTD = encode(*inputs, keep_tokens=True).tokens_BTD
        assert tokens_BTD is not None
        if self.modality == "image":
            assert self.student.spec.image is not None
            return tokens_BTD[:, self.student.spec.image.num_prefix :].mean(dim=1)
        assert self.student.spec.text is not None
        return tokens_BTD[:, 0] if self.student.spec.text.pooling == "cls" else masked_mean(tokens_BTD, inputs[1])


class NetworkTrunk(nn.Module):
    """A whole network behind the cut, pooled as the student is: what a student is compared with."""

    def __init__(self, network: Network, cut: int, pooling: Literal["patches", "cls", "mean"]) -> None:
        super().__init__()
        self.backbone: Backbone = copy.deepcopy(transformer(network))
        self.cut, self.pooling, self.width = cut, pooling, network.width
        self.backbone.requires_grad_(True)
        if network.modality == "image":
            self.backbone.embedding.requires_grad_(False)
            self.backbone.stack.blocks[:cut].requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """As of `StudentTrunk`."""
        backbone, mask_BL = self.backbone, inputs[1] if len(inputs) > 1 else None
        tokens_BTD = inputs[0] if mask_BL is None else backbone.embed(inputs[0], mask_BL)
        stop = backbone.depth
        if self.cut < stop:
            tokens_BTD = backbone.stack.run(tokens_BTD, self.cut, stop, mask_BL, keep_ffn=False).hidden[-1]
        final_BTD = backbone.finish(tokens_BTD).float()
        if self.pooling == "patches":
            return final_BTD[:, backbone.num_prefix :].mean(dim=1)
        if self.pooling == "cls":
            return backbone.pool(final_BTD, inputs[0], mask_BL)
        return targets.mean(final_BTD, 0, mask_BL)


Trunk = StudentTrunk | NetworkTrunk


class Classifier(nn.Module):
    """A trunk, and on its pooled vector a LayerNorm, where asked for, and a linear layer: both new, from `seed`.

    trunk None: the vectors come pooled. The head computes in float32.
    """

    def __init__(self, trunk: Trunk | None, width: int, outputs: int, *, norm: bool, seed: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.norm = nn.LayerNorm(width, eps=1e-6) if norm else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(width, outputs)
            nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        """[B, outputs], float32."""
        pooled_BD = inputs[0] if self.trunk is None else self.trunk(*inputs)
        with torch.autocast(pooled_BD.device.type, enabled=False):
            pooled_BD = pooled_BD.float()
            outputs: Tensor = self.linear(pooled_BD if self.norm is None else self.norm(pooled_BD))
        return outputs


def rate_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """By the name of each trained parameter the share of the rate it has: `decay` to the power of the blocks above.

    The topmost block has one factor of `decay`, each one below it one more, what lies in front of all blocks one more
    than the first; head and final norm have the whole rate (BEiT, arXiv:2106.08254, appendix H). Blocks of a
    modality and shared ones are counted together.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = {name: (match[1], int(match[2])) for name in names if (match := BLOCK.search(name))}
    own = 1 + max((number for part, number in found.values() if not part.startswith("shared")), default=-1)
    level = {name: number + own * part.startswith("shared") for name, (part, number) in found.items()}
    depth = 1 + max(level.values(), default=-1)
    factors = {}
    for name in names:
        inner = name.removeprefix("trunk.").removeprefix("student.").removeprefix("backbone.").removeprefix("network.")
        if name in level:
            factors[name] = decay ** (depth - level[name])
        elif inner.startswith(IN_FRONT):
            factors[name] = decay ** (depth + 1)
        else:
            factors[name] = decay ** (depth - own) if inner.startswith(BETWEEN) else 1.0
    return factors


class FrozenPrefix:
    """Pictures through the frozen network up to the cut: what the student reads, of any picture, mixed ones too.

    Matrix products in `compute`; the residual stream and the result are float32, as in `passes.FrozenPass`.
    """

    def __init__(self, network: Network, cut: int, compute: str, device: torch.device) -> None:
        self.backbone = transformer(network.placed(device, getattr(torch, compute)))
        self.cut, self.device = cut, device

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """tokens_BTD of pictures that are normalised as the network was trained on them."""
        tokens_BTD = self.backbone.embed(images_BCHW.to(self.device, non_blocking=True)).float()
        for index in range(self.cut):
            tokens_BTD = self.backbone.run(tokens_BTD, index, index + 1).hidden[-1].float()
        return tokens_BTD
