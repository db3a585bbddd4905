"""Techniques of segmentation."""
