"""Adapter versions: their form, their checks, and the store that keeps them."""
