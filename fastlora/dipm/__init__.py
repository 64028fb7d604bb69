"""DiPM: direction and magnitude of updates, MATH section 5 and docs/dipm.md.

:func:`decouple` splits every update into unit directions and magnitudes, operators (:func:`reverse`, :func:`shift`,
:func:`scale`, :func:`interpolate`, :func:`remove`) change them, :func:`recombine` makes an adapter again;
:func:`modulate` is all three in one call.
"""

from __future__ import annotations

from fastlora.dipm.operators import Operator as Operator
from fastlora.dipm.parts import Parts as Parts

__all__ = [
    "Operator",
    "Parts",
    "decouple",
    "interpolate",
    "modulate",
    "recombine",
    "remove",
    "reverse",
    "scale",
    "shift",
]
