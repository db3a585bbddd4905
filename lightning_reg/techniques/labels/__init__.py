"""Techniques that soften labels, or act on logits as softened labels do."""
