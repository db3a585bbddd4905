"""Weights of which most are zero."""
