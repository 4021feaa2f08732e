"""Which positions of a caption are words.

B batch, L text tokens.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def words_only(mask_BL: Tensor) -> Tensor:
    """bool [B, L]: the tokens between the first, CLS, and the last real one, EOS or SEP.

    mask_BL: bool, True = a real token; padding comes last. A text of CLS and EOS alone has no words, nor has padding.
    """
    followed_BL = functional.pad(mask_BL[:, 1:], (0, 1), value=False)
    words_BL = mask_BL & followed_BL
    words_BL[:, 0] = False
    return words_BL
