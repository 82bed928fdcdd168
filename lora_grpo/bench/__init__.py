"""The benchmark suite: native hot-swap against merging, for speed, memory and truth; a measurement a file."""
