"""Positions of patches on any grid: absolute tables and relative biases, interpolated as their families do it.

B batch, H heads, T tokens, D width, P patches; a grid is (rows, columns) of patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


class Memo:
    """Remembers what was computed from a frozen parameter, until the parameter changes, moves or is to be trained.

    A frozen network is asked for the same grid over and over; to interpolate its table each time is dear.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, Tensor] = {}

    def get(self, parameter: Tensor, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or what it returned last time for the same `key` and the same numbers in `parameter`."""
        if parameter.requires_grad or parameter.is_inference() or torch.compiler.is_compiling():
            return compute()
        full_key = (key, parameter.data_ptr(), parameter._version, parameter.dtype, parameter.device)
        found = self._entries.get(full_key)
        if found is None:
            # Not an inference tensor: it may be met again in a pass that records gradients.
            with torch.inference_mode(False), torch.no_grad():
                found = compute()
            if len(self._entries) >= 4:
                self._entries = {}
            self._entries[full_key] = found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Memo:
        return Memo()

    def __getstate__(self) -> dict[str, Any]:
        return {"_entries": {}}


def interpolate_positions(table_TD: Tensor, grid: Grid, antialias: bool) -> Tensor:
    """A learned table of 1 + n*n positions (CLS first) brought to `grid`: float32 [1 + rows*columns, D].

    Bicubic in float32, the CLS position untouched: the rule of DINO, DINOv2 and transformers (which, unlike DINO's own
    code, sets the size and not a scale). `antialias` is DINOv2's rule for its networks with registers.
    """
    table_TD = table_TD.float()
    side = round((table_TD.shape[0] - 1) ** 0.5)
    if grid == (side, side):
        return table_TD
    patches_DHW = table_TD[1:].reshape(side, side, -1).permute(2, 0, 1)
    resized = F.interpolate(patches_DHW[None], size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([table_TD[:1], resized[0].flatten(1).T])


@lru_cache(maxsize=32)
def relative_index(grid: Grid, device: torch.device) -> Tensor:
    """For each pair (query, key) of [CLS, patches...]: its row in a relative position table of `grid`. int64 [T*T].

    Rows: (2r-1)(2c-1) offsets of patch pairs, then CLS to patch, patch to CLS, CLS to CLS (BEiT, arXiv:2106.08254).
    """
    rows, columns = grid
    with torch.inference_mode(False):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        y, x = y.flatten(), x.flatten()
        offset_y = y[:, None] - y[None, :] + rows - 1
        offset_x = x[:, None] - x[None, :] + columns - 1
        index = torch.empty(rows * columns + 1, rows * columns + 1, dtype=torch.int64)
        index[1:, 1:] = offset_y * (2 * columns - 1) + offset_x
        num_offsets = (2 * rows - 1) * (2 * columns - 1)
        index[0, :] = num_offsets
        index[:, 0] = num_offsets + 1
        index[0, 0] = num_offsets + 2
        return index.flatten().to(device)


@lru_cache(maxsize=32)
def rotary_table(grid: Grid, num_prefix: int, channels: int, base: float, device: torch.device) -> Tensor:
    """Cosine and sine of the angles that queries and keys of `grid` are turned by, float32 [2, T, C]; C per head.

    A quarter of the channels for each axis, twice (`rotated` pairs channel c with c + C / 2). Centres of patches lie at
    -1 to 1 along each axis whatever the grid; periods are base^(4 i / C). The prefix is not turned (DINOv3,
    arXiv:2508.10104; without the shifts, jitter and scales of its training).
    """
    with torch.inference_mode(False), torch.no_grad():
        centres = [(torch.arange(0.5, size) / size) * 2 - 1 for size in grid]
        place_P2 = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)
        frequencies = 1 / base ** (torch.arange(channels // 4) * (4 / channels))
        angles_PC = (2 * math.pi * place_P2[:, :, None] * frequencies).flatten(1).tile(2)
        angles_TC = F.pad(angles_PC, (0, 0, num_prefix, 0))  # cosine 1, sine 0
        return torch.stack([angles_TC.cos(), angles_TC.sin()]).to(device)


def rotated(x_BHTC: Tensor, turns_2TC: Tensor) -> Tensor:
    """Queries or keys turned by the angles of `rotary_table`, in their own type; of the first T tokens it knows."""
    cosine_TC, sine_TC = turns_2TC[:, : x_BHTC.shape[2]]
    exact = x_BHTC.float()
    first, second = exact.chunk(2, dim=-1)
    turned: Tensor = exact * cosine_TC + torch.cat([-second, first], dim=-1) * sine_TC
    return turned.to(x_BHTC.dtype)


class RelativeBias(nn.Module):
    """Learned bias of the attention logits by relative position, for any grid.

    words: the grid is one row of words, CLS in front. Fewer words than the table has use its middle as it is.
    """

    def __init__(self, grid: Grid, heads: int, words: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.words = words
        rows, columns = grid
        self.table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, heads))
        self._memo = Memo()

    def forward(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        """The bias [1, H, T, T] of CLS and the patches of `grid`, in `dtype`.

        On another grid than the table's, the table is resized bilinearly (transformers' BEiT, after MiDaS 3.1).
        """
        return self._memo.get(self.table, (grid, dtype), lambda: self._compute(grid, dtype))

    def _compute(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        table = self.table.float()
        if self.words:
            if grid[1] > self.grid[1]:
                raise ValueError(f"a text of 1 + {grid[1]} tokens; there are positions for 1 + {self.grid[1]}")
            less = self.grid[1] - grid[1]
            table = torch.cat([table[less : len(table) - 3 - less], table[-3:]])
        elif grid != self.grid:
            own, new = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (self.grid, grid))
            offsets = table[:-3].reshape(*own, -1).permute(2, 0, 1)[None]
            resized = F.interpolate(offsets, size=new, mode="bilinear", align_corners=False)
            table = torch.cat([resized[0].flatten(1).T, table[-3:]])
        num_tokens = grid[0] * grid[1] + 1
        bias_TTH = table[relative_index(grid, table.device)].view(num_tokens, num_tokens, -1)
        bias_HTT = bias_TTH.permute(2, 0, 1).to(dtype).contiguous()
        # Rows start at multiples of 16 numbers: CUDA's attention would otherwise copy the bias to such rows every call.
        return F.pad(bias_HTT, (0, -num_tokens % 16))[None, :, :, :num_tokens]
