"""A model small enough to make on the spot, a task whose answers can be checked, and a run that learns it."""
