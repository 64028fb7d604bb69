"""The formulas in pure torch, float64, and nothing else: what every backend is tested against."""

from __future__ import annotations
