"""Trains one small model with and without techniques, and says what differs."""
