"""Techniques against wrong labels."""
