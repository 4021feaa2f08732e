"""What a family is: which checkpoints it reads, how, and how it wants its pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from emkum.models.backbone import Modality
from emkum.models.families.checkpoint import Checkpoint, KeyMap
from emkum.models.preprocessing import Preprocessing


@dataclass(frozen=True)
class Family:
    """`model_types`: the values of config.json's model_type it reads. `rename`: a name on disk -> its stable name.

    `key_map` takes a checkpoint under stable names. `trust_preprocessor` is False where the published
    preprocessor_config.json is known to be wrong; then `preprocessing` alone holds.
    """

    name: str
    modality: Modality
    model_types: tuple[str, ...]
    rename: Callable[[str], str]
    key_map: Callable[[Checkpoint], KeyMap]
    preprocessing: Preprocessing | None = None
    trust_preprocessor: bool = True
