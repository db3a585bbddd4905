"""Embeddings in which the samples of a class lie together and classes apart."""
