"""Penalties and constraints on weights."""
