"""Folders that appear and vanish whole, the few file operations that this rests on, and a folder's digest.

`Tree` writes a numbered folder into `staging/` and renames it to its place; it removes one by renaming it into
`trash/` and deleting it there. A kill at any moment leaves the whole folder or a leftover that `sweep` clears."""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import psutil
import xxhash

from lora_grpo.errors import NoRoom, StoreCorrupt, StoreError

Buffer: TypeAlias = bytes | bytearray | memoryview
Files: TypeAlias = Mapping[str, Sequence[Buffer]]
"""Files by name, each as buffers that lie end to end."""
CHUNK_BYTES = 1 << 20
_Record = TypeVar("_Record")
_SHM = Path("/dev/shm")
VERSIONS, STATES = "versions", "states"
STAGING = "staging"  # in a tree, for what is not whole yet: deleted when the tree is next opened
MAX_NUMBER = 10**9 - 1  # of a version; a larger one in a file is damage
_SHM_SIZE = " (a Docker container has a /dev/shm of 64 MiB unless it is started with --shm-size, such as --shm-size=8g)"


@contextmanager
def reported(doing: str) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sentence = f"{doing} failed: {error.strerror or error}{where}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            intact = "free some space and try again, what was published before is intact"
            raise NoRoom(f"{sentence}; {intact}{shm_size(error.filename)}") from error
        raise StoreError(sentence) from error


def shm_size(path: str | Path | None) -> str:
    return _SHM_SIZE if path and Path(path).resolve().is_relative_to(_SHM) else ""


def write_file(path: Path, buffers: Sequence[Buffer], *, sync: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for buffer in buffers:
            left = memoryview(buffer).cast("B")
            while left:
                left = left[os.write(descriptor, left) :]
        if sync:
            os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, *, sync: bool) -> None:
    """Put `content` at `path` so that a reader, or the next start, sees the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    write_file(temporary, [content], sync=sync)
    os.replace(temporary, path)
    if sync:
        sync_folder(path.parent)


def open_regular(path: Path) -> int:
    """To read; anything but a regular file (a pipe that somebody left there) is refused, not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreCorrupt(f"{path} should be a regular file but is not; remove it")
    return descriptor


def read_small(path: Path, start: int = 0) -> bytes | None:
    absent = (FileNotFoundError, NotADirectoryError)
    with reported(f"reading {path}"), suppress(*absent), open(open_regular(path), "rb") as stream:
        stream.seek(start)
        return stream.read()
    return None


def parse_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_record(path: Path, build: Callable[[Any], _Record]) -> _Record | None:
    content = read_small(path)
    try:
        return None if content is None else build(parse_json(content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreCorrupt(f"{path} is damaged: {error}") from error


def is_number(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_NUMBER


def folder_name(number: int) -> str:
    return f"{number:06d}"


def number_in(name: str) -> int | None:
    """Only what `folder_name` makes, of at most `MAX_NUMBER`."""
    return int(name) if re.fullmatch("(?!0+$)[0-9]{6}|[1-9][0-9]{6,8}", name) else None


def read_number(path: Path) -> int | None:
    if (content := read_small(path)) is None:
        return None
    digits = content.strip()
    if not digits.isdigit() or len(digits) > 20 or int(digits) > MAX_NUMBER:
        fix = "write into it a number that is at least as large as every version number that this run has used"
        raise StoreCorrupt(f"{path} should hold a number but holds {content[:40]!r}; {fix}")
    return int(content)


def file_system(path: Path) -> str:
    place = path.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    # Of those mounted over one another in one place, the last.
    return max(reversed(mounts), key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"


def tmpfs_home() -> Path:
    return _SHM if _SHM.is_dir() else Path(tempfile.gettempdir())


def make_private(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (status := os.stat(path)).st_uid != os.geteuid():
        raise StoreError(f"{path} belongs to user id {status.st_uid}; choose a folder that you own")
    if stat.S_IMODE(status.st_mode) != 0o700:
        os.chmod(path, 0o700)


def digest_pieces(files: Iterable[tuple[str, int, Iterable[Buffer]]]) -> str:
    """xxh3_128 of files, each a name, a length and bytes in pieces, in order of names; not against an attacker."""
    hashed = xxhash.xxh3_128()
    for name, size_bytes, pieces in files:
        # The length goes in first, so no two folders share a stream of bytes.
        hashed.update(f"{name}\0{size_bytes}\0".encode())
        for piece in pieces:
            hashed.update(piece)
    return hashed.hexdigest()


def digest_buffers(files: Files) -> str:
    """Of files held as buffers, the same however a file is split into buffers."""
    views = {name: [memoryview(buffer).cast("B") for buffer in files[name]] for name in sorted(files)}
    return digest_pieces((name, sum(view.nbytes for view in parts), parts) for name, parts in views.items())


class Tree:
    """Numbered folders of some kinds, whole or not there; `sync` makes every change durable."""

    def __init__(self, path: Path, kinds: tuple[str, ...], *, sync: bool) -> None:
        self.path, self.kinds, self.sync = path, kinds, sync
        self._staging, self._trash = path / STAGING, path / "trash"  # trash: likewise, on its way out

    def create(self) -> None:
        for folder in (*(self.path / kind for kind in self.kinds), self._staging, self._trash):
            make_private(folder)

    def folder(self, kind: str, number: int) -> Path:
        return self.path / kind / folder_name(number)

    def has(self, kind: str, number: int) -> bool:
        with reported(f"looking in {self.path / kind}"):
            return self.folder(kind, number).is_dir()

    def numbers(self, kind: str, *, folders_only: bool = True) -> list[int]:
        folder = self.path / kind
        with reported(f"listing {folder}"), suppress(FileNotFoundError), os.scandir(folder) as entries:
            found = [(number_in(entry.name), entry) for entry in entries]
            return sorted(n for n, entry in found if n is not None and (entry.is_dir() or not folders_only))
        return []

    @contextmanager
    def staged(self, kind: str, number: int) -> Iterator[Path]:
        """A new folder to fill; it gets its place when the block ends, and is removed when the block fails."""
        folder = self._staging / f"{kind}-{folder_name(number)}"
        os.mkdir(folder, 0o700)
        try:
            yield folder
            if self.sync:
                sync_folder(folder)
            os.rename(folder, self.folder(kind, number))
        finally:
            if folder.exists():
                shutil.rmtree(folder)
        if self.sync:
            sync_folder(self.path / kind)

    def write(self, folder: Path, files: Files) -> None:
        for name, buffers in files.items():
            write_file(folder / name, buffers, sync=self.sync)

    def remove(self, kind: str, number: int) -> None:
        self.delete(kind, self.take_out(kind, number))

    def take_out(self, kind: str, number: int) -> Path:
        """Rename a folder out of its place; where it waits for `delete`, or for the next `sweep`."""
        trash = self._trash / f"{kind}-{folder_name(number)}"
        if trash.exists():
            trash = Path(tempfile.mkdtemp(prefix=f"{trash.name}-", dir=self._trash))
        os.rename(self.folder(kind, number), trash)
        return trash

    def delete(self, kind: str, trash: Path) -> None:
        """Delete a folder that was taken out, once a power cut can no longer put it back. May be tried again."""
        with reported(f"deleting {trash}"):
            if self.sync:
                sync_folder(self.path / kind)
            if trash.exists():
                shutil.rmtree(trash)

    def leftovers(self) -> list[str]:
        return [f"{place.name}/{name}" for place in (self._staging, self._trash) for name in sorted(os.listdir(place))]

    def sweep(self) -> None:
        """Delete the leftovers. Only whoever holds the lock may: a live writer's work looks the same."""
        for path in (self.path / name for name in self.leftovers()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
