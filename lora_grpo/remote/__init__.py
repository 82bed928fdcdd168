"""Versions for replicas that share no disk with the trainer: a read-only server beside the store, and its client."""
