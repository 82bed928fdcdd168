"""Sweeps: many settings of one run as a population, with selection among them."""
