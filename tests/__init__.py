"""The test suite. Where torchvision is not installed, `stand_in` is there for it, in child processes too."""

import importlib.util
import os
import sys
from pathlib import Path

if importlib.util.find_spec("torchvision") is None:
    stand_in = str(Path(__file__).parent / "stand_in")
    sys.path.append(stand_in)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), stand_in)))
