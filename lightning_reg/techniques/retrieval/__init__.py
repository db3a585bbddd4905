"""Recommending and retrieving items."""
