"""Compiled loops for the CPU, where torch spends more on each call than on the work."""
