"""Techniques on the weights of attention."""
