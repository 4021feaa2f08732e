"""A cache in an object store (S3, Google Cloud Storage, Azure), through fsspec."""

from __future__ import annotations

import contextlib
import enum
import errno
import hashlib
import os
import random
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from emkum.errors import StorageFailure, UsageError
from emkum.shards.durable import TEMPORARY_SUFFIX, storage_errors
from emkum.shards.layout import RECORDS

RETRY_SECONDS = 60.0  # how long one request is asked again, from its first failure on
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 8.0
HTTP_ATTEMPTS = 2  # within one S3 request, so that one lost part does not cost a whole upload
PIECE_BYTES = 32 << 20  # of one range request: what a torn connection costs

# Protocols whose pipe_file(mode="create") is one conditional request. Elsewhere fsspec looks first and then writes,
# so that two writers may both believe they were first.
CONDITIONAL_CREATE = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "memory": "fsspec",
}

TRIAL = f"{RECORDS}/claims/create-trial"  # nobody reads what lies beside the claims

_AGAIN = "run the same command again: committed blocks are kept"
_ANSWER = TypeVar("_ANSWER")
_Done = Literal["read", "listed", "written", "removed"]
_jitter = random.SystemRandom()  # the seeded generator of training stays as it is
_memory_lock = threading.Lock()  # fsspec's memory file system looks first and then writes


class RemoteStore:
    """A folder of objects at a URL that fsspec knows. Implements `Store`; thread-safe, and safe after a fork.

    options: fsspec's storage options, such as `endpoint_url` of s3fs. Nothing is created, nothing is asked yet.
    Listings are never cached. Raises UsageError for an unknown protocol or one whose package is not installed.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.local: Path | None = None
        self.token = uuid.uuid4().hex
        self.url = re.sub(r"//[^/@]*:[^/@]*@", "//", url).rstrip("/")  # errors and logs show no password
        self._address, self._options = url, options
        self._protocol = url.split("://", 1)[0].lower()
        self._is_s3 = self._protocol in ("s3", "s3a")
        self._filesystems: dict[int, Any] = {}  # by process: an event loop does not survive a fork
        self._create_is_conditional = False
        if self._protocol in ("file", "local"):
            raise UsageError(f"{self.url} is a local path", f"give it as one: {url.split('://', 1)[1]}")
        self._root = self._filesystem()._strip_protocol(url).rstrip("/")

    def where(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def read(self, path: str) -> bytes:
        def whole(filesystem: Any) -> bytes:
            num_bytes = _file_size(filesystem, self._place(path))
            if num_bytes == 0:
                return b""
            # one byte more than there should be: an object that was replaced meanwhile is noticed
            return _exactly(num_bytes, filesystem.cat_file(self._place(path), start=0, end=num_bytes + 1))

        return self._ask(path, "read", whole)

    def open(self, path: str) -> _RemoteReader:
        return _RemoteReader(self, path)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object, all of them."""
        return self._ask(
            path,
            "read",
            lambda filesystem: _exactly(stop - start, filesystem.cat_file(self._place(path), start=start, end=stop)),
        )

    def size(self, path: str) -> int:
        return self._ask(path, "read", lambda filesystem: _file_size(filesystem, self._place(path)))

    def list(self, folder: str) -> dict[str, int | None]:
        place = self._place(folder)

        def children(filesystem: Any) -> dict[str, int | None]:
            filesystem.invalidate_cache()
            found: dict[str, int | None] = {}
            for entry in filesystem.ls(place, detail=True):
                name = str(entry["name"]).rstrip("/")
                if name.startswith(place + "/") and "/" not in (name := name[len(place) + 1 :]):
                    found[name] = None if entry["type"] == "directory" else int(entry["size"])
            return found

        try:
            return self._ask(folder, "listed", children)
        except FileNotFoundError:
            return {}

    def names(self, folder: str) -> Sequence[str]:
        return list(self.list(folder))

    def modified(self, path: str) -> float:
        def moment(filesystem: Any) -> float:
            when: datetime = filesystem.modified(self._place(path))
            return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()

        return self._ask(path, "read", moment)

    def writer(self, path: str) -> SpooledObject:
        return SpooledObject(self, path)

    def write(self, path: str, data: bytes) -> str:
        def put(filesystem: Any) -> None:
            filesystem.pipe_file(self._place(path), data)
            self._check_written(filesystem, path, len(data))

        self._ask(path, "written", put)
        return hashlib.sha256(data).hexdigest()

    def upload(self, path: str, file: Path, num_bytes: int) -> None:
        """Writes a local file as one object. One request, or parts that become an object together."""

        def put(filesystem: Any) -> None:
            if self._protocol == "memory":  # its put_file would show the object while it grows
                filesystem.pipe_file(self._place(path), file.read_bytes())
            else:
                filesystem.put_file(str(file), self._place(path))
            self._check_written(filesystem, path, num_bytes)

        self._ask(path, "written", put)

    def create(self, path: str, data: bytes) -> bool:
        self._require_conditional_create()
        return self._create(path, data)

    def create_folder(self, folder: str, files: Mapping[str, bytes]) -> bool:
        """As in `Store`. Two writers must be kept apart by a claim: only the last file is decided by the storage.

        Files of a writer that died before its last one are replaced.
        """
        *others, last = files
        if self._exists(f"{folder}/{last}"):
            return False
        for name in others:
            self.write(f"{folder}/{name}", files[name])
        if not self.create(f"{folder}/{last}", files[last]):
            return False
        for name in others:  # a writer that lost the race may have written over them
            if self.read(f"{folder}/{name}") != files[name]:
                self.write(f"{folder}/{name}", files[name])
        return True

    def touch(self, path: str) -> None:
        # copied within the storage: read and written here, it could undo what another has just removed or replaced
        place, changed = self._place(path), {"MetadataDirective": "REPLACE"} if self._is_s3 else {}
        self._ask(path, "read", lambda filesystem: filesystem.cp_file(place, place, **changed))

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask(path, "removed", lambda filesystem: filesystem.rm_file(self._place(path)))

    def sweep(self, living: Collection[str]) -> int:
        """As in `Store`: spool files on this machine. In the storage an object is whole or not there."""
        removed, prefix = 0, _spool_prefix(self.url)
        for spool in Path(tempfile.gettempdir()).glob(f"{prefix}*{TEMPORARY_SUFFIX}"):
            if spool.name.removeprefix(prefix).split(".")[0] not in {*living, self.token}:
                spool.unlink(missing_ok=True)
                removed += 1
        return removed

    def free_bytes(self) -> int | None:
        return None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filesystems": {}}  # another process connects for itself

    def _place(self, path: str) -> str:
        return f"{self._root}/{path}" if path else str(self._root)

    def _exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def _check_written(self, filesystem: Any, path: str, num_bytes: int) -> None:
        try:
            there = _file_size(filesystem, self._place(path))
        except FileNotFoundError:
            raise _WrongAnswer("it was written and is not there") from None
        if there != num_bytes:
            raise _WrongAnswer(f"{num_bytes} bytes were written, {there} are there")

    def _create(self, path: str, data: bytes) -> bool:
        """Puts an object where there is none. After a lost reply the object that is there may be ours: it is compared.

        Another writer's object of the same bytes counts as ours; claims and receipts name their writer.
        """

        def put(filesystem: Any) -> None:
            with _memory_lock if self._protocol == "memory" else contextlib.nullcontext():
                filesystem.pipe_file(self._place(path), data, mode="create")

        try:
            self._ask(path, "written", put)
        except FileExistsError:
            try:
                return self.read(path) == data
            except FileNotFoundError:  # it was there, and somebody removed it: not ours
                return False
        return True

    def _require_conditional_create(self) -> None:
        """Tries once per store that the storage refuses to create what is there: some servers ignore the condition."""
        if self._create_is_conditional:
            return
        if self._protocol not in CONDITIONAL_CREATE:
            known = ", ".join(f"{protocol}://" for protocol in CONDITIONAL_CREATE)
            raise StorageFailure(
                f"{self.url} cannot be written: {self._protocol}:// is not known to create an object only where there"
                " is none, so two writers could destroy each other's work",
                f"use one of {known} or a local folder",
            )
        self._create(TRIAL, uuid.uuid4().hex.encode())  # it stays: whatever the answer, an object is there now
        if self._create(TRIAL, uuid.uuid4().hex.encode()):
            raise StorageFailure(
                f"{self.url} cannot be written: the storage created an object over another, so two writers could"
                " destroy each other's work",
                "use a storage that honours If-None-Match on PUT (docs/storage.md), or a local folder",
            )
        self._create_is_conditional = True

    def _filesystem(self) -> Any:
        found = self._filesystems.get(os.getpid())
        if found is None:  # two threads may both connect: one file system is kept, the other was never used
            found = self._filesystems.setdefault(os.getpid(), self._connect())
        return found

    def _connect(self) -> Any:
        from fsspec.core import url_to_fs

        try:
            filesystem, _ = url_to_fs(
                self._address, **{**self._options, "use_listings_cache": False, "skip_instance_cache": True}
            )
        except ImportError as error:
            package = CONDITIONAL_CREATE.get(self._protocol)
            install = "'emkum[s3]'" if package == "s3fs" else package or "the package that fsspec names"
            raise UsageError(f"{self.url} cannot be opened: {error}", f"pip install {install}") from error
        except ValueError as error:
            raise UsageError(
                f"{self.url} cannot be opened: {error}",
                "give a folder or a URL such as s3://bucket/folder (pip install 'emkum[s3]')",
            ) from error
        if self._is_s3:  # retries multiply: the defaults hide a failure for minutes
            filesystem.retries = 1
            filesystem.config_kwargs = {"retries": {"total_max_attempts": HTTP_ATTEMPTS}, **filesystem.config_kwargs}
        return filesystem

    def _renew(self, used: Any) -> None:
        """Connects again, with credentials as they are now, unless another thread has done so."""
        if self._filesystems.get(os.getpid()) is used:
            self._filesystems[os.getpid()] = self._connect()

    def _ask(self, path: str, done: _Done, request: Callable[[Any], _ANSWER]) -> _ANSWER:
        """The answer to a request, which is repeated while its failure may pass.

        done: what it does to the object. Raises FileNotFoundError, FileExistsError, StorageFailure.
        """
        place, renewed, num_failures, first_failure = self.where(path), False, 0, 0.0
        while True:
            filesystem = self._filesystem()
            try:
                return request(filesystem)
            except MemoryError:
                raise
            except Exception as error:
                trouble, words = _judge(error)
                if trouble is _Trouble.MISSING and done != "written":
                    raise FileNotFoundError(f"{place} is not there") from error
                if trouble is _Trouble.EXISTS:
                    raise FileExistsError(f"{place} is there already") from error
                if trouble is _Trouble.CREDENTIALS and renewed:
                    raise StorageFailure(
                        f"{place} cannot be {done}: the credentials were refused: {words}",
                        f"renew them, or ask for the right to read and write there, then {_AGAIN}",
                    ) from error
                if trouble in (_Trouble.REFUSED, _Trouble.MISSING):
                    raise StorageFailure(
                        f"{place} cannot be {done}: {words}", f"check the URL and the storage's settings, then {_AGAIN}"
                    ) from error
                num_failures += 1
                first_failure = first_failure or time.monotonic()
                seconds = time.monotonic() - first_failure
                wait_seconds = min(FIRST_WAIT_SECONDS * 2 ** (num_failures - 1), LONGEST_WAIT_SECONDS)
                wait_seconds *= _jitter.uniform(0.5, 1.0)
                if seconds + wait_seconds > RETRY_SECONDS:
                    raise StorageFailure(
                        f"{place} cannot be {done}: failed {num_failures} times in {seconds:.0f} s, last: {words}",
                        f"check the network and the storage's health, then {_AGAIN}",
                    ) from error
            if trouble is _Trouble.CREDENTIALS:
                self._renew(filesystem)
                renewed = True
            else:
                time.sleep(wait_seconds)


class _RemoteReader:
    """An object that is read by range. Holds no connection of its own."""

    def __init__(self, store: RemoteStore, path: str) -> None:
        self.size = store.size(path)
        self._store, self._path = store, path

    def expect_random(self) -> None:
        pass

    def expect(self, offset: int, num_bytes: int) -> None:
        pass

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """One request for all buffers together, or several of PIECE_BYTES."""
        start, stop = offset, min(offset + sum(buffer.nbytes for buffer in buffers), self.size)
        targets = iter([buffer.cast("B") for buffer in buffers])
        target = next(targets, memoryview(b""))
        while offset < stop:
            end = min(offset + PIECE_BYTES, stop)
            data = memoryview(self._store.read_range(self._path, offset, end))
            offset = end
            while data:
                if not target:
                    target = next(targets)
                    continue
                count = min(len(target), len(data))
                target[:count], target, data = data[:count], target[count:], data[count:]
        return max(offset - start, 0)


class SpooledObject:
    """One object written front to back into a local temporary file; uploaded whole at `commit`. A context manager."""

    def __init__(self, store: RemoteStore, path: str) -> None:
        self.num_bytes = 0
        self._store, self._path, self._digest = store, path, hashlib.sha256()
        name = f"{_spool_prefix(store.url)}{store.token}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"
        self._spool = Path(tempfile.gettempdir()) / name
        with storage_errors(self._spool):
            self._handle: int | None = os.open(self._spool, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, data: bytes | memoryview) -> None:
        assert self._handle is not None
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self.num_bytes += len(view)
        with storage_errors(self._spool):
            while view:
                view = view[os.write(self._handle, view) :]

    def write_all(self, parts: Iterator[memoryview]) -> None:
        for part in parts:
            self.write(part)

    def commit(self) -> str:
        """Uploads the object, replacing another. Returns its SHA-256."""
        self._close()
        self._store.upload(self._path, self._spool, self.num_bytes)
        return self._digest.hexdigest()

    def discard(self) -> None:
        self._close()
        with contextlib.suppress(OSError):
            self._spool.unlink()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> SpooledObject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _spool_prefix(url: str) -> str:
    """Spool files of one cache: a sweep knows the living writers of its own cache only."""
    return f".emkum-{hashlib.sha256(url.encode()).hexdigest()[:16]}-"


class _WrongAnswer(Exception):
    """The storage answered, with something else than what it holds. Asked again."""


def _exactly(num_bytes: int, data: bytes | None) -> bytes:
    if data is None or len(data) != num_bytes:
        raise _WrongAnswer(f"{0 if data is None else len(data)} bytes came of {num_bytes}")
    return data


def _file_size(filesystem: Any, place: str) -> int:
    info = filesystem.info(place)
    if info is None:
        raise _WrongAnswer("no answer")
    if info["type"] != "file":
        raise FileNotFoundError(place)
    return int(info["size"])


class _Trouble(enum.Enum):
    MISSING = "the storage says that there is no such object"
    EXISTS = "the object is there already"
    CREDENTIALS = "expired, unknown, or without the right"
    REFUSED = "asking again cannot help"
    PASSING = "asking again may help"


_PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_PASSING_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_CREDENTIAL_CODES = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
_CREDENTIAL_ERRORS = {  # of botocore, google-auth and azure-core, which are not imported here
    "ClientAuthenticationError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
_REFUSED_ERRORS = (ValueError, TypeError, NotImplementedError, AttributeError, LookupError, ImportError)
_REFUSED_ERRNOS = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG}


def _judge(error: Exception) -> tuple[_Trouble, str]:
    """What a failed request means, and what the storage said.

    "Not there" needs the storage's own word for it: everything unknown may pass.
    """
    names = {type(link).__name__ for link in _causes(error)}
    codes = {code for link in _causes(error) if (code := _code(link))}
    statuses = {status for link in _causes(error) if (status := _status(link))}
    words = " ".join([*map(str, sorted(statuses)), *sorted(codes - set(map(str, statuses)))])
    words = f"{words} ({_text(error)})" if words else _text(error)
    if "NoSuchBucket" in codes or "ContainerNotFound" in codes:
        return _Trouble.REFUSED, f"there is no such bucket: {words}"
    if isinstance(error, FileExistsError) or 412 in statuses:
        return _Trouble.EXISTS, words
    if codes & _PASSING_CODES or statuses & _PASSING_STATUS:
        return _Trouble.PASSING, words
    nameless = codes == {"400"}  # S3's answer to HEAD with an expired token, where no body can say so
    if nameless or statuses & {401, 403} or codes & _CREDENTIAL_CODES or names & _CREDENTIAL_ERRORS:
        return _Trouble.CREDENTIALS, words
    if statuses:  # they go before the type: s3fs makes PermissionError of 405, and in places FileNotFoundError of 301
        return (_Trouble.MISSING if 404 in statuses else _Trouble.REFUSED), words
    if isinstance(error, (FileNotFoundError, IsADirectoryError)):
        return _Trouble.MISSING, words
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # the latter in gcsfs
        return _Trouble.CREDENTIALS, words
    if isinstance(error, _REFUSED_ERRORS) or "ParamValidationError" in names:
        return _Trouble.REFUSED, words
    if isinstance(error, OSError) and error.errno in _REFUSED_ERRNOS:
        return _Trouble.REFUSED, words
    return _Trouble.PASSING, words


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _code(error: BaseException) -> str | None:
    """The storage's own name of the error: botocore's `response`, azure's `error_code`."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else getattr(error, "error_code", None)
    return str(code) if code else None


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error answer: botocore's `response`, aiohttp's `status`, azure's `status_code`.

    gcsfs's HttpError has it as `code`; aiohttp uses that word, with 400, for a body that broke off.
    """
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        found = [status]
    else:
        names = ("status", "status_code", *(["code"] if type(error).__name__ == "HttpError" else []))
        found = [getattr(error, name, None) for name in names]
    numbers = [int(str(value)) for value in found if str(value).isdecimal()]
    return next((number for number in numbers if 300 <= number < 600), None)


def _text(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
