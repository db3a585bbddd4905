"""Techniques that learn from the outputs of a teacher, or of an earlier self."""
