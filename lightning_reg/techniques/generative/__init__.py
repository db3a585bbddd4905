"""Techniques for generative models."""
