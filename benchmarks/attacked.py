"""The trainer that is attacked: serves its store, and publishes a version for each line of stdin."""

import resource
import sys
from pathlib import Path

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.remote.server import StoreServer

root, token, files = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(files), int(files)))
with AdapterStore(Path(root, "store"), Path(root, "run")) as store, StoreServer(store, token) as server:
    print(server.url, server.run, flush=True)
    for line in sys.stdin:
        try:
            content = {"adapter_config.json": [b"{}"], "adapter_model.safetensors": [line.encode() * 1000]}
            store.promote(store.publish(content, step=0))
            store.flush()
            print("ok", store.head.number, flush=True)
        except Exception as error:  # noqa: BLE001 - whatever it raises is the answer
            print(type(error).__name__, error, flush=True)
