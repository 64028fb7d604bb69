"""Where the tolerances of the tests come from; a bound that a test derives for itself is explained there.

``u`` is the unit roundoff: 1.1e-16 in float64, 6e-8 in float32. Unless a test says otherwise, its matrices have at most
a few dozen rows and columns and condition numbers up to 30, so that a sum or a product loses one digit to its length
and one or two to the condition. Each bound is above that by a digit, as libraries add in different orders, and by
several below what a wrong term, weight or scaling would do.
"""

from __future__ import annotations

# The same numbers by the same formula, a few float64 operations long.
ROUNDOFF64 = 1e-14
# The same numbers by another formula in float64: u, a hundred terms, the condition.
FLOAT64 = 1e-12
# Through Gram blocks, which square the condition: u, a hundred terms, 30².
GRAM64 = 1e-10
# A subspace, or what is projected on it: the above over the gap of its eigenvalues from the others, of 0.02 and more.
SUBSPACE64 = 1e-9
# The same where weak directions count, whose own condition is added.
WEAK64 = 1e-8
# Singular values as roots of eigenvalues of a Gram matrix: √u of the largest, 1e-8, in sums of a few.
ROOT64 = 3e-8
# Rounded to float32 once: u of every entry.
ROUNDED32 = 1e-7
# Both factors rounded to float32, and multiplied: two roundings, and a digit for the condition of the factors.
FLOAT32 = 1e-6
# The same with sums in float32, of hundreds of products: by torch, PEFT, or a model that is run.
SUMS32 = 1e-5
# What a model of several layers gives, or elements of such sums, which are small beside the sizes of their terms.
MODEL32 = 1e-4
# Rounded to bfloat16, u = 2⁻⁹ of the largest of each row, and a few such roundings.
HALF = 1e-2
