"""Techniques that act on the predicted distribution."""
