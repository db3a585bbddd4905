"""Losses on functions that are given on a grid."""
