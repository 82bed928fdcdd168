"""The names that servers know versions by: never reused, and telling whose they are.

A server keeps a name until it is told to forget it, and its caches key on it. So every load takes a new one, made of
this place, a token that only this engine has, and a counter. The token is that of a locked folder: where the lock is
free, the process is dead and what it left on servers can go. The place is the file system that the folder lies in, as
this boot of the kernel numbers it: containers of one host name each have their own, and see no lock in another's.
"""

import hashlib
import itertools
import re
import socket
from pathlib import Path

from lora_grpo.adapters.files.disk import read_small, tmpfs_home
from lora_grpo.adapters.files.locks import OwnFolder, is_free
from lora_grpo.adapters.files.places import Identity
from lora_grpo.adapters.version import AdapterVersion, run_name, served_name
from lora_grpo.errors import ConfigError

_FOLDER = "lora-grpo-engine-"
_OWNED = re.compile(r"lora-grpo\.([A-Za-z0-9-]+)\.([a-z0-9_]+)\..+")


class Names:
    """Gives out names, and holds the folder whose lock says that this process lives."""

    def __init__(self) -> None:
        self._parent = tmpfs_home()
        own = OwnFolder(self._parent, _FOLDER)
        self.folder, self.close = own.path, own.close
        host = re.sub("[^A-Za-z0-9-]+", "-", socket.gethostname())
        boot = read_small(Path("/proc/sys/kernel/random/boot_id")) or b""
        system = hashlib.blake2b(boot + str(self.folder.stat().st_dev).encode(), digest_size=4)
        self._place = f"{host}-{system.hexdigest()}"
        self._token = self.folder.name.removeprefix(_FOLDER)
        self._counter = itertools.count(1)

    def fresh(self, version: AdapterVersion) -> str:
        run = re.sub("[^A-Za-z0-9_-]+", "-", version.path.parent.parent.name)
        return f"lora-grpo.{self._place}.{self._token}.{run}.v{version.number}.{next(self._counter)}"

    def is_leftover(self, name: str) -> bool:
        """Whether a dead process of this place gave out `name`."""
        owner = _OWNED.fullmatch(name)
        return owner is not None and owner[1] == self._place and is_free(self._parent / f"{_FOLDER}{owner[2]}")

    def sweep(self) -> None:
        OwnFolder.sweep(self._parent, _FOLDER)


def resolver_name(version: AdapterVersion) -> str:
    """The name, RUN@NUMBER, by which a resolver finds a published version. Raises `ConfigError` for one of no store."""
    root = version.path.parent.parent
    identity = Identity.read(root)
    if identity is None:
        raise ConfigError(f"{version} at {version.path} is in no store, so no resolver can pull it; publish it first")
    return served_name(run_name(Path(identity.other or root), identity.run_id), version.number)
