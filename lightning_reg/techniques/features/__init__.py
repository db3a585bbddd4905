"""Techniques that shape the hidden representation."""
