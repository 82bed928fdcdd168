"""The client of a store server: what it takes from there is what was published, or an error that says why not.

And a replica's own copies of that, on its tmpfs: pulled once, never removed while its engine may read them again."""

import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from lora_grpo.adapters.files.disk import VERSIONS, Tree, make_private, reported, write_file
from lora_grpo.adapters.files.journal import Manifest
from lora_grpo.adapters.files.locks import OwnFolder
from lora_grpo.adapters.peft_form.files import open_adapter
from lora_grpo.adapters.upkeep.archive import verify_version
from lora_grpo.adapters.version import MANIFEST_FILE, served_name
from lora_grpo.errors import ConfigError, NoRoom, StoreCorrupt, StoreError, UnknownVersion

MIB = 1 << 20
TOKEN_VARIABLE = "LORA_GRPO_STORE_TOKEN"
TOKEN_FILE_VARIABLE = "LORA_GRPO_STORE_TOKEN_FILE"
"""The token itself, or the file that holds it: never on a command line, where every user sees it."""
_FOLDER = "replica-"
TIMEOUT_S = 30.0
"""Seconds without a byte after which the store counts as out of reach."""


class StoreClient:
    """Asks one store server. Usable from several threads; raises `ConfigError` for what is no http(s) address."""

    def __init__(self, url: str, token: str) -> None:
        self.url = _checked(url)
        headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"}
        timeout, transport = httpx.Timeout(TIMEOUT_S, connect=5.0), httpx.HTTPTransport(retries=2)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, transport=transport)

    def manifest(self, run: str, number: int) -> Manifest:
        """What was published; `UnknownVersion` when the store has no such version or is another run's."""
        with self._asking(f"/versions/{number}") as response:
            text = response.read().decode(errors="replace")
        try:
            fields = json.loads(text)
            manifest, serves = Manifest.from_mapping(fields), str(fields["run"])
            if manifest.number != number:
                raise ValueError("it is another version's")
        except (KeyError, TypeError, ValueError) as error:
            said = f"describes version {number} as {text[:500]}; is it a store server?"
            raise StoreError(f"the store at {self.url} {said}") from error
        if serves != run:
            raise UnknownVersion(f"the store at {self.url} holds the run {serves}, not {run}; ask for {serves}@NUMBER")
        return manifest

    def pull(self, run: str, manifest: Manifest, folder: Path) -> None:
        """Write a version's files into the empty `folder`; `StoreCorrupt` when they are not what was published."""
        name = served_name(run, manifest.number)
        with reported(f"writing {name}"):
            for file, size_bytes in sorted(manifest.sizes.items()):
                asking = self._asking(f"/versions/{manifest.number}/{file}")
                with asking as response, open(folder / file, "xb") as stream:
                    for chunk in response.iter_raw():
                        if response.num_bytes_downloaded > size_bytes:
                            raise StoreCorrupt(f"{self.url} sends more than the {size_bytes} bytes of {name}'s {file}")
                        stream.write(chunk)
            write_file(folder / MANIFEST_FILE, [manifest.to_bytes()], sync=False)
        try:
            verify_version(folder, manifest)
        except StoreCorrupt as error:
            fix = "Run 'lora-grpo verify' on the run; store.restore(number) there replaces a damaged copy"
            raise StoreCorrupt(f"what {self.url} sent as {name} is not what was published: {error}. {fix}") from error

    def close(self) -> None:
        self._http.close()

    @contextmanager
    def _asking(self, path: str) -> Iterator[httpx.Response]:
        try:
            with self._http.stream("GET", path) as response:
                if not response.is_success:
                    self._refuse(response, path)
                yield response
        except httpx.HTTPError as error:
            why = f"{type(error).__name__}: {error}"
            ask = "is the trainer, or lora-grpo store-server, running there, and LORA_GRPO_STORE_URL its address?"
            raise StoreError(f"the store at {self.url} cannot be reached ({why}); {ask}") from error

    def _refuse(self, response: httpx.Response, path: str) -> None:
        response.read()
        try:
            sentence = str(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            sentence = f"{response.text[:200]!r} (is it a store server?)"
        status = response.status_code
        kind = {401: ConfigError, 404: UnknownVersion}.get(status, StoreError)
        said = "refuses this token" if status == 401 else f"answers {path} with {status}"
        raise kind(f"the store at {self.url} {said}: {sentence}")


def _checked(url: str) -> str:
    with suppress(httpx.InvalidURL):
        parsed = httpx.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host and not parsed.userinfo:
            return str(parsed).rstrip("/")
    raise ConfigError(f"the store's address {url!r} must be like http://HOST:PORT; the token travels in a header")


class ReplicaCache:
    """Versions in a folder that goes with this process. A server may read an evicted adapter's path again at any later
    request: nothing is removed before, and what would exceed the budget is refused. One thread at a time pulls."""

    def __init__(self, parent: Path, budget_bytes: int | None = None) -> None:
        """Take a new folder, and remove those of dead processes; by default, keep at most half of the file system."""
        with reported(f"opening the replica's cache in {parent}"):
            make_private(parent)
            OwnFolder.sweep(parent, _FOLDER)
            own = OwnFolder(parent, _FOLDER)
            half_bytes = shutil.disk_usage(parent).total // 2
        self.budget_bytes = half_bytes if budget_bytes is None else budget_bytes
        self.folder, self.used_bytes = own.path, 0
        self.close = weakref.finalize(self, own.close)
        """Removes the folder, now or when the process ends. Close the engine first."""

    def path(self, run: str, number: int) -> Path | None:
        """Where a version lies, None where it was not pulled. A folder in its place is whole and was checked."""
        tree = Tree(self.folder / run, (VERSIONS,), sync=False)
        return tree.folder(VERSIONS, number) if tree.has(VERSIONS, number) else None

    def pull(self, client: StoreClient, run: str, number: int) -> Path:
        """The path of a version that is not here yet; it appears whole, digest and layout checked, or nothing of it is
        left. Raises `NoRoom` before anything is transferred."""
        manifest, name = client.manifest(run, number), served_name(run, number)
        left = min(self.budget_bytes - self.used_bytes, shutil.disk_usage(self.folder).free)
        if manifest.size_bytes > left:
            room = f"this replica has room for {left / MIB:.1f} beside the {self.used_bytes / MIB:.1f} that it keeps"
            fix = "raise LORA_GRPO_STORE_CACHE_MIB (on a tmpfs that holds it), or restart it, which empties its cache"
            raise NoRoom(f"{name} takes {manifest.size_bytes / MIB:.1f} MiB, but {room}: {fix}")
        tree = Tree(self.folder / run, (VERSIONS,), sync=False)
        with reported(f"pulling {name}"):
            tree.create()
            with tree.staged(VERSIONS, number) as folder:
                client.pull(run, manifest, folder)
                open_adapter(manifest.version(folder))
        self.used_bytes += manifest.size_bytes
        return tree.folder(VERSIONS, number)


def read_token(file: str | Path | None = None) -> str:
    """The token in `file`, else in what LORA_GRPO_STORE_TOKEN_FILE names, else LORA_GRPO_STORE_TOKEN itself."""
    named = file or os.environ.get(TOKEN_FILE_VARIABLE)
    try:
        token = (Path(named).read_text() if named else os.environ.get(TOKEN_VARIABLE, "")).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {named} cannot be read: {error}") from error
    where = named or TOKEN_VARIABLE
    if not token:
        fix = f"write one ('openssl rand -hex 32') into a private file, named in {TOKEN_FILE_VARIABLE} on both sides"
        raise ConfigError(f"there is no store token in {where}; {fix}")
    if not re.fullmatch("[!-~]+", token):
        raise ConfigError(f"the store token in {where} must be one word of printable ASCII; make it hex digits")
    return token
