"""vLLM in this process: starting it, what it holds and serves, its kernels and its weights."""
