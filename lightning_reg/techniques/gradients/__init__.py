"""Edits of gradients."""
