"""The bank of targets that `ctl` chooses among: how large it is, and what it would cost."""

from __future__ import annotations

import torch

from emkum.errors import UsageError
from emkum.stage2_train.loader import BatchSource
from emkum.stage2_train.objectives.ctl import FifoBank, WholeBank
from emkum.stage2_train.recipe import Recipe
from emkum.stage2_train.samples import SampleTable

AUTO_BANK_ROWS = 65_536  # THESIS.md section 2: the FIFO of `ctl`
# Of each sample and candidate: float32 logits, masked, and their gradient, of pictures and captions.
LOGIT_BYTES = 6 * 4
BANK_LIMIT_BYTES = 8 * 2**30


def make_bank(recipe: Recipe, table: SampleTable, source: BatchSource, width: int) -> FifoBank | WholeBank:
    """The bank of `ctl` as the recipe asks for it. width: channels of a target."""
    assert recipe.objectives.ctl is not None
    wanted, rows = recipe.objectives.ctl.bank, table.num_samples * table.num_views
    refuse_costly_bank(recipe, wanted, rows)
    if wanted == "all" or (wanted == "auto" and rows <= AUTO_BANK_ROWS):
        assert table.image_rows_N is not None
        rows_N = torch.from_numpy(table.image_rows_N)
        return WholeBank(rows_N, source.all_targets(), fresh=source.fresh_targets)
    # More than the split holds would only repeat rows.
    return FifoBank(min(AUTO_BANK_ROWS if isinstance(wanted, str) else wanted, rows), width)


def refuse_costly_bank(recipe: Recipe, wanted: int | str, rows: int) -> None:
    """Raise UsageError where the logits against the bank would take more than BANK_LIMIT_BYTES."""
    batch = recipe.training.batch
    candidates = rows if wanted == "all" else min(AUTO_BANK_ROWS if isinstance(wanted, str) else wanted, rows)
    num_bytes = candidates * batch * LOGIT_BYTES
    if num_bytes > BANK_LIMIT_BYTES:
        fitting = min(AUTO_BANK_ROWS, BANK_LIMIT_BYTES // (batch * LOGIT_BYTES))
        raise UsageError(
            f"objectives.ctl.bank = {wanted}: a batch of {batch:,} against {candidates:,} rows takes "
            f"{num_bytes:,} bytes ({num_bytes / 2**30:.1f} GiB), more than {BANK_LIMIT_BYTES / 2**30:g} GiB",
            f"use fewer rows: --set objectives.ctl.bank={fitting}",
        )
