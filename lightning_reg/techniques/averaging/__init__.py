"""Techniques that use an average of weights in the place of the last ones."""
