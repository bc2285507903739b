"""Whether weights are numbers: what is kept or published must not be NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def first_non_finite(weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first weight with a value that is NaN or infinite, or None.

    Of a weight that is spread over processes, this process' share is looked at.

    Args:
        weights: by name, or pairs as `named_parameters` gives them; whole numbers are left out.
    """
    names, ends = _ends(weights)
    if not names:
        return None
    # Moved at once: each transfer makes a GPU's queue run empty.
    finite = torch.stack(ends).isfinite().all(1).tolist()
    return next((name for name, good in zip(names, finite, strict=True) if not good), None)


@torch.no_grad()
def has_non_finite(weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> Tensor:
    """1.0 where `first_non_finite` finds one, else 0.0; still on the weights' device, float64."""
    _, ends = _ends(weights)
    if not ends:
        return torch.zeros((), dtype=torch.float64)
    return (~torch.stack(ends).isfinite().all()).double()


def _ends(
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
) -> tuple[list[str], list[Tensor]]:
    """Names, and [2] smallest and largest of each, on one device: NaN where it holds one."""
    names: list[str] = []
    ends: list[Tensor] = []
    for name, weight in weights.items() if isinstance(weights, Mapping) else weights:
        share = weight.to_local() if isinstance(weight, DTensor) else weight
        share = getattr(share, "ds_tensor", share)  # DeepSpeed's stage 3
        if share.is_floating_point() and share.numel():
            share = share.float() if share.dtype.itemsize == 1 else share  # no order of its own
            names.append(name)
            ends.append(torch.stack(torch.aminmax(share.detach())).double())
    return names, [pair.to(ends[0].device) for pair in ends]


def non_finite_in_folder(folder: Path) -> str | None:
    """As `first_non_finite`, of all safetensors files in a model folder: "file: name", or None."""
    for path in sorted(folder.rglob("*.safetensors")):
        if (name := non_finite_in_file(path)) is not None:
            return f"{path.relative_to(folder)}: {name}"
    return None


def non_finite_in_file(path: Path) -> str | None:
    """As `first_non_finite`, of a safetensors file, of which one weight at a time is in memory."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if first_non_finite({name: file.get_tensor(name)}) is not None:
                return str(name)
    return None
