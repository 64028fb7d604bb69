"""Adapters that are combined, under one naming and with every weight in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fastlora.adapters.alignment import aligned
from fastlora.adapters.expert_forms import with_one_expert_form
from fastlora.adapters.fused_projections import with_one_projection_form
from fastlora.adapters.pointwise import with_one_pointwise_form
from fastlora.adapters.unwrapping import unwrapped
from fastlora.core.data import LoraData

A = TypeVar("A", bound=LoraData)


def in_one_form(adapters: Sequence[A], *, align: bool = True, strict: bool = False) -> tuple[list[A], list[str]]:
    """The adapters as they are combined, and notices: experts and projections in one form, modules under one naming.

    ``align``, ``strict``: whether names are aligned, and whether adapters that share none are refused. Raises
    :class:`InputError` for forms or names that cannot be brought together.
    """
    if len(adapters) < 2:
        return list(adapters), []
    adapters, notices = unwrapped(adapters) if align else (adapters, [])
    given, more = with_one_expert_form(with_one_pointwise_form(adapters))
    notices += more
    given, more = with_one_projection_form(given)
    notices += more
    if align:
        named, told = aligned(given, strict=strict)
        notices += told
        if any(a is not b for a, b in zip(named, given, strict=True)):
            named, more = with_one_projection_form(with_one_pointwise_form(named))
            notices += more
        given = named
    return given, notices
