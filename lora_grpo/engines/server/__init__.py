"""Stock `vllm serve` processes as one engine: versions loaded by HTTP, proven by what they answer."""
