"""DiPM: direction and magnitude of updates, MATH section 5 and docs/dipm.md.

:func:`decouple` splits every update into unit directions and magnitudes, operators (:func:`reverse`, :func:`shift`,
:func:`scale`, :func:`interpolate`, :func:`remove`) change them, :func:`recombine` makes an adapter again;
:func:`modulate` is all three in one call.
"""

from fastlora.dipm.operators import Operator as Operator
from fastlora.dipm.operators import interpolate as interpolate
from fastlora.dipm.operators import remove as remove
from fastlora.dipm.operators import reverse as reverse
from fastlora.dipm.operators import scale as scale
from fastlora.dipm.operators import shift as shift
from fastlora.dipm.parts import Parts as Parts
from fastlora.dipm.parts import decouple as decouple
from fastlora.dipm.parts import modulate as modulate
from fastlora.dipm.parts import recombine as recombine

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
