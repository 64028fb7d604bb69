"""Commands that read the adapters ``x`` and ``trained``, which a case puts there."""

from __future__ import annotations

from builders import MODULES

SMALL = {name: MODULES[name] for name in list(MODULES)[:2]}

COMMANDS = {
    "merge": ["merge", "x", "trained", "-o", "out"],
    "merge cat": ["merge", "x", "trained", "--method", "cat", "-o", "out"],
    "compose": ["compose", "a + b", "a=trained", "b=x", "-o", "out"],
    "compress": ["compress", "x", "--rank", "2", "-o", "out"],
    "modulate": ["modulate", "x", "--op", "scale:0.5", "-o", "out"],
    "modulate by": ["modulate", "trained", "--op", "interpolate:x:0.5", "-o", "out"],
    "decompose": ["decompose", "x", "trained", "-o", "out"],
    "decompose pairs": ["decompose", "x", "trained", "--mode", "pairs", "-o", "out"],
    "overlap": ["overlap", "x", "trained"],
}
