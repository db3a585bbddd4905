"""Techniques that keep what earlier tasks taught."""
