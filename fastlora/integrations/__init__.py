"""Bridges to other toolkits."""
