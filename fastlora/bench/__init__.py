"""The project's own numbers on this machine, beside plain torch: what ``fastlora bench`` prints."""

from __future__ import annotations
