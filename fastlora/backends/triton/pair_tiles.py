"""``similarity`` on a device: stacks padded to one rank by torch, and pairs of tiles by the Triton kernel."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fastlora.reference.similarity import similarity as by_blocks


def compare(left: Tensor, right: Tensor, starts: Tensor, kept: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """See :func:`fastlora.ops.similarity.similarity`. Adapters of more than ``WIDTH`` columns go through torch's own
    products, in float64: each is a tile of its own."""
    from tritonkernels.similarity import WIDTH, compare_tiles_launch

    ranks = starts.diff()
    rank = max(1, 1 << (int(ranks.max()) - 1).bit_length())
    if rank > WIDTH:
        return by_blocks(left, right, starts, kept, split)
    device, k, tall = left.device, len(kept), WIDTH // rank
    adapters = -(-k // tall) * tall
    owner = torch.repeat_interleave(torch.arange(k), ranks)
    place = (owner * rank + torch.arange(len(owner)) - starts[owner]).to(device)
    stacks = [x.new_zeros(len(x), adapters * rank) for x in (left, right)]
    for padded, x in zip(stacks, (left, right), strict=True):
        padded[:, place] = x
    counted = torch.zeros(adapters * rank)
    counted.view(adapters, rank)[:k] = (torch.arange(rank) < kept[:, None]).float()
    pairs = torch.triu_indices(adapters // tall, adapters // tall).mT.contiguous().to(device)
    inner, shared = (torch.zeros(adapters, adapters, dtype=torch.float64, device=device) for _ in range(2))
    sizes = len(left), len(right), adapters * rank, adapters
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        compare_tiles_launch(len(pairs), *stacks, counted.to(device), pairs, inner, shared, sizes, rank=rank).run()
    return _whole(inner[:k, :k], split), _whole(shared[:k, :k], split)


def _whole(tiles: Tensor, split: int) -> Tensor:
    """The upper triangle on both sides, or with a split the pairs across it alone."""
    upper = tiles.triu()
    if split:
        upper[:split, :split] = 0.0
        upper[split:, split:] = 0.0
    return upper + upper.triu(1).mT
