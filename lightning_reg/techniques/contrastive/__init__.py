"""Losses on the embeddings of two views of each sample."""
