"""The durable half of a store: copies of versions and trainer states, which a thread writes, so that no step waits."""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.disk import CHUNK_BYTES, STATES, VERSIONS, Buffer, Files, Tree, digest_pieces, reported
from lora_grpo.adapters.files.journal import Manifest
from lora_grpo.adapters.version import MANIFEST_FILE
from lora_grpo.errors import StoreCorrupt, StoreError

SUMS_FILE = "SHA256SUMS"


class Archive(Tree):
    """The run directory's folders. Everything is staged, fsynced, renamed, and the rename made durable."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, (VERSIONS, STATES), sync=True)

    def keep_version(self, manifest: Manifest, source: Path) -> None:
        """Copy a version from tmpfs. `StoreCorrupt` when tmpfs no longer holds what was published."""
        with reported(f"archiving version {manifest.number}"), self.staged(VERSIONS, manifest.number) as folder:
            sums = _copy_checked(source, folder, manifest, sync=True)
            self.write(folder, {SUMS_FILE: [_sums_text(sums)]})

    def bring_back(self, manifest: Manifest, root: Tree) -> None:
        """Copy a version to its old place on tmpfs, digest checked before it appears there."""
        number = manifest.number
        with reported(f"restoring version {number}"), root.staged(VERSIONS, number) as folder:
            _copy_checked(self.folder(VERSIONS, number), folder, manifest, sync=root.sync)

    def keep_state(self, number: int, contents: Files) -> None:
        with reported(f"archiving the trainer state of version {number}"), self.staged(STATES, number) as folder:
            sums = {name: _sha256(buffers) for name, buffers in contents.items()}
            self.write(folder, {**contents, SUMS_FILE: [_sums_text(sums)]})

    def verify(self, kind: str, number: int) -> None:
        """Compare every file of an archived folder with its `SHA256SUMS`; `StoreCorrupt` names what differs."""
        folder = self.folder(kind, number)
        with reported(f"reading {folder}"):
            expected, found = _read_sums(folder / SUMS_FILE), set(os.listdir(folder)) - {SUMS_FILE}
            if found != set(expected):
                raise StoreCorrupt(f"{folder} holds {sorted(found)}, but its {SUMS_FILE} names {sorted(expected)}")
            for name, sha256 in expected.items():
                if _sha256(_chunks(folder / name)) != sha256:
                    raise StoreCorrupt(f"{folder / name} differs from what was written (sha256)")


@dataclass(frozen=True, slots=True)
class Job:
    """`held_bytes` is the memory that stays taken until it is written (0: it reads from tmpfs)."""

    kind: str
    number: int
    size_bytes: int
    held_bytes: int
    run: Callable[[], None]

    def is_of(self, kind: str, number: int) -> bool:
        return (self.kind, self.number) == (kind, number)


class BackgroundWriter:
    """Runs jobs in order. One that fails stays first: the next call on the store raises its error, and only then is it
    tried again. None is dropped but one whose source is damaged (`StoreCorrupt`), which no retry can mend."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._failure: StoreError | None = None
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="lora-grpo-archive", daemon=True)

    @property
    def backlog_bytes(self) -> int:
        with self._changed:
            return sum(job.size_bytes for job in self._jobs)

    def pending(self, kind: str) -> set[int]:
        with self._changed:
            return {job.number for job in self._jobs if job.kind == kind}

    def has_room(self, held_bytes: int) -> bool:
        with self._changed:
            held = sum(job.held_bytes for job in self._jobs)
            return held_bytes == 0 or held == 0 or held + held_bytes <= self._limit_bytes

    def submit(self, job: Job) -> None:
        """Queue a job; where the queue is full, wait, or raise what failed meanwhile: then the job is not queued."""
        with self._changed:
            if self._thread.ident is None:
                self._thread.start()
            self._changed.wait_for(lambda: self._failure is not None or self.has_room(job.held_bytes))
            if not self.has_room(job.held_bytes):
                self.raise_failure()
            self._jobs.append(job)
            self._changed.notify_all()

    def cancel(self, kind: str, number: int) -> bool:
        """Take jobs out of the queue; False when one of them is being written right now."""
        with self._changed:
            if self._running is not None and self._running.is_of(kind, number):
                return False
            self._jobs = deque(job for job in self._jobs if not job.is_of(kind, number))
            self._changed.notify_all()
            return True

    def wait_for(self, kind: str, number: int) -> None:
        self._wait(lambda: not any(job.is_of(kind, number) for job in self._jobs))

    def flush(self) -> None:
        self._wait(lambda: not self._jobs)

    def raise_failure(self) -> None:
        """Raise the error of the last failed job, once, and let the thread go on."""
        with self._changed:
            failure, self._failure = self._failure, None
            if failure is not None:
                self._changed.notify_all()
                raise failure

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            if self._thread.ident is not None:
                self._thread.join()

    def _wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            self.raise_failure()
            self._changed.wait_for(lambda: self._failure is not None or done())
            self.raise_failure()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (bool(self._jobs) and self._failure is None))
                if self._closing:
                    return
                self._running = job = self._jobs[0]
            failure: StoreError | None = None
            try:
                job.run()
            except StoreError as error:
                failure = error
            except Exception as bug:  # noqa: BLE001 - whatever it is, the next call raises it
                failure = StoreError(f"the archive thread failed: {type(bug).__name__}: {bug}")
                failure.__cause__ = bug
            with self._changed:
                self._running, self._failure = None, failure
                if failure is None or isinstance(failure, StoreCorrupt):
                    self._jobs.popleft()
                self._changed.notify_all()


def verify_version(folder: Path, expected: Manifest) -> None:
    """Compare a version's folder with what was published; `StoreCorrupt` names what differs."""
    with reported(f"reading {folder}"):
        manifest = disk.read_small(folder / MANIFEST_FILE)
        if manifest != expected.to_bytes():
            what = "is gone" if manifest is None else "differs from what was published"
            raise StoreCorrupt(f"{folder / MANIFEST_FILE} {what}")
        _check(folder, expected, lambda name: _chunks(folder / name))


def _copy_checked(source: Path, target: Path, manifest: Manifest, *, sync: bool) -> dict[str, str]:
    """Copy a version's files; their sha256 by name. What is copied is what was published, or `StoreCorrupt`."""
    sums = {MANIFEST_FILE: _sha256([manifest.to_bytes()])}

    def copied(name: str) -> Iterator[Buffer]:
        hashed = hashlib.sha256()
        descriptor = os.open(target / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        # Buffered: a bare write may take less than it was given, where a disk or a quota has just become full.
        with open(descriptor, "wb") as stream:
            for piece in _chunks(source / name):
                hashed.update(piece)
                stream.write(piece)
                yield piece
            stream.flush()
            if sync:
                os.fsync(descriptor)
        sums[name] = hashed.hexdigest()

    _check(source, manifest, copied)
    disk.write_file(target / MANIFEST_FILE, [manifest.to_bytes()], sync=sync)
    return sums


def _chunks(path: Path) -> Iterator[memoryview]:
    """A file's bytes, each piece good until the next."""
    chunk = memoryview(bytearray(CHUNK_BYTES))
    with open(disk.open_regular(path), "rb", buffering=0) as stream:
        while count := stream.readinto(chunk):
            yield chunk[:count]


def _check(folder: Path, manifest: Manifest, read: Callable[[str], Iterable[Buffer]]) -> None:
    sizes = sorted(manifest.sizes.items())
    for name, size in sizes:
        try:
            found = os.stat(folder / name).st_size
        except FileNotFoundError:
            raise StoreCorrupt(f"{folder / name} is gone; did another program remove it?") from None
        if found != size:
            raise StoreCorrupt(f"{folder / name} has {found} bytes; {size} were published")
    digest = digest_pieces((name, size, read(name)) for name, size in sizes)
    if digest != manifest.digest:
        raise StoreCorrupt(f"{folder} has digest {digest}; v{manifest.number} was published with {manifest.digest}")


def _sha256(buffers: Iterable[Buffer]) -> str:
    hashed = hashlib.sha256()
    for buffer in buffers:
        hashed.update(buffer)
    return hashed.hexdigest()


def _sums_text(sums: Mapping[str, str]) -> bytes:
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def _read_sums(path: Path) -> dict[str, str]:
    content = disk.read_small(path)
    pairs = [line.split("  ", 1) for line in (content or b"").decode(errors="replace").splitlines()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise StoreCorrupt(f"{path} is {'missing' if content is None else 'damaged'}")
    return {name: sha256 for sha256, name in pairs}
