"""What the vendors' own quantizers wrote: ``tests/golden/README.md`` says how it was recorded."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safealloc.formats.layout import SfLayout

_FILE = Path(__file__).parents[1] / "golden/quantizers.npz"


@dataclass(frozen=True)
class Case:
    """One call. Tensors are on the CPU."""

    number: int
    kernel: str
    arithmetic: str
    layout: SfLayout
    about: str
    x: Tensor  # [rows, k], SiLU and mul: [rows, 2 * k]
    global_scales: Tensor  # [1], grouped: [experts]
    offsets: tuple[Tensor, Tensor] | None  # of experts and of their scales
    data: Tensor
    scales: Tensor  # [rows, k // 16]

    def __str__(self) -> str:
        return f"{self.number}-{self.kernel}-{self.about}"

    @property
    def silu_and_mul(self) -> bool:
        return self.x.shape[1] == 4 * self.data.shape[1]


@functools.cache
def cases() -> tuple[Case, ...]:
    with np.load(_FILE) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    return tuple(
        _case(number, entry, arrays) for number, entry in enumerate(json.loads(bytes(arrays["index"].numpy())))
    )


def _case(number: int, entry: dict[str, Any], arrays: dict[str, Tensor]) -> Case:
    x = arrays[entry["x"]].view(getattr(torch, entry["dtype"]))
    grouped = "expert_offsets" in entry
    rows, k = x.shape[0], entry["k"]
    about = f"{rows}x{k}-{entry['dtype']}-{'experts' if grouped else entry['input']}"
    return Case(
        number,
        entry["kernel"].partition(" ")[2],
        entry["arithmetic"],
        SfLayout[entry["layout"]],
        about,
        x,
        arrays[entry["global_scales"]],
        (arrays[entry["expert_offsets"]], arrays[entry["blockscale_offsets"]]) if grouped else None,
        arrays[entry["data"]],
        arrays[entry["scales"]],
    )
