"""A model's weights, drawn on the GPU before the first engine starts: `draw.py SHAPE DIRECTORY DEVICE`.

Prints `drawn` when all of them are in host memory and no more of the GPU is taken, then writes the files beside what
runs by then, prints `written`, and waits for the end of its input: an engine that starts must not see GPU memory become
free, and a process that ends frees what CUDA itself holds.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lora_grpo.bench.levels import collect
from lora_grpo.bench.shapes import write_model


def main(shape: str, directory: Path, device: str) -> None:
    def drawn() -> None:
        collect(device)
        print("drawn", flush=True)

    write_model(shape, directory, device=device, drawn=drawn)
    print("written", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
