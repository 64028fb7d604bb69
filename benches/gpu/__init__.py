"""``make gpu``: tests and times on a machine with a GPU, in two windows of a few minutes. See docs/gpu.md.

Uses the standard library alone, so that it can say what is missing; installs nothing and needs no network.
"""
