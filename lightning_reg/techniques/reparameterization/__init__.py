"""Weights as functions of other weights."""
