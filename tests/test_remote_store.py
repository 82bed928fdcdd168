"""The store server and its client: the right bytes for whoever has the token, and nothing else for anybody."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.attack import idle_connections
from lora_grpo.adapters.files.locks import OwnFolder
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_archived, keep_latest
from lora_grpo.adapters.version import AdapterVersion, parse_served_name, run_name, served_name
from lora_grpo.errors import ConfigError, DeliveryError, NoRoom, StoreCorrupt, StoreError, UnknownVersion
from lora_grpo.remote import server as server_module
from lora_grpo.remote.client import ReplicaCache, StoreClient, read_token
from lora_grpo.remote.server import StoreServer
from tests.store_files import adapter, content, on_disk

TOKEN = "0123456789abcdef"
BIG_BYTES = 64 << 20
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def store(shm_dir: Path, tmp_path: Path) -> Iterator[AdapterStore]:
    retention = keep_latest(1) | keep_archived(keep_latest(3))
    with AdapterStore(shm_dir / "store", tmp_path / "run", retention=retention) as store:
        yield store


@pytest.fixture
def server(store: AdapterStore) -> Iterator[StoreServer]:
    with StoreServer(store, TOKEN) as server:
        yield server


@pytest.fixture
def client(server: StoreServer) -> Iterator[StoreClient]:
    client = StoreClient(server.url, TOKEN)
    yield client
    client.close()


def promoted(store: AdapterStore, seed: int, size_bytes: int = 3000) -> AdapterVersion:
    version = store.publish(adapter(seed, size_bytes), step=seed)
    store.promote(version)
    return version


def pulled(client: StoreClient, run: str, number: int, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    client.pull(run, client.manifest(run, number), folder)
    return on_disk(folder)


def raw(url: str, path: str, token: str | None = TOKEN, method: str = "GET") -> tuple[int, Any]:
    """Status and JSON body for a path that goes over the wire exactly as it is written."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
    connection.putrequest(method, path, skip_accept_encoding=True)
    if token is not None:
        connection.putheader("Authorization", f"Bearer {token}")
    connection.endheaders()
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, body


def until(true: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.02)
    return False


# What is served


def test_a_version_arrives_as_it_was_published(store: AdapterStore, client: StoreClient, tmp_path: Path) -> None:
    """More than a chunk, published after the server started."""
    version = promoted(store, 1, size_bytes=(1 << 20) + 17)
    assert client.manifest(store.run, 1) == store.manifest(1)
    assert pulled(client, store.run, 1, tmp_path / "copy") == on_disk(version.path)


def test_a_version_that_left_tmpfs_comes_from_the_archive(
    store: AdapterStore, client: StoreClient, tmp_path: Path
) -> None:
    promoted(store, 1)
    store.flush()
    promoted(store, 2)
    assert store.prune() == [1]
    assert store.where(1) == {"archive"}
    assert pulled(client, store.run, 1, tmp_path / "copy") == content(adapter(1))


def test_a_store_without_an_archive_is_served_too(shm_dir: Path, tmp_path: Path) -> None:
    with AdapterStore(shm_dir / "store") as store, StoreServer(store, TOKEN) as server:
        promoted(store, 3)
        assert pulled(StoreClient(server.url, TOKEN), store.run, 1, tmp_path / "copy") == content(adapter(3))


def test_a_pruned_version_is_refused_with_its_reason(store: AdapterStore, client: StoreClient) -> None:
    for seed in range(5):
        promoted(store, seed)
    store.flush()
    store.prune()
    with pytest.raises(UnknownVersion, match="version 1 was removed by retention"):
        client.manifest(store.run, 1)
    with pytest.raises(UnknownVersion, match="there is no version 77"):
        client.manifest(store.run, 77)


def test_another_runs_version_is_refused(store: AdapterStore, client: StoreClient) -> None:
    promoted(store, 1)
    with pytest.raises(UnknownVersion, match=f"holds the run {store.run}, not somebody-else; ask for {store.run}@"):
        client.manifest("somebody-else", 1)


def test_the_server_ends_with_its_block_and_leaves_the_store(store: AdapterStore) -> None:
    with StoreServer(store, TOKEN) as server:
        client = StoreClient(server.url, TOKEN)
        with pytest.raises(UnknownVersion, match="there is no version 1"):
            client.manifest(store.run, 1)
    with pytest.raises(StoreError, match=r"cannot be reached .*LORA_GRPO_STORE_URL"):
        client.manifest(store.run, 1)
    promoted(store, 1)


def test_an_address_in_use_is_refused(store: AdapterStore, server: StoreServer) -> None:
    with pytest.raises(StoreError, match=r"listening for replicas on 127\.0\.0\.1 port \d+ failed: "):
        StoreServer(store, TOKEN, port=urlsplit(server.url).port or 0)


# Who may ask, and for what


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), "ünïcode"])
@pytest.mark.parametrize("path", ["/versions/1", f"/versions/1/{WEIGHTS}", "/nothing"])
def test_nothing_is_told_without_the_token(
    store: AdapterStore, server: StoreServer, path: str, token: str | None
) -> None:
    promoted(store, 1)
    status, body = raw(server.url, path, token)
    assert status == 401
    assert body == {"error": body["error"]}
    assert "LORA_GRPO_STORE_TOKEN_FILE" in body["error"]
    assert store.run not in body["error"]


def test_the_client_says_that_its_token_is_wrong(store: AdapterStore, server: StoreServer) -> None:
    promoted(store, 1)
    with pytest.raises(ConfigError, match="refuses this token"):
        StoreClient(server.url, "wrong").manifest(store.run, 1)


@pytest.mark.parametrize(
    "path",
    [
        "/versions/1/..%2f..%2fNUMBERS",
        "/versions/1/%2e%2e/%2e%2e/NUMBERS",
        "/versions/1/../../NUMBERS",
        "/versions/1/version.json",
        "/versions/1/.",
        f"/versions/1/{WEIGHTS}%00",
        f"/versions/1/{WEIGHTS}/",
        f"/versions/1//{WEIGHTS}",
        f"/versions/..%2fversions%2f000001/{WEIGHTS}",
        f"/versions/000001/{WEIGHTS}",
        f"/versions/+1/{WEIGHTS}",
        f"/versions/%EF%BC%91/{WEIGHTS}",
        f"/versions/1%0a/{WEIGHTS}",
        f"/versions/%2e%2e/{WEIGHTS}",
        f"/versions/{'9' * 400}/{WEIGHTS}",
        "/versions/0",
        "/versions/HEAD",
        "/versions/",
        "//store.json",
        "/..%2fstore.json",
        "/",
    ],
)
def test_only_a_versions_two_files_can_be_named(store: AdapterStore, server: StoreServer, path: str) -> None:
    promoted(store, 1)
    status, body = raw(server.url, path)
    assert (status, set(body)) == (404, {"error"})


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_written(store: AdapterStore, server: StoreServer, method: str) -> None:
    promoted(store, 1)
    assert raw(server.url, "/versions/1", method=method) == (405, {"error": "this store is read-only: it answers GET"})


# Files outlive their readers


def test_a_version_is_leased_while_it_is_streamed(store: AdapterStore, server: StoreServer) -> None:
    first = promoted(store, 1, BIG_BYTES)
    store.flush()
    promoted(store, 2)
    url, header = f"{server.url}/versions/1/{WEIGHTS}", {"Authorization": f"Bearer {TOKEN}"}
    with httpx.stream("GET", url, headers=header) as response:
        chunks = response.iter_raw()
        received = [next(chunks)]
        assert store.prune() == []
        assert first.path.is_dir()
        received += chunks
    assert b"".join(received) == content(adapter(1, BIG_BYTES))[WEIGHTS]
    assert until(lambda: store.prune() == [1])


def test_a_client_that_goes_away_lets_go_of_the_version(store: AdapterStore, server: StoreServer) -> None:
    promoted(store, 1, BIG_BYTES)
    store.flush()
    promoted(store, 2)
    url, header = f"{server.url}/versions/1/{WEIGHTS}", {"Authorization": f"Bearer {TOKEN}"}
    with httpx.stream("GET", url, headers=header) as response:
        next(response.iter_raw())
    assert until(lambda: store.prune() == [1])


def test_a_client_that_takes_no_more_does_not_hold_the_version_for_ever(
    store: AdapterStore, server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_STALL_S", 0.3)
    promoted(store, 1, BIG_BYTES)
    store.flush()
    promoted(store, 2)
    url, header = f"{server.url}/versions/1/{WEIGHTS}", {"Authorization": f"Bearer {TOKEN}"}
    with httpx.stream("GET", url, headers=header) as response:
        chunks = response.iter_raw()
        next(chunks)
        assert store.prune() == []
        assert until(lambda: store.prune() == [1])


# Whoever reaches the port


def test_idle_connections_take_neither_the_trainers_files_nor_the_replicas_place() -> None:
    """Here 300 of them against 256 open files; `benchmarks.attack` takes 1,100."""
    outcome = idle_connections(seed=1, connections=300, open_files=256)
    assert outcome.tries == 42
    assert outcome.faults == []
    assert outcome.figures["most_open_files"] < 128


def test_a_header_without_end_is_cut_off(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its length, and by the time that it may take; a request afterwards on the same connection begins anew."""
    monkeypatch.setattr(server_module, "REQUEST_S", 0.5)
    address = urlsplit(server.url)
    for piece, pause_s, most_bytes in ((b"a" * 65536, 0.0, 8 << 20), (b"a", 0.02, 200)):
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as attacker:
            sent, said = attacker.send(b"GET /versions/1 HTTP/1.1\r\nX-Endless: "), b""
            with suppress(ConnectionError):
                while sent < most_bytes and not said:
                    sent += attacker.send(piece)
                    time.sleep(pause_s)
                    said = seen(attacker)
            assert sent < most_bytes
    assert raw(server.url, "/versions/1")[0] == 404


def seen(connection: socket.socket) -> bytes:
    """What came by now; raises `ConnectionError` when the other side has closed."""
    if not select.select([connection], [], [], 0)[0]:
        return b""
    said = connection.recv(4096)
    if not said:
        raise ConnectionResetError
    return said


def test_one_that_is_being_answered_does_not_make_room(
    store: AdapterStore, server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "most_connections", lambda: 4)
    promoted(store, 1, BIG_BYTES)
    url, header = f"{server.url}/versions/1/{WEIGHTS}", {"Authorization": f"Bearer {TOKEN}"}
    address = urlsplit(server.url)
    with httpx.stream("GET", url, headers=header) as response, ExitStack() as idle:
        chunks = response.iter_raw()
        received = [next(chunks)]
        for _ in range(12):
            idle.enter_context(socket.create_connection((address.hostname or "", address.port or 0), timeout=10))
        assert raw(server.url, "/versions/1")[0] == 200
        received += chunks
    assert b"".join(received) == content(adapter(1, BIG_BYTES))[WEIGHTS]


# What is not what was published


@pytest.fixture
def tampered(shm_dir: Path) -> Iterator[tuple[AdapterStore, StoreClient, Path]]:
    """A store with version 1, its client, and the file to change. Without an archive, which would find out too."""
    with AdapterStore(shm_dir / "store") as store, StoreServer(store, TOKEN) as server:
        version = promoted(store, 1)
        yield store, StoreClient(server.url, TOKEN), version.path / WEIGHTS


def test_garbled_bytes_are_refused_by_their_digest(
    tampered: tuple[AdapterStore, StoreClient, Path], tmp_path: Path
) -> None:
    store, client, path = tampered
    with open(path, "r+b") as stream:
        stream.seek(100)
        stream.write(b"\0garbled\0")
    with pytest.raises(StoreCorrupt, match=rf"sent as {store.run}@1 is not what was published: .*digest.*verify"):
        pulled(client, store.run, 1, tmp_path / "copy")


def test_a_short_file_is_refused(tampered: tuple[AdapterStore, StoreClient, Path], tmp_path: Path) -> None:
    store, client, path = tampered
    os.truncate(path, 2000)
    with pytest.raises(StoreCorrupt, match="has 2000 bytes; 3000 were published"):
        pulled(client, store.run, 1, tmp_path / "copy")


def test_a_long_file_is_cut_off(tampered: tuple[AdapterStore, StoreClient, Path], tmp_path: Path) -> None:
    store, client, path = tampered
    with open(path, "ab") as stream:
        stream.write(bytes(BIG_BYTES))
    with pytest.raises(StoreCorrupt, match="sends more than the 3000 bytes"):
        pulled(client, store.run, 1, tmp_path / "copy")
    assert (tmp_path / "copy" / WEIGHTS).stat().st_size <= 3000


def test_a_file_that_is_gone_is_an_error_with_its_name(
    tampered: tuple[AdapterStore, StoreClient, Path], tmp_path: Path
) -> None:
    store, client, path = tampered
    path.unlink()
    with pytest.raises(StoreError, match=rf"answers /versions/1/{WEIGHTS} with 500: reading version 1 failed: "):
        pulled(client, store.run, 1, tmp_path / "copy")


@pytest.mark.parametrize(
    "answer",
    [
        {"number": 2},
        {"sizes": {"../../escape": 3, WEIGHTS: 3}},
        {"sizes": {WEIGHTS: 3}},
        {"sizes": {"adapter_config.json": -1, WEIGHTS: 3}},
        {"sizes": None},
        {"run": None, "digest": "x"},
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch, answer: Mapping[str, Any]) -> None:
    fields = {"run": "r", "number": 1, "parent": None, "digest": "0" * 32, "step": 0, "created_at": 0.0}
    fields |= {"sizes": {"adapter_config.json": 2, WEIGHTS: 3}, **answer}
    fields = {name: value for name, value in fields.items() if name != "run" or value is not None}
    client = talking_to(lambda _: httpx.Response(200, json=fields), monkeypatch)
    with pytest.raises(StoreError, match=r"describes version 1 as .*; is it a store server"):
        client.manifest("r", 1)


def talking_to(handler: Callable[[httpx.Request], httpx.Response], monkeypatch: pytest.MonkeyPatch) -> StoreClient:
    """A client of a server that a test makes up."""
    monkeypatch.setattr(httpx, "HTTPTransport", lambda retries: httpx.MockTransport(handler))
    return StoreClient("http://made.up", TOKEN)


@pytest.mark.parametrize(
    "answer", [httpx.Response(404, json={"detail": "Not Found"}), httpx.Response(200, text="hello")]
)
def test_another_kind_of_server_is_told_apart(monkeypatch: pytest.MonkeyPatch, answer: httpx.Response) -> None:
    with pytest.raises((UnknownVersion, StoreError), match=r"is it a store server\?"):
        talking_to(lambda _: answer, monkeypatch).manifest("r", 1)


@pytest.mark.parametrize(
    "url", ["", "trainer:8731", "ftp://trainer", "http://", "http://user:secret@trainer", "http://[::1"]
)
def test_an_address_that_cannot_work_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="the store's address"):
        StoreClient(url, TOKEN)


# Several at once


def test_several_threads_take_in_the_journal_one_at_a_time(shm_dir: Path) -> None:
    """Two that read the same lines would each move on by their length, and skip what the writer adds next."""
    with AdapterStore(shm_dir) as store:
        promoted(store, 1)
        view = AdapterStore(shm_dir, readonly=True)
        journal, inside, overlaps = view._catalog.journal, [], []
        refresh = journal.refresh

        def slow() -> None:
            inside.append(1)
            overlaps.append(len(inside))
            time.sleep(0.02)
            refresh()
            inside.pop()

        journal.refresh = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(4) as pool:
            assert {version.number for version in pool.map(view.get, [1] * 8)} == {1}
        assert set(overlaps) == {1}


# The token


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_GRPO_STORE_TOKEN_FILE", raising=False)
    monkeypatch.setenv("LORA_GRPO_STORE_TOKEN", "from-variable")
    named, given = tmp_path / "named", tmp_path / "given"
    named.write_text("from-named-file\n")
    given.write_text("from-given-file\n")
    assert read_token() == "from-variable"
    monkeypatch.setenv("LORA_GRPO_STORE_TOKEN_FILE", str(named))
    assert read_token() == "from-named-file"
    assert read_token(given) == "from-given-file"


@pytest.mark.parametrize(
    ("text", "says"), [(" \n", "there is no store token"), ("two words", "one word"), ("é", "ASCII")]
)
def test_a_token_that_cannot_work_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_token(tmp_path / "token")


def test_without_a_token_no_server_starts(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORA_GRPO_STORE_TOKEN", "LORA_GRPO_STORE_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="there is no store token"):
        StoreServer(store)


# Names


def test_a_name_stands_for_one_version_of_one_run(shm_dir: Path) -> None:
    name = run_name(Path("/runs/my run ünd so"), "abcdef0123456789")
    assert name == "my-run-nd-so-abcdef01"
    assert parse_served_name(served_name(name, 12)) == (name, 12)
    with AdapterStore(shm_dir / "a" / "run") as first, AdapterStore(shm_dir / "b" / "run") as second:
        assert first.run != second.run
        assert first.run == AdapterStore(first.root, readonly=True).run


@pytest.mark.parametrize(
    "name",
    ["run", "run@", "@1", "run@0", "run@01", "run@1 ", "run@1\n", "run@-1", "../run@1", ".@1", "a/b@1", "run@\uff11"],
)
def test_what_is_no_such_name_is_not_taken_for_one(name: str) -> None:
    assert parse_served_name(name) is None


# The replica's cache


def test_the_cache_takes_nothing_but_the_serving_form(store: AdapterStore, client: StoreClient, shm_dir: Path) -> None:
    """The bytes are what was published, and vLLM would apply them wrongly without a word."""
    promoted(store, 1)
    cache = ReplicaCache(shm_dir / "cache")
    with pytest.raises(DeliveryError):
        cache.pull(client, store.run, 1)
    assert cache.path(store.run, 1) is None
    assert [path for path in cache.folder.rglob("*") if path.name == WEIGHTS] == []


def test_what_would_exceed_the_budget_is_refused(store: AdapterStore, client: StoreClient, shm_dir: Path) -> None:
    promoted(store, 1)
    cache = ReplicaCache(shm_dir / "cache", budget_bytes=2000)
    with pytest.raises(NoRoom, match=r"room for 0\.0.*LORA_GRPO_STORE_CACHE_MIB.*restart"):
        cache.pull(client, store.run, 1)
    cache.close()
    assert not cache.folder.exists()


def in_another_process(parent: Path, then: str) -> str:
    """What a process prints that takes a cache in `parent` as `cache` and goes on with `then`."""
    code = f"""
import os, pathlib
from lora_grpo.remote.client import ReplicaCache
cache = ReplicaCache(pathlib.Path({str(parent)!r}))
"""
    return subprocess.run(
        [sys.executable, "-c", code + then], capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(shm_dir: Path) -> None:
    folder = Path(
        in_another_process(shm_dir, "(cache.folder / 'x').mkdir(); print(cache.folder, flush=True); os._exit(1)")
    )
    assert (folder / "x").is_dir()
    living = ReplicaCache(shm_dir)
    assert not folder.exists()
    ReplicaCache(shm_dir)
    assert living.folder.is_dir()


def test_a_folder_that_is_being_made_is_never_taken_for_a_dead_process_s(shm_dir: Path) -> None:
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            OwnFolder.sweep(shm_dir, "own-")

    sweepers = [threading.Thread(target=sweep) for _ in range(3)]
    for sweeper in sweepers:
        sweeper.start()
    made = []
    for _ in range(100):
        made.append(OwnFolder(shm_dir, "own-"))
        OwnFolder.sweep(shm_dir, "own-")
    stop.set()
    for sweeper in sweepers:
        sweeper.join()
    assert all((own.path / "LOCK").is_file() for own in made)
    for own in made:
        own.close()
    assert list(shm_dir.glob("*own-*")) == []


def test_a_process_that_ends_takes_its_cache_with_it(shm_dir: Path) -> None:
    folder = Path(in_another_process(shm_dir, "print(cache.folder)"))
    assert folder.parent == shm_dir
    assert not folder.exists()


def test_a_child_that_ends_leaves_the_cache_alone(shm_dir: Path) -> None:
    told = in_another_process(
        shm_dir, "child = os.fork()\nif child: os.waitpid(child, 0); print(cache.folder.is_dir())"
    )
    assert told == "True"


# The command


def test_the_command_serves_a_run_that_goes_on(store: AdapterStore, tmp_path: Path) -> None:
    """Another process than the trainer's: it sees new versions, and its leases keep them."""
    (tmp_path / "token").write_text(TOKEN)
    promoted(store, 1)
    command = [sys.executable, "-m", "lora_grpo", "store-server", tmp_path / "run", "--port", "0", "--json"]
    process = subprocess.Popen([*command, "--token-file", tmp_path / "token"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told == {"url": told["url"], "run": store.run, "pid": process.pid}
        promoted(store, 2, BIG_BYTES)
        store.flush()
        assert StoreClient(told["url"], TOKEN).manifest(store.run, 2) == store.manifest(2)
        url, header = f"{told['url']}/versions/2/{WEIGHTS}", {"Authorization": f"Bearer {TOKEN}"}
        with httpx.stream("GET", url, headers=header) as response:
            chunks = response.iter_raw()
            next(chunks)
            promoted(store, 3)
            assert 2 not in store.prune()
        assert until(lambda: store.prune() == [2])
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()


def test_the_command_names_what_is_missing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORA_GRPO_")}
    command = [sys.executable, "-m", "lora_grpo", "store-server", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, "there is no store token" in done.stderr) == (2, True)
    environment["LORA_GRPO_STORE_TOKEN"] = TOKEN
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, "there is no store in" in done.stderr) == (2, True)
