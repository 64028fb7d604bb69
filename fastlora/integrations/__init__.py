"""Bridges to other toolkits."""

from __future__ import annotations
