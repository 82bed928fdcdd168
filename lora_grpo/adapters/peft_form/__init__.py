"""The PEFT form: an adapter as vLLM and PEFT read it, checked, written, read back, exported."""
