"""A small S3 server on the loopback interface, with faults to order: what object stores do on bad days."""

from __future__ import annotations

import email.utils
import hashlib
import itertools
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"


@dataclass
class Fault:
    """What happens to the next `times` requests of this method whose path or query contains `containing`.

    status, code: an error answer. cut: the connection closes after so many bytes of the body. short: the body is so
    many bytes, and its stated length agrees, as behind a broken proxy. lost: the request is carried out, then the
    connection closes without an answer. stall_seconds: nothing happens for so long, then the rest does.
    """

    method: str = ""
    containing: str = ""
    times: int = 1
    status: int = 0
    code: str = ""
    cut: int | None = None
    short: int | None = None
    lost: bool = False
    stall_seconds: float = 0.0


_STORM = (
    Fault(status=503, code="SlowDown"),
    Fault(status=500, code="InternalError"),
    Fault(cut=1),
    Fault(short=1),
    Fault(lost=True),
    Fault(stall_seconds=0.02),
)


class S3Stub:
    """One bucket in memory. `objects` maps keys to (bytes, time of writing); `requests` lists "GET key" and so on."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.access_keys: list[str] = []  # of those requests
        self.faults: list[Fault] = []
        self.weather: random.Random | None = None  # bad: a tenth of all requests meet a fault
        self.broken: Fault | None = None  # what happens to every request after the next `breaks_in`
        self.breaks_in = 0
        self.latency_seconds = 0.0
        self.honours_conditions = True
        self.page_length = 1000
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def count(self, beginning: str) -> int:
        """Requests so far, by the beginning of "METHOD key"."""
        return sum(request.startswith(beginning) for request in self.requests)

    def options(self, read_timeout: float = 5.0) -> dict[str, object]:
        """Storage options of s3fs for this server."""
        return {
            "endpoint_url": self.endpoint,
            "key": "dummy",
            "secret": "dummy",
            "client_kwargs": {"region_name": "us-east-1"},
            "config_kwargs": {"read_timeout": read_timeout, "connect_timeout": 5},
        }

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def take_fault(self, method: str, target: str) -> Fault | None:
        with self.lock:
            self.breaks_in -= 1
            if self.breaks_in < 0 and self.broken is not None:
                return self.broken
            for fault in self.faults:
                if fault.times and fault.method in ("", method) and fault.containing in target:
                    fault.times -= 1
                    return fault
            if self.weather is not None and self.weather.random() < 0.1:
                return self.weather.choice(_STORM)
        return None


@contextmanager
def s3_stub() -> Iterator[S3Stub]:
    stub = S3Stub()
    try:
        yield stub
    finally:
        stub.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = True
    stub: S3Stub

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up: that is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.stub.connections.add(self.connection)

    def finish(self) -> None:
        self.server.stub.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _handle(self) -> None:
        stub = self.server.stub
        body = self._body()
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, _, self.key = unquote(url.path).lstrip("/").partition("/")
        stub.requests.append(f"{self.command} {self.key}{'?' + url.query if url.query else ''}")
        stub.access_keys.append(self.headers.get("Authorization", "").partition("Credential=")[2].split("/")[0])
        time.sleep(stub.latency_seconds)
        self.fault = stub.take_fault(self.command, self.path) or Fault()
        time.sleep(self.fault.stall_seconds)
        if self.fault.status:
            self._error(self.fault.status, self.fault.code or str(self.fault.status))
        elif bucket != BUCKET:
            self._error(404, "NoSuchBucket")
        else:
            getattr(self, f"_{self.command.lower()}")(body)

    def _get(self, body: bytes) -> None:
        if not self.key or "list-type" in self.query:
            self._list()
            return
        found = self._found()
        if found is None:
            return
        data, modified = found
        wanted, status, headers = data, 200, {"Last-Modified": email.utils.formatdate(modified, usegmt=True)}
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                self._error(416, "InvalidRange")
                return
            wanted = data[int(first) : int(last) + 1 if last else None]
            status = 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(wanted) - 1}/{len(data)}"
        self._answer(status, wanted, headers)

    def _head(self, body: bytes) -> None:
        found = self._found()
        if found is not None:
            data, modified = found
            self._answer(200, data, {"Last-Modified": email.utils.formatdate(modified, usegmt=True)})

    def _put(self, body: bytes) -> None:
        stub = self.server.stub
        if "partNumber" in self.query:
            with stub.lock:
                stub.uploads[self.query["uploadId"]][int(self.query["partNumber"])] = body
            self._answer(200, b"", {"ETag": _etag(body)})
            return
        source = self.headers.get("x-amz-copy-source")
        with stub.lock:
            if source is not None:
                copied = stub.objects.get(unquote(source).lstrip("/").partition("/")[2])
                if copied is None:
                    self._error(404, "NoSuchKey")
                    return
                body = copied[0]
            if not self._may_write():
                return
            stub.objects[self.key] = (body, time.time())
        copy = f"<CopyObjectResult><ETag>{_etag(body)}</ETag></CopyObjectResult>".encode()
        self._answer(200, copy if source is not None else b"", {"ETag": _etag(body)})

    def _post(self, body: bytes) -> None:
        stub = self.server.stub
        if "uploads" in self.query:
            upload = f"upload-{next(stub.numbers)}"
            stub.uploads[upload] = {}
            names = f"<Bucket>{BUCKET}</Bucket><Key>{escape(self.key)}</Key><UploadId>{upload}</UploadId>"
            self._answer(200, f"<InitiateMultipartUploadResult>{names}</InitiateMultipartUploadResult>".encode())
            return
        with stub.lock:
            if self.query["uploadId"] not in stub.uploads:
                self._error(404, "NoSuchUpload")
                return
            if not self._may_write():
                return
            parts = stub.uploads.pop(self.query["uploadId"])
            whole = b"".join(parts[number] for number in sorted(parts))
            stub.objects[self.key] = (whole, time.time())
        result = f"<Key>{escape(self.key)}</Key><ETag>{_etag(whole)}</ETag>"
        self._answer(200, f"<CompleteMultipartUploadResult>{result}</CompleteMultipartUploadResult>".encode())

    def _delete(self, body: bytes) -> None:
        with self.server.stub.lock:
            if "uploadId" in self.query:
                self.server.stub.uploads.pop(self.query["uploadId"], None)
            else:
                self.server.stub.objects.pop(self.key, None)
        self._answer(204, b"")

    def _list(self) -> None:
        stub = self.server.stub
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        lines: dict[str, str] = {}
        with stub.lock:
            for key, (data, modified) in sorted(stub.objects.items()):
                if not key.startswith(prefix):
                    continue
                end = key.find(delimiter, len(prefix)) if delimiter else -1
                if end >= 0:
                    name = key[: end + 1]
                    lines[name] = f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
                else:
                    when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(modified))
                    lines[key] = (
                        f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
                        f"<ETag>{_etag(data)}</ETag><Size>{len(data)}</Size></Contents>"
                    )
        names = [name for name in sorted(lines) if name > self.query.get("continuation-token", "")]
        page = names[: min(stub.page_length, int(self.query.get("max-keys", "1000")))]
        more = len(page) < len(names)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        self._answer(
            200,
            f"<ListBucketResult><Name>{BUCKET}</Name><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(lines[name] for name in page)}"
            "</ListBucketResult>".encode(),
        )

    def _found(self) -> tuple[bytes, float] | None:
        found = self.server.stub.objects.get(self.key)
        if found is None:
            self._error(404, "NoSuchKey")
        return found

    def _may_write(self) -> bool:
        stub = self.server.stub
        if self.headers.get("If-None-Match") == "*" and stub.honours_conditions and self.key in stub.objects:
            self._error(412, "PreconditionFailed", "<Condition>If-None-Match</Condition>")
            return False
        return True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return _without_aws_chunks(data) if "aws-chunked" in self.headers.get("Content-Encoding", "") else data

    def _error(self, status: int, code: str, more: str = "") -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code} of the stub</Message>{more}</Error>".encode())

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        if self.fault.lost:
            self._hang_up()
            return
        if self.fault.short is not None and self.command == "GET":
            data = data[: self.fault.short]
        self.send_response(status)
        for name, value in {"ETag": _etag(data), **(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.cut is not None:
            self.wfile.write(data[: self.fault.cut])
            self._hang_up()
            return
        self.wfile.write(data)

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _without_aws_chunks(data: bytes) -> bytes:
    """The payload of an aws-chunked body: `<hex length>[;signature]`, the bytes, and so on; checksums trail."""
    payload, position = b"", 0
    while True:
        end = data.index(b"\r\n", position)
        size = int(data[position:end].split(b";")[0], 16)
        if size == 0:
            return payload
        payload += data[end + 2 : end + 2 + size]
        position = end + 4 + size
