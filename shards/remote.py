"""Whole objects on S3, Google Cloud Storage and Azure Blob Storage, through fsspec's backends.

Every operation has a budget: timeouts per request, a number of attempts, a deadline; then it is a
`UserError` of one line. Writing is one put of a finished local file, so that an object is old, new
or absent. No write handle is ever open: fsspec publishes what such a handle holds when an
exception ends it. `shards.storage` is the face of this module; nobody else calls it.

Endpoints and credentials come from where each service's own tools take them: the environment and
the files that it names.
"""

import asyncio
import contextlib
import errno
import logging
import os
import random
import threading
import traceback
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

from shards.errors import MissingError, StorageError, UserError, redact

T = TypeVar("T")

PROTOCOLS = ("s3", "gs", "gcs", "abfs", "abfss", "az")

PART_BYTES = 16 << 20
"""A larger file goes to S3 in parts of this size; `PARALLEL_PARTS` of them are in memory."""
PARALLEL_PARTS = 4
MAX_PARTS = 10_000
MAX_PAGE_KEYS = 1000
"""Of one list and of one removal. This and `MAX_PARTS` are limits of S3:
docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html."""
PARALLEL_DELETES = 16

MIN_BYTES_PER_S = 1 << 20
"""A transfer slower than this counts as stuck: bytes add to a request's time at this rate."""

NUM_ATTEMPTS = 6
"""Of one request. Where a connection breaks, aiohttp makes one more within each of them."""
NUM_PUTS = 2
"""Of a whole file, each with `NUM_ATTEMPTS` of every request in it."""
FIRST_PAUSE_S = 0.5
"""Before the second attempt; doubled before each later one, and drawn from its upper half."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """The time budget of remote operations, in seconds.

    Each field can be set by an environment variable: `connect_s` by `PIXLOOM_STORAGE_CONNECT_S`.
    """

    connect_s: float = 10.0
    """Until a connection stands."""
    read_s: float = 30.0
    """Without a byte from the server."""
    deadline_s: float = 180.0
    """For an operation with all its attempts, beside the time that its bytes may take."""

    @classmethod
    def from_environment(cls) -> "Limits":
        values = {}
        for field in fields(cls):
            name = f"PIXLOOM_STORAGE_{field.name.upper()}"
            if name in os.environ:
                try:
                    values[field.name] = float(os.environ[name])
                except ValueError:
                    values[field.name] = 0.0
                if not 0 < values[field.name] < float("inf"):
                    raise UserError(f"{name}={os.environ[name]}: must be seconds above 0")
        return cls(**values)

    def request_s(self, num_bytes: int = 0) -> float:
        """For one attempt at a request that carries `num_bytes`."""
        return self.connect_s + self.read_s + num_bytes / MIN_BYTES_PER_S

    def operation_s(self, num_bytes: int = 0) -> float:
        """For an operation that carries `num_bytes` and may have to begin again."""
        return self.deadline_s + 2 * NUM_PUTS * num_bytes / MIN_BYTES_PER_S


_NO_BUCKET = "there is no such bucket or container"


class _MissingError(Exception):
    """There is no such object."""


class _IncompleteError(Exception):
    """Not all of an object arrived; the whole put or fetch must be done again."""


def protocol_of(url: str) -> str | None:
    """The protocol of a remote URL; None for a local path and for any other URL."""
    protocol, separator, _ = url.partition("://")
    return protocol if separator and protocol in PROTOCOLS else None


def is_inside(url: str, folder: str) -> bool:
    """Whether `url` is `folder` or below it, as far as the text of both tells."""
    inner, outer = _place(url), _place(folder)
    return inner[0] == outer[0] and inner[1][: len(outer[1])] == outer[1]


def _place(url: str) -> tuple[str, list[str]]:
    """The service, and bucket and key in parts. One container is named with or without account."""
    protocol, _, rest = url.partition("://")
    bucket, *key = rest.rstrip("/").split("/")
    return _SERVICES[protocol][1], [bucket.partition("@")[0], *key]


def exists(url: str) -> bool:
    """Whether there is such an object, or any object below that name."""
    with _opened(url) as (store, path):
        return store.run(store.exists(path))


def size_bytes(url: str) -> int:
    with _opened(url) as (store, path):
        return store.run(store.size_bytes(path))


def read_bytes(url: str, num_bytes: int | None = None) -> bytes:
    """The whole object. Its size, on which the time depends, is asked first if it is not given."""
    with _opened(url) as (store, path):
        if num_bytes is None:
            num_bytes = store.run(store.size_bytes(path))
        return store.run(store.read(path, num_bytes), num_bytes)


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of one object; fewer where it ends before."""
    with _opened(url) as (store, path):
        return store.run(store.read_range(path, start, stop), stop - start)


def put(scratch: Path, url: str) -> None:
    """Puts a finished local file at `url` and checks that all of it is there."""
    num_bytes = scratch.stat().st_size
    with _opened(url) as (store, path):
        store.run(store.put_whole(scratch, num_bytes, path), num_bytes)


def fetch(url: str, destination: Path) -> None:
    """Downloads one whole object into the local file `destination`, which must exist."""
    with _opened(url) as (store, path):
        num_bytes = store.run(store.size_bytes(path))
        store.run(store.fetch(path, destination, num_bytes), num_bytes)


def remove(url: str) -> None:
    """Removes one object; none there is no error."""
    with _opened(url) as (store, path):
        store.run(store.remove([path]))


def list_files(url: str) -> dict[str, int]:
    """Sizes in bytes of all objects below `url`, by name relative to it; asked anew each time."""
    with _opened(url) as (store, path):
        found = store.run(store.listed(path))
        # A name that ends in / is a folder made by a console: it has no content.
        return {name: found[name] for name in sorted(found) if not name.endswith("/")}


def remove_tree(url: str) -> None:
    """Removes all objects below `url`."""
    with _opened(url) as (store, path):
        if "/" not in path:
            raise UserError("a whole bucket is not removed; name a folder in it")

        async def remove_listed() -> None:
            await store.remove([f"{path}/{name}" for name in await store.listed(path)])

        store.run(remove_listed())


def abort_uploads(url: str, is_ours: Callable[[str], bool]) -> int:
    """Aborts unfinished uploads of `is_ours`'s objects below `url`; returns how many there were.

    Of a whole bucket none are: others may be writing to it.
    """
    with _opened(url) as (store, path):
        return store.run(store.abort_uploads(path, is_ours)) if "/" in path else 0


class _Store:
    """One process's client of one service: what is the same for all of them.

    A path is `BUCKET/KEY`. The coroutines run on fsspec's own thread; each request of theirs is
    attempted up to `NUM_ATTEMPTS` times.
    """

    fetch_options: ClassVar[dict[str, int]]
    """Make it one request: parts fetched side by side may be of two versions of the object."""

    def __init__(self, fs: Any, limits: Limits) -> None:
        self.fs = fs
        self.limits = limits

    def run(self, steps: Coroutine[Any, Any, T], num_bytes: int = 0) -> T:
        """Runs `steps` on the client's thread until they are done, failed or out of time."""
        ended = threading.Event()

        async def bounded() -> T:
            try:
                async with asyncio.timeout(self.limits.operation_s(num_bytes)):
                    return await steps
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(bounded(), self.fs.loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C in this thread: the other one has an upload to abort before we leave.
            if future.cancel():
                ended.wait(self.limits.request_s())
            raise

    async def attempt(self, request: Callable[[], Awaitable[T]], num_bytes: int = 0) -> T:
        """The answer to `request`, which must do no harm when it is done twice.

        Raises `_MissingError`, or the last attempt's error.
        """
        return await self._repeat(
            lambda: self._once(request, num_bytes), NUM_ATTEMPTS, again=_is_transient
        )

    async def _once(self, request: Callable[[], Awaitable[T]], num_bytes: int) -> T:
        try:
            # The client's own timeouts do not cover a body that the server does not take.
            async with asyncio.timeout(self.limits.request_s(num_bytes)):
                return await request()
        except Exception as error:
            code = _service_code(error)
            if code in ("NoSuchBucket", "ContainerNotFound"):
                raise UserError(_NO_BUCKET) from error
            if code == "NoSuchUpload":
                raise _IncompleteError("the upload is gone") from error
            if isinstance(error, FileNotFoundError):
                raise _MissingError from error
            raise

    async def exists(self, path: str) -> bool:
        try:
            await self.info(path)
        except _MissingError:
            return False
        return True

    async def info(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.attempt(lambda: self.fs._info(path))
        return found

    async def size_bytes(self, path: str) -> int:
        found = await self.info(path)
        if found["type"] != "file":
            raise _MissingError
        return int(found["size"])

    async def read(self, path: str, num_bytes: int) -> bytes:
        data = b""

        async def get() -> int:
            nonlocal data
            data = await self.fs._cat_file(path, **self.fetch_options)
            return len(data)

        await self._get_whole(get, path, num_bytes)
        return data

    async def read_range(self, path: str, start: int, stop: int) -> bytes:
        async def get() -> bytes:
            try:
                return bytes(await self.fs._cat_file(path, start=start, end=stop))
            except Exception as error:
                if _status(error) == 416:  # the object ends before `start`
                    return b""
                raise

        data = await self.attempt(get, stop - start)
        return data[: stop - start]  # a server may know nothing of ranges

    async def fetch(self, path: str, destination: Path, num_bytes: int) -> None:
        async def get() -> int:
            await self.fs._get_file(path, str(destination), **self.fetch_options)
            return destination.stat().st_size

        await self._get_whole(get, path, num_bytes)

    async def _get_whole(
        self, get: Callable[[], Awaitable[int]], path: str, num_bytes: int
    ) -> None:
        """Repeats `get` until as many bytes arrive as the object has."""

        async def get_checked() -> None:
            nonlocal num_bytes
            arrived_bytes = await self._once(get, num_bytes)
            if arrived_bytes != num_bytes:
                expected_bytes = num_bytes
                num_bytes = await self.size_bytes(path)  # another writer may have replaced it
                raise _IncompleteError(f"{arrived_bytes} of {expected_bytes} bytes arrived")

        await self._repeat(get_checked, NUM_ATTEMPTS)

    async def put_whole(self, scratch: Path, num_bytes: int, path: str) -> None:
        async def put() -> None:
            with _bucket_missing():
                await self.put(scratch, num_bytes, path)
            stored_bytes = await self.size_bytes(path)
            if stored_bytes != num_bytes:
                raise _IncompleteError(f"{stored_bytes} of {num_bytes} bytes are stored")

        # Whatever failed, and even if only a reply was lost: the file is whole and stays so.
        await self._repeat(put, NUM_PUTS)

    async def _repeat(
        self,
        steps: Callable[[], Awaitable[T]],
        times: int,
        again: Callable[[Exception], bool] = lambda error: (
            isinstance(error, _IncompleteError) or _is_transient(error)
        ),
    ) -> T:
        """What `steps` gives, which are done up to `times` times as long as `again` allows."""
        for pause in range(times - 1):
            try:
                return await steps()
            except Exception as error:
                if not again(error):
                    raise
            await asyncio.sleep(FIRST_PAUSE_S * 2**pause * random.uniform(0.5, 1))
        return await steps()

    async def put(self, scratch: Path, num_bytes: int, path: str) -> None:
        """One put; where it fails, it leaves no unfinished upload on a server within reach."""
        await self.attempt(lambda: self.fs._put_file(str(scratch), path), num_bytes)

    async def listed(self, path: str) -> dict[str, int]:
        """Sizes of all objects below the folder `path`, by the rest of their names."""
        with _bucket_missing():
            return await self.list_sizes(path)

    async def list_sizes(self, path: str) -> dict[str, int]:
        raise NotImplementedError

    async def remove(self, paths: Iterable[str]) -> None:
        """Removes these objects; one that is missing is no error."""

        async def remove_one(path: str) -> None:
            with contextlib.suppress(_MissingError):
                await self.attempt(lambda: self.fs._rm_file(path))

        await _together((remove_one(path) for path in paths), PARALLEL_DELETES)

    async def abort_uploads(self, path: str, is_ours: Callable[[str], bool]) -> int:
        return 0  # the other services drop unfinished uploads by themselves, after a week


@contextlib.contextmanager
def _bucket_missing() -> Iterator[None]:
    """For requests that no missing object can fail."""
    try:
        yield
    except _MissingError as error:
        raise UserError(_NO_BUCKET) from error


class _S3(_Store):
    """S3, and the servers that speak its protocol.

    Large files go up by own requests: s3fs leaves an upload behind when it is cancelled, aborts
    one while parts of it are still on their way, and holds 500 MB of parts in memory.
    """

    fetch_options: ClassVar = {"max_concurrency": 1}

    @classmethod
    def open(cls, url: str, limits: Limits) -> "_S3":
        from s3fs import S3FileSystem

        fs = S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "connect_timeout": limits.connect_s,
                "read_timeout": limits.read_s,
                # Only this module attempts again: three layers that do so multiply.
                "retries": {"total_max_attempts": 1, "mode": "standard"},
            },
        )
        fs.retries = 1
        return cls(fs, limits)

    async def call(
        self, operation: str, words: dict[str, Any], num_bytes: int = 0
    ) -> dict[str, Any]:
        answer: dict[str, Any] = await self.attempt(
            lambda: self.fs._call_s3(operation, **words), num_bytes
        )
        return answer

    async def exists(self, path: str) -> bool:
        bucket, key, _ = self.fs.split_path(path)
        if key:
            with contextlib.suppress(_MissingError):
                await self.call("head_object", {"Bucket": bucket, "Key": key})
                return True
        # Not s3fs's question, which takes an empty folder's name on some servers for content.
        words = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "MaxKeys": 1}
        page = await self.call("list_objects_v2", words)
        return bool(page.get("Contents"))

    async def put(self, scratch: Path, num_bytes: int, path: str) -> None:
        bucket, key, _ = self.fs.split_path(path)
        with scratch.open("rb") as file:
            if num_bytes <= PART_BYTES:
                words = {"Bucket": bucket, "Key": key, "Body": file.read()}
                await self.call("put_object", words, num_bytes)
            else:
                await self._put_in_parts(file, num_bytes, {"Bucket": bucket, "Key": key})

    async def _put_in_parts(self, file: BinaryIO, num_bytes: int, names: dict[str, str]) -> None:
        part_bytes = max(PART_BYTES, -(-num_bytes // MAX_PARTS))
        num_creates = 0
        upload: dict[str, str] = {}

        async def create() -> str:
            nonlocal num_creates
            num_creates += 1
            answer = await self.fs._call_s3("create_multipart_upload", **names)
            return str(answer["UploadId"])

        async def put_part(number: int) -> dict[str, Any]:
            body = os.pread(file.fileno(), part_bytes, (number - 1) * part_bytes)
            words = {**names, **upload, "PartNumber": number, "Body": body}
            answer = await self.call("upload_part", words, len(body))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            upload["UploadId"] = await self.attempt(create)
            numbers = range(1, -(-num_bytes // part_bytes) + 1)
            parts = await _together((put_part(number) for number in numbers), PARALLEL_PARTS)
            words = {**names, **upload, "MultipartUpload": {"Parts": parts}}
            await self.call("complete_multipart_upload", words, num_bytes)
        except BaseException:
            if upload:
                await self._quietly(self.call("abort_multipart_upload", {**names, **upload}))
            raise
        finally:
            if num_creates > 1 or not upload:
                # An upload was begun whose name we never heard.
                is_it = names["Key"].__eq__
                await self._quietly(self._abort(names["Bucket"], names["Key"], is_it))

    async def _quietly(self, steps: Coroutine[Any, Any, Any]) -> None:
        """Cleaning after a failure: neither for long, nor in place of the failure's own error."""
        try:
            async with asyncio.timeout(self.limits.request_s()):
                await steps
        except (Exception, asyncio.CancelledError) as error:
            logger.debug("cleaning up an upload: %s", redact(repr(error)))

    async def _abort(self, bucket: str, prefix: str, is_ours: Callable[[str], bool]) -> int:
        aborted: set[str] = set()
        marker: dict[str, str] = {}
        while True:
            words = {"Bucket": bucket, "Prefix": prefix, "MaxUploads": MAX_PAGE_KEYS, **marker}
            page = await self.call("list_multipart_uploads", words)
            found = {
                upload["UploadId"]: upload["Key"]
                for upload in page.get("Uploads", [])
                if is_ours(upload["Key"])
            }
            for upload_id in found.keys() - aborted:
                names = {"Bucket": bucket, "Key": found[upload_id], "UploadId": upload_id}
                with contextlib.suppress(_IncompleteError, _MissingError):
                    await self.call("abort_multipart_upload", names)
            if found.keys() - aborted:
                # From the start, where others have moved up: SeaweedFS gives no marker to go on.
                marker = {}
            elif page.get("IsTruncated") and page.get("NextKeyMarker"):
                markers = ("KeyMarker", "UploadIdMarker")
                marker = {name: page.get(f"Next{name}", "") for name in markers}
            else:
                return len(aborted)
            aborted |= found.keys()

    async def abort_uploads(self, path: str, is_ours: Callable[[str], bool]) -> int:
        bucket, key, _ = self.fs.split_path(path)
        prefix = f"{key}/"
        # Checked here too: to trust a server's filter may cost others their uploads.
        return await self._abort(
            bucket, prefix, lambda key: key.startswith(prefix) and is_ours(key[len(prefix) :])
        )

    async def list_sizes(self, path: str) -> dict[str, int]:
        bucket, key, _ = self.fs.split_path(path)
        prefix = f"{key}/" if key else ""
        sizes: dict[str, int] = {}
        marker: dict[str, str] = {}
        while True:
            words = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": MAX_PAGE_KEYS, **marker}
            page = await self.call("list_objects_v2", words)
            for found in page.get("Contents", []):
                if found["Key"] != prefix:
                    sizes[found["Key"].removeprefix(prefix)] = int(found["Size"])
            if not page.get("IsTruncated"):
                return sizes
            marker = {"ContinuationToken": page["NextContinuationToken"]}

    async def remove(self, paths: Iterable[str]) -> None:
        split = [self.fs.split_path(path)[:2] for path in paths]
        if len(split) == 1:
            bucket, key = split[0]
            with contextlib.suppress(_MissingError):
                await self.call("delete_object", {"Bucket": bucket, "Key": key})
            return
        for first in range(0, len(split), MAX_PAGE_KEYS):
            batch = split[first : first + MAX_PAGE_KEYS]
            keys = [{"Key": key} for _, key in batch]
            words = {"Bucket": batch[0][0], "Delete": {"Objects": keys, "Quiet": True}}
            answer = await self.call("delete_objects", words)
            for failed in answer.get("Errors", []):
                raise OSError(f"{failed.get('Key')}: not removed: {failed.get('Code')}")


class _Google(_Store):
    """Google Cloud Storage."""

    fetch_options: ClassVar = {"concurrency": 1}

    @classmethod
    def open(cls, url: str, limits: Limits) -> "_Google":
        # Asks each bucket for its kind over gRPC, with attempts and threads outside our budget.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        from aiohttp import ClientTimeout
        from gcsfs import GCSFileSystem

        fs = GCSFileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            token="anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None,
            requests_timeout=ClientTimeout(
                total=None, sock_connect=limits.connect_s, sock_read=limits.read_s
            ),
        )
        return cls(fs, limits)

    async def put(self, scratch: Path, num_bytes: int, path: str) -> None:
        await self.attempt(
            lambda: self.fs._put_file(str(scratch), path, chunksize=PART_BYTES), num_bytes
        )

    async def list_sizes(self, path: str) -> dict[str, int]:
        found = await self.attempt(lambda: self.fs._find(path, detail=True, update_cache=False))
        prefix = f"{path}/"
        return {
            name.removeprefix(prefix): int(info["size"])
            for name, info in found.items()
            if name.startswith(prefix) and name != prefix
        }


class _Azure(_Store):
    """Azure Blob Storage."""

    # The client asks for all parts of the version that the first one had.
    fetch_options: ClassVar = {"max_concurrency": PARALLEL_PARTS}

    @classmethod
    def open(cls, url: str, limits: Limits) -> "_Azure":
        from adlfs import AzureBlobFileSystem

        try:
            fs = AzureBlobFileSystem(
                **AzureBlobFileSystem._get_kwargs_from_urls(url),
                skip_instance_cache=True,
                use_listings_cache=False,
                max_concurrency=PARALLEL_PARTS,
                connection_timeout=limits.connect_s,
                read_timeout=limits.read_s,
            )
        except ValueError as error:
            raise UserError(
                "no account: write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/..., or set "
                "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and a credential"
            ) from error
        return cls(fs, limits)

    async def list_sizes(self, path: str) -> dict[str, int]:
        container, folder, _ = self.fs.split_path(path)
        prefix = f"{folder}/" if folder else ""

        async def list_blobs() -> dict[str, int]:
            async with self.fs.service_client.get_container_client(container) as client:
                blobs = client.list_blobs(name_starts_with=prefix, include=["metadata"])
                return {
                    blob.name.removeprefix(prefix): int(blob.size)
                    async for blob in blobs
                    # On accounts with real folders a folder is listed as a blob.
                    if (blob.metadata or {}).get("hdi_isfolder") != "true"
                }

        return await self.attempt(list_blobs)


_SERVICES: dict[str, tuple[type[_S3] | type[_Google] | type[_Azure], str]] = {
    "s3": (_S3, "s3"),
    "gs": (_Google, "gs"),
    "gcs": (_Google, "gs"),
    "abfs": (_Azure, "azure"),
    "abfss": (_Azure, "azure"),
    "az": (_Azure, "azure"),
}
"""By protocol: the service, and the optional dependency that brings its client."""

_ENVIRONMENT_PREFIXES = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_HOST", "FSSPEC_")

_stores: dict[tuple[object, ...], _Store] = {}
_stores_lock = threading.Lock()


def _forget_lock() -> None:
    global _stores_lock
    _stores_lock = threading.Lock()


# Another thread may hold it at the fork. The parent's stores stay in the child's dictionary,
# unused: to collect them would close connections on a thread that the child does not have.
os.register_at_fork(after_in_child=_forget_lock)


def _store_for(url: str) -> _Store:
    """The client for `url`: one for each process, account, budget and environment."""
    protocol = url.partition("://")[0]
    service, extra = _SERVICES[protocol]
    limits = Limits.from_environment()
    account = url.split("/")[2].partition("@")[2]
    environment = hash(
        tuple(
            sorted(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT_PREFIXES))
        )
    )
    key = (os.getpid(), service, account, limits, environment)
    with _stores_lock:
        if key not in _stores:
            # What these clients log about failures, with tracebacks, our errors say in a line.
            for name in ("s3fs", "aiobotocore", "botocore", "gcsfs", "adlfs", "azure"):
                logging.getLogger(name).addHandler(logging.NullHandler())
            # They hand parts of a file to aiohttp in a way that it suspects to be a mistake.
            warnings.filterwarnings("ignore", "Sending a large body directly", ResourceWarning)
            try:
                _stores[key] = service.open(url, limits)
            except ImportError as error:
                raise UserError(
                    f'{protocol}:// needs an optional package; run `pip install "pixloom[{extra}]"`'
                ) from error
        return _stores[key]


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[_Store, str]]:
    """The client for `url` and the path on it; errors become a `StorageError` naming `url`."""
    try:
        _check(url)
        store = _store_for(url)
        yield store, str(store.fs._strip_protocol(url)).rstrip("/")
    except Exception as error:
        logger.debug("%s", redact(traceback.format_exc()))
        # Not `from error`: what the clients raise carries signed URLs and request headers.
        kind = (
            UserError
            if isinstance(error, UserError)
            else MissingError
            if isinstance(error, _MissingError)
            else StorageError
        )
        raise kind(redact(f"{url}: {_explanation(error)}")) from None


def _check(url: str) -> None:
    protocol, _, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    named_account = protocol not in ("s3", "gs", "gcs")
    is_arn = bucket.startswith("arn:")
    if "?" in rest or (":" in bucket and not is_arn) or ("@" in bucket and not named_account):
        raise UserError(
            "a storage URL holds neither credentials nor a query; "
            "credentials belong into the environment"
        )
    if not bucket:
        raise UserError("the URL names no bucket")


def _explanation(error: Exception) -> str:
    """One line about `error`, at most 400 characters."""
    status = _status(error)
    name = type(error).__name__
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, _MissingError):
        return "there is no such object"
    if _is_denied(error, status):
        return (
            "access denied; check the credentials in the environment, "
            f"and what they may do in this bucket ({_service_code(error) or name}: {text[:200]})"
        )
    if name in _CREDENTIAL_ERRORS:
        return f"no usable credentials in the environment ({name}: {text[:200]})"
    if isinstance(error, TimeoutError):
        return "the storage gave no answer in time; check the network, or run it again later"
    if isinstance(error, _IncompleteError):
        return f"{text}; run it again"
    return f"the storage failed each time it was asked ({name}: {text[:300]})"


_CREDENTIAL_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "NoAuthTokenError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "RefreshError",
    "ClientAuthenticationError",
}
"""By name, because the packages that define them are optional."""

_TRANSIENT_CODES = {"RequestTimeout", "SlowDown", "BadDigest", "XAmzContentSHA256Mismatch"}
_LOCAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def _is_transient(error: Exception) -> bool:
    """Whether the same request may do better a moment later."""
    if isinstance(
        error, (_MissingError, _IncompleteError, UserError, PermissionError, ValueError, TypeError)
    ):
        return False
    if isinstance(error, OSError) and error.errno in _LOCAL_ERRNOS:
        return False
    status = _status(error)
    if type(error).__name__ in _CREDENTIAL_ERRORS or _is_denied(error, status):
        return False
    if status is None or status >= 500 or status in (408, 429):
        return True
    return _service_code(error) in _TRANSIENT_CODES


def _is_denied(error: Exception, status: int | None) -> bool:
    return (
        isinstance(error, PermissionError)
        or status in (401, 403)
        or str(error).startswith("Forbidden:")  # gcsfs
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__


def _service_code(error: Exception) -> str | None:
    """The error code of the service: `NoSuchBucket`, `SlowDown`, `ContainerNotFound`."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            return str(response.get("Error", {}).get("Code"))
        code = getattr(cause, "error_code", None)
        if code is not None:  # azure
            return str(getattr(code, "value", code))
    return None


def _status(error: Exception) -> int | None:
    """The HTTP status of the reply, if there was one."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif type(cause).__name__ == "HttpError":  # gcsfs
            found = getattr(cause, "code", None)
        else:  # azure
            found = getattr(cause, "status_code", None)
        with contextlib.suppress(TypeError, ValueError):
            return int(str(found))
    return None


async def _together(jobs: Iterable[Coroutine[Any, Any, T]], num_parallel: int) -> list[T]:
    """The results of `jobs` in their order, `num_parallel` at a time.

    Raises the first error, when no job runs any more.
    """
    turn = asyncio.Semaphore(num_parallel)

    async def in_turn(job: Coroutine[Any, Any, T]) -> T:
        async with turn:
            return await job

    waiting = list(jobs)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(in_turn(job)) for job in waiting]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        for job in waiting:
            job.close()  # those whose turn did not come
    return [task.result() for task in tasks]
