"""Damaged and hostile adapter directories, each made from one number."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator

from cases import SHAPES, Case, healthy
from damaged_config import (
    config_bytes,
    huge_config,
    missing_field,
    nested_config,
    odd_field,
    repeated_field,
    repeated_pattern,
    several_fields,
    slow_pattern,
    valid_numbers,
)
from damaged_pickle import torch_file
from damaged_tensors import (
    cut,
    data_bits,
    dependent,
    gap,
    header_bits,
    header_length,
    header_text,
    longer,
    lost,
    many_experts,
    odd_address,
    odd_dtype,
    odd_metadata,
    odd_offsets,
    odd_shape,
    other_sizes,
    renamed,
    repeated_header_field,
    repeated_tensor,
    same_bytes_twice,
    shuffled,
    special_file,
    special_values,
    wide_rank,
    zeros,
)


def untouched(case: Case, rng: random.Random) -> None:
    """Nothing is wrong: it must load and give the right numbers."""


MUTATORS: list[tuple[int, Callable[[Case, random.Random], None]]] = [
    (1, untouched), (8, odd_field), (3, several_fields), (2, missing_field), (3, repeated_field), (1, repeated_pattern),
    (3, valid_numbers), (2, slow_pattern), (2, nested_config), (4, config_bytes), (8, header_bits), (5, data_bits),
    (3, cut), (1, longer), (3, header_length), (2, header_text), (2, odd_address), (5, odd_shape), (1, other_sizes),
    (4, odd_dtype), (5, odd_offsets), (1, gap), (2, shuffled), (1, same_bytes_twice), (2, repeated_tensor),
    (1, repeated_header_field), (4, renamed), (1, lost), (5, special_values), (1, zeros), (1, dependent),
    (1, odd_metadata), (2, special_file), (5, torch_file),
]  # fmt: skip
RARE: list[Callable[[Case, random.Random], None]] = [huge_config, wide_rank, many_experts]


@functools.cache
def _weights() -> list[float]:
    return [w for w, _ in MUTATORS]


def mutation(seed: int) -> Case:
    """The damaged directory of one number."""
    rng = random.Random(seed)
    case = healthy(rng.choice(sorted(SHAPES)), rng.randrange(1000), rng.choice(["F32", "F32", "F16", "BF16", "F64"]))
    case.seed = seed
    if rng.random() < 0.004:
        chosen = [rng.choice(RARE)]
    else:
        count = 2 if rng.random() < 0.15 else 1
        chosen = [m for _, m in rng.choices(MUTATORS, _weights(), k=count)]
    for mutate in chosen[:1]:
        mutate(case, rng)
    if len(chosen) == 2 and chosen[0] in (odd_field, special_values, odd_address, valid_numbers):
        chosen[1](case, rng)
        case.about = None
    else:
        chosen = chosen[:1]
    case.kind = " + ".join(m.__name__ for m in chosen)
    return case


def mutations(seed: int) -> Iterator[Case]:
    """Endlessly many, each with the number that makes it again."""
    start = seed * 10_000_000
    while True:
        yield mutation(start)
        start += 1
