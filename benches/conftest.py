"""Puts this folder on the path, and makes threads wait as they should before torch is imported."""

from __future__ import annotations

import os

# Spinning threads would make two of them slower than one on small machines.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
