"""Techniques of language models."""
