"""Techniques that follow the gradient at perturbed weights, towards flat minima."""
