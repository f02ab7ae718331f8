"""The version of our numbers: part of every fingerprint."""

NUMERICS_VERSION = 14
"""Raised when the same job would give other numbers than before, so that no store mixes the two."""
