"""The algorithm as pure functions: advantages, losses, corrections, and the batch they work on."""
