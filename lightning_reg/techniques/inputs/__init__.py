"""Techniques that change the inputs of a batch."""
