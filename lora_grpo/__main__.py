"""`python -m lora_grpo` is `lora-grpo`."""

from lora_grpo.cli import main

main()
