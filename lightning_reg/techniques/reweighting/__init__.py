"""Techniques that give samples unequal weights."""
