"""Proof that an engine applies what the trainer published: slots, probe, canary."""
