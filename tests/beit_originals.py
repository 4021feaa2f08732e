"""The tensors of transformers' BEiT under the names of the authors' files."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def trunk(model: nn.Module, depth: int) -> dict[str, Tensor]:
    """What all of these files hold: CLS, the embedding of patches, the blocks without their tables of positions."""
    theirs = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {
        "cls_token": theirs["embeddings.cls_token"],
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
    }
    for i in range(depth):
        layer, block = f"layers.{i}", f"blocks.{i}"
        state |= {
            f"{block}.attn.qkv.weight": torch.cat([theirs[f"{layer}.attention.{n}_proj.weight"] for n in "qkv"]),
            f"{block}.attn.q_bias": theirs[f"{layer}.attention.q_proj.bias"],
            f"{block}.attn.v_bias": theirs[f"{layer}.attention.v_proj.bias"],
            f"{block}.gamma_1": theirs[f"{layer}.lambda_1"],
            f"{block}.gamma_2": theirs[f"{layer}.lambda_2"],
        }
        for end in ("weight", "bias"):
            state |= {
                f"{block}.attn.proj.{end}": theirs[f"{layer}.attention.o_proj.{end}"],
                f"{block}.norm1.{end}": theirs[f"{layer}.layernorm_before.{end}"],
                f"{block}.norm2.{end}": theirs[f"{layer}.layernorm_after.{end}"],
                f"{block}.mlp.fc1.{end}": theirs[f"{layer}.mlp.fc1.{end}"],
                f"{block}.mlp.fc2.{end}": theirs[f"{layer}.mlp.fc2.{end}"],
            }
    return state
