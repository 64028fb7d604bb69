"""The chain of the modules of a part, from one pass over their factors."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fastlora import ops
from fastlora.engine.blocks import ChainBlocks, ask_chain_blocks, read_asked, require_finite_blocks
from fastlora.engine.gram import GramPass
from fastlora.engine.schedule import GroupPart
from fastlora.ops import dispatch
from fastlora.ops.chain import results

ChainCuts = tuple[float, str, float, int, float]
"""What the op ``chain`` takes behind its tensors: threshold, kind, noise floor, rank, share of the energy."""


def read_chain(
    part: GroupPart, side: str, kind: str, cuts: ChainCuts, *, exact: bool = False
) -> tuple[ChainBlocks, ops.Chain]:
    """The blocks of a part, as :func:`fastlora.engine.blocks.read_chain_blocks` reads them, and their chain.

    What the chain needs in Python is made before the factors are read: afterwards they are in the caches in place of
    what Python works on, and the threads would fall asleep meanwhile. Raises :class:`InputError` for factors that hold
    NaN or Inf; any other module that the chain complains of is left to the caller.
    """
    grams = GramPass()
    blocks = ask_chain_blocks(grams, part, side, kind, exact=exact)
    run = prepared_chain(blocks, cuts)
    read_asked(grams, blocks)
    chain = run()
    if any(chain.info.tolist()):
        require_finite_blocks(blocks, side)
    return blocks, chain


def chain_of(blocks: ChainBlocks, cuts: ChainCuts) -> ops.Chain:
    """The chain of blocks that were read. Past the checks of the op: blocks are as the engine makes them."""
    return ops.Chain(*dispatch.run("chain", blocks.projected, blocks.other, blocks.floor, *cuts))


def prepared_chain(blocks: ChainBlocks, cuts: ChainCuts) -> Callable[[], ops.Chain]:
    """:func:`chain_of` of blocks whose numbers are there when it is called."""
    arguments = blocks.projected, blocks.other, blocks.floor, *cuts
    kernel = dispatch.resolve("chain", *arguments)
    if kernel.prepare is None or not blocks.projected.is_cpu:
        return functools.partial(chain_of, blocks, cuts)
    chain = results(blocks.projected, cuts[1])
    launches = kernel.prepare(*arguments, chain)

    def run() -> ops.Chain:
        launches.run()
        return chain

    return run
