"""Techniques that inject noise while the network runs, or schedule the noise it has."""
