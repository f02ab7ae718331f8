"""Builders: each returns a whole manifest from its arguments."""
