"""Schedules and tools that choose how much to regularize, and when."""
