"""Bridges to other toolkits, which are imported inside functions."""
