"""Edits of gradients, and techniques that act on derivatives by the inputs."""
