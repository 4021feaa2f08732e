"""Reads source tars strictly: which samples they hold, where pictures and sounds lie, and what is wrong with them."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import stat
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn, TypeAlias

from braceexpand import braceexpand

from emkum.errors import (
    BadTar,
    DuplicateKey,
    NoData,
    SourceChanged,
    SplitKey,
    StorageFailure,
    TruncatedTar,
    UsageError,
)

IMAGE_EXTS = frozenset({"jpg", "jpeg", "png", "webp"})
AUDIO_EXTS = frozenset({"wav", "flac"})
TEXT_EXTS = frozenset({"json", "txt", "cls"})
USED_EXTS = IMAGE_EXTS | AUDIO_EXTS | TEXT_EXTS

MAX_TEXT_BYTES = 16 << 20
MAX_JSON_BYTES = 4 << 20  # "[[],[],..." takes 25 times as much once it is parsed
MAX_NAME_CHARACTERS = 4096  # what Linux allows a path
MAX_EXTENDED_HEADER_BYTES = 1 << 20
MAX_PADDING_BYTES = 1 << 20  # zeros after the end-of-archive marker; tar writes 10,240 or one record (-b)
MAX_MEMBERS_OF_A_KEY = 1000
MAX_BRACE_PATHS = 1_000_000
MAX_BRACE_DEPTH = 20

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_PIECE_BYTES = 2 << 20
_REGULAR_TYPES = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
_PAX_TYPES = frozenset({tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE})
_REFUSED_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_SPARSE = "GNU.sparse."
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")
_READ_JSON_KEYS = frozenset({"captions", "caption", "label", "label_name"})

_EXPECTED = (
    "emkum reads WebDataset tars on a local disk (KEY.jpg with KEY.txt or KEY.json, as in 00000.tar): "
    "write them with `img2dataset --output_format webdataset`, or try `emkum demo`, which makes its own"
)
OnTruncated: TypeAlias = Literal["error", "keep-complete"]

_COPY_AGAIN = "copy or write the tar again and compare its size with the original's"
_TAR_AGAIN = "write the tar again, sorted by name: tar --sort=name -cf NEW.tar -C FOLDER ."


@dataclass(frozen=True, slots=True)
class PictureMember:
    """A picture in a tar: `offset` of its first byte in the file, `size` in bytes, `ext` in lower case."""

    offset: int
    size: int
    ext: str


@dataclass(frozen=True, slots=True)
class SoundMember:
    """A sound in a tar: `offset` of its first byte in the file, `size` in bytes, `ext` in lower case."""

    offset: int
    size: int
    ext: str


@dataclass(frozen=True, slots=True)
class SourceSample:
    """One key of a tar with a picture, a sound or captions. `caption_source` is "json", "txt" or "" (no captions)."""

    key: str
    picture: PictureMember | None
    captions: tuple[str, ...]
    caption_source: str
    label: str | None
    label_name: str | None
    sound: SoundMember | None = None


@dataclass(frozen=True, slots=True)
class SourceTar:
    """What one strict pass found in a tar.

    name: its identity, the file's name without folders. bytes, sha256: of the whole file. samples: in the tar's order.
    ignored: members that are not used, counted by extension ("(hidden)", "(meta)" for names like .x and __x__).
    filtered: keys without picture, sound and caption, which are not in `samples`.
    truncated_at: None for a whole tar; else the byte at which the file ends too early, and `samples` are only those
    known to be complete. missing_eof: the tar lacks nothing but its end-of-archive marker, and that was allowed.
    """

    path: str
    name: str
    bytes: int
    sha256: str
    samples: tuple[SourceSample, ...]
    ignored: Mapping[str, int]
    filtered: int
    truncated_at: int | None = None
    missing_eof: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Finding tars


def find_tars(patterns: Sequence[str]) -> list[str]:
    """Paths of the tars that folders, files, globs and brace patterns name, in that order; folders and globs sorted.

    A file that several patterns name is listed once. Raises NoData where a pattern finds nothing, UsageError for
    `pipe:`, URLs, bad braces, and for two files of one name in different folders (the name is the tar's identity).
    """
    if not patterns:
        raise NoData("no source tars were named", _EXPECTED)
    found: dict[str, str] = {}
    for pattern in patterns:
        for path in _expand(pattern):
            found.setdefault(os.path.realpath(path), path)
    by_name: dict[str, str] = {}
    for path in found.values():
        other = by_name.setdefault(os.path.basename(path), path)
        if other != path:
            raise UsageError(
                f"two tars have one name: {other} and {path}",
                "a tar's name is its identity in the cache: rename one of them",
            )
    return list(found.values())


def _expand(pattern: str) -> list[str]:
    _require_path(pattern)
    if re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", pattern):
        raise UsageError(
            f"{pattern!r} is not a local path", "emkum reads local tars only: download them first, then name the files"
        )
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        return _folder_tars(pattern)
    if os.path.exists(pattern):
        return [pattern]
    paths = _braces(pattern) if "{" in pattern else [pattern]
    missing = [path for path in paths if not os.path.exists(path) and not re.search(r"[*?[]", path)]
    if missing:
        what = f"no file or folder {missing[0]}"
        if len(paths) > 1:
            what += f" ({len(missing)} of the {len(paths)} that {pattern} names are missing)"
        raise NoData(what, _EXPECTED)
    return [found for path in paths for found in _expand_one(path)]


def _require_path(path: str) -> None:
    """Raises UsageError for text that no file can be called by: Python would answer with a bare ValueError."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UsageError(f"{path!a} cannot be the name of a file", "name folders, files, globs or braces")


def _braces(pattern: str) -> list[str]:
    depth = max(itertools.accumulate((character == "{") - (character == "}") for character in pattern))
    if depth > MAX_BRACE_DEPTH:  # braceexpand's time and recursion grow with it
        raise UsageError(f"{depth} braces inside each other in {pattern!r}", "write {00000..00012} or {a,b}")
    too_many = UsageError(f"{pattern!r} names more than {MAX_BRACE_PATHS:,} files", "name a folder or a glob instead")
    for first, last in re.findall(r"\{(-?\d{1,40})\.\.(-?\d{1,40})", pattern):
        if abs(int(last) - int(first)) >= MAX_BRACE_PATHS:  # braceexpand would fill the memory before its first path
            raise too_many
    try:
        paths = list(itertools.islice(braceexpand(pattern), MAX_BRACE_PATHS + 1))
    except ValueError:
        raise UsageError(f"unbalanced braces in {pattern!r}", "write {00000..00012} or {a,b}") from None
    if len(paths) > MAX_BRACE_PATHS:
        raise too_many
    return paths


def _expand_one(path: str) -> list[str]:
    if os.path.isdir(path):
        return _folder_tars(path)
    if os.path.exists(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True))
    tars = [match for match in matches if match.lower().endswith(".tar") and os.path.isfile(match)]
    if not tars:
        raise NoData(f"no .tar file matches {path}{_what_else(matches)}", _EXPECTED)
    return tars


def _folder_tars(folder: str) -> list[str]:
    try:
        entries = sorted(os.path.join(folder, name) for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise StorageFailure(f"{folder} cannot be listed: {error.strerror}", "check its permissions") from error
    tars = [path for path in entries if path.lower().endswith(".tar") and os.path.isfile(path)]
    if not tars:
        raise NoData(f"no .tar file in {folder}{_what_else(entries)}", _EXPECTED)
    return tars


def _what_else(paths: Sequence[str]) -> str:
    if not paths:
        return ""
    if any(re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", path.lower()) for path in paths):
        return " (only compressed ones: decompress them first)"
    kinds = Counter("folders" if os.path.isdir(path) else (Path(path).suffix or "no extension") for path in paths)
    return f" (found: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items())[:5])})"


# ---------------------------------------------------------------------------------------------------------------------
# Scanning


def scan_tars(
    paths: Sequence[str],
    threads: int = 2,
    *,
    on_truncated: OnTruncated = "error",
    allow_missing_eof: bool = False,
) -> list[SourceTar]:
    """`scan_tar` of each path, in order, several at a time. Raises the error of the first bad tar in that order."""
    names = Counter(os.path.basename(path) for path in paths)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"two tars are named {twice}", "a tar's name is its identity in the cache: rename one of them")
    pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="scan")
    scan = partial(scan_tar, on_truncated=on_truncated, allow_missing_eof=allow_missing_eof)
    try:
        return [future.result() for future in [pool.submit(scan, path) for path in paths]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a signal does not wait for a large tar to be read


def scan_tar(
    path: str, name: str | None = None, *, on_truncated: OnTruncated = "error", allow_missing_eof: bool = False
) -> SourceTar:
    """Read a tar once, from its first byte to its last: its samples, its SHA-256, and every breach of docs/data.md.

    Bytes of pictures and sounds are hashed and passed over, never held. Raises TruncatedTar, SplitKey, DuplicateKey or
    BadTar, each naming the tar and the byte offset; NoData for a path that is not there; StorageFailure when reading
    fails.

    on_truncated: "keep-complete" keeps the samples of a truncated tar that are known to be complete, those followed by
    a whole header of another key, and says so in `truncated_at`. A file that ends within its first header, of which
    nothing shows that it was a tar, is refused all the same.
    allow_missing_eof: take a tar as whole, its last sample included, that ends right after a member (padded to 512
    bytes) or after the first of its two closing blocks.
    """
    _require_path(path)
    name = os.path.basename(path) if name is None else name
    if not _is_plain(name):
        raise UsageError(f"{name!a} is no name for a tar", "rename it: UTF-8, no control characters")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{path} is not a file", _EXPECTED)
        with open(path, "rb", buffering=0) as file:
            return _Scan(path, name, file).run(on_truncated, allow_missing_eof)
    except FileNotFoundError:
        raise NoData(f"no file {path}", _EXPECTED) from None
    except OSError as error:
        raise StorageFailure(
            f"{path} cannot be read: {error.strerror}", "check the disk and the permissions"
        ) from error


def read_member(fd_or_path: int | str, offset: int, size: int) -> bytes:
    """The `size` bytes at `offset` of a tar, given open or by path. Safe in threads: it moves no file position.

    Raises SourceChanged when the file ends before them, StorageFailure when it cannot be read.
    """
    if isinstance(fd_or_path, str):
        try:
            fd = os.open(fd_or_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageFailure(f"{fd_or_path} cannot be opened: {error.strerror}", "put the tar back") from error
        try:
            return _read_at(fd, fd_or_path, offset, size)
        finally:
            os.close(fd)
    return _read_at(fd_or_path, f"the tar open as file {fd_or_path}", offset, size)


def _read_at(fd: int, name: str, offset: int, size: int) -> bytes:
    pieces: list[bytes] = []
    end = offset + size
    while offset < end:
        try:
            piece = os.pread(fd, end - offset, offset)
        except OSError as error:
            raise StorageFailure(f"{name} cannot be read: {error.strerror}", "check the disk") from error
        if not piece:
            raise SourceChanged(
                f"{name} ends at byte {offset}; a member was found there up to byte {end}", "put the original tar back"
            )
        pieces.append(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class _EndOfFile(Exception):
    """The file ended before what was asked of it."""


class _Stream:
    """A file read once, forward, in large pieces, each hashed as it arrives."""

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self._file = file
        self._buffer = memoryview(bytearray(min(_PIECE_BYTES, file_bytes + 1)))
        self._filled = 0
        self._used = 0
        self._sha = hashlib.sha256()
        self.position = 0

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises _EndOfFile when fewer are left; they are then consumed."""
        if count <= self._filled - self._used:  # the common case, free of the loop below
            taken = bytes(self._buffer[self._used : self._used + count])
            self._used += count
            self.position += count
            return taken
        pieces = []
        while count:
            piece = self._advance(count)
            pieces.append(bytes(piece))
            count -= len(piece)
        return b"".join(pieces)

    def skip_to(self, position: int) -> None:
        """Pass over the bytes before `position`. Raises _EndOfFile."""
        while self.position < position:
            self._advance(position - self.position)

    def rest_is_zero(self) -> bool:
        """Consume the file to its end; whether every byte of it is zero."""
        zero = True
        try:
            while True:
                piece = bytes(self._advance(_PIECE_BYTES))
                zero = zero and piece.count(0) == len(piece)
        except _EndOfFile:
            return zero

    def _advance(self, limit: int) -> memoryview:
        if self._used == self._filled:
            # A raw file has readinto; BinaryIO does not promise it.
            self._filled = self._file.readinto(self._buffer)  # type: ignore[attr-defined]
            self._used = 0
            if not self._filled:
                raise _EndOfFile
            self._sha.update(self._buffer[: self._filled])
        piece = self._buffer[self._used : min(self._used + limit, self._filled)]
        self._used += len(piece)
        self.position += len(piece)
        return piece


@dataclass(slots=True)
class _Member:
    name: str
    header: int  # offset of its (first) header
    offset: int  # of its data
    size: int


@dataclass(slots=True)
class _Group:
    """The members of one key, gathered while its run lasts."""

    key: str
    header: int
    exts: set[str] = field(default_factory=set)
    picture: PictureMember | None = None
    sound: SoundMember | None = None
    json_captions: tuple[str, ...] = ()
    txt_captions: tuple[str, ...] = ()
    cls_label: str | None = None
    json_label: str | None = None
    label_name: str | None = None

    def sample(self) -> SourceSample | None:
        captions = self.json_captions or self.txt_captions
        if self.picture is None and self.sound is None and not captions:
            return None
        source = "json" if self.json_captions else "txt" if captions else ""
        label = self.json_label if self.cls_label is None else self.cls_label
        return SourceSample(self.key, self.picture, captions, source, label, self.label_name, self.sound)


class _Scan:
    """One pass over one tar."""

    def __init__(self, path: str, name: str, file: BinaryIO) -> None:
        self.path = path
        self.name = name
        self.fd = file.fileno()
        self.file_bytes = os.fstat(self.fd).st_size
        self.stream = _Stream(file, self.file_bytes)
        self.samples: list[SourceSample] = []
        self.ignored: Counter[str] = Counter()
        self.filtered = 0
        self.group: _Group | None = None
        self.seen: dict[str, tuple[int, tuple[str, ...]]] = {}  # key -> where its run began, the extensions in it
        self.num_headers = 0
        self.whole_ends: tuple[int, ...] = ()  # ending there, the file would lack nothing but end-of-archive

    def run(self, on_truncated: OnTruncated, allow_missing_eof: bool) -> SourceTar:
        if self.file_bytes == 0:
            raise TruncatedTar(f"{self.path} is empty (0 bytes)", _COPY_AGAIN)
        start = os.pread(self.fd, 8, 0)
        for magic, (kind, command) in _COMPRESSED.items():
            if start.startswith(magic):
                raise BadTar(
                    f"{self.path} is compressed ({kind}); members are read at their offsets in plain tars",
                    f"decompress it first: {command} {self.path}",
                )
        try:
            for member in self.members():
                self.add(member)
        except _EndOfFile:
            self.check_unchanged()
            if allow_missing_eof and self.file_bytes in self.whole_ends:
                self.close_group()
                return replace(self.found(), missing_eof=True)
            if on_truncated == "keep-complete" and self.num_headers:
                return replace(self.found(), truncated_at=self.file_bytes)
            raise self.truncated() from None
        self.close_group()
        self.check_end()
        return self.found()

    def found(self) -> SourceTar:
        ignored = dict(sorted(self.ignored.items()))
        sha256 = self.stream.sha256
        return SourceTar(self.path, self.name, self.file_bytes, sha256, tuple(self.samples), ignored, self.filtered)

    def truncated(self) -> TruncatedTar:
        way_out = _COPY_AGAIN
        if self.num_headers:
            way_out += "; --on-truncated keep-complete keeps its complete samples"
        if self.file_bytes in self.whole_ends:
            way_out += "; no member is cut, so --allow-missing-eof takes it as whole"
        what = f"{self.path} ends at byte {self.file_bytes} without end-of-archive; {self.num_complete()}"
        return TruncatedTar(what, way_out)

    def num_complete(self) -> str:
        return f"{len(self.samples)} complete sample{'' if len(self.samples) == 1 else 's'}"

    # Headers

    def members(self) -> Iterator[_Member]:
        """The regular files, up to the end-of-archive marker. Between two of them the stream moves past the data."""
        stream = self.stream
        long_name: str | None = None
        pax: dict[str, str] | None = None
        first: int | None = None  # where the headers of the coming member begin
        while True:
            header = stream.position
            self.whole_ends = (header,) if header and first is None else ()
            block = stream.take(_BLOCK)
            if block == _ZEROS:
                if self.whole_ends:
                    self.whole_ends = (header, header + _BLOCK)
                if stream.take(_BLOCK) != _ZEROS:
                    self.bad(header, "a lone block of zeros where a header or two such blocks should be", _COPY_AGAIN)
                if first is not None:
                    self.bad(first, "an extended header without its member", _COPY_AGAIN)
                return
            name, size, kind = self.parse_header(header, block)
            data = stream.position
            if kind == tarfile.GNUTYPE_LONGNAME:
                self.only_one(header, long_name)
                raw = self.extended_header(header, size)
                long_name = raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind == tarfile.GNUTYPE_LONGLINK:
                self.extended_header(header, size)
            elif kind in _PAX_TYPES:
                self.only_one(header, pax)
                pax = self.pax_records(header, self.extended_header(header, size))
            elif kind == tarfile.XGLTYPE:
                self.check_global(header, self.pax_records(header, self.extended_header(header, size)))
                continue
            else:
                pax = pax or {}
                self.only_one(header, None if long_name is None else pax.get("path"))
                name = pax.get("path", name if long_name is None else long_name)
                if len(name) > MAX_NAME_CHARACTERS:
                    what = f"a member name of {len(name)} characters; at most {MAX_NAME_CHARACTERS} are read"
                    self.bad(header, what, "rename the member")
                if _SPARSE in pax:
                    self.refuse_type(header, name, tarfile.GNUTYPE_SPARSE)
                if kind in _REGULAR_TYPES:
                    size = self.pax_size(header, pax) if "size" in pax else size
                    if size < 0:
                        self.bad(header, f"member {name!a} has size {size}", _COPY_AGAIN)
                    yield _Member(name, header if first is None else first, data, size)
                    stream.skip_to(data + _whole_blocks(size))
                elif kind != tarfile.DIRTYPE:
                    self.refuse_type(header, name, kind)
                long_name, pax, first = None, None, None
                continue
            first = header if first is None else first

    def parse_header(self, offset: int, block: bytes) -> tuple[str, int, bytes]:
        """Name, size and type of a header."""
        plain = plain_header(block)
        if plain is not None:
            self.num_headers += 1
            return plain
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if offset == 0:
                raise BadTar(f"{self.path} is not a tar: no valid header at byte 0", _EXPECTED) from None
            self.bad(offset, f"no valid tar header ({error}), after {self.num_complete()}", _COPY_AGAIN)
        self.num_headers += 1
        return info.name, info.size, info.type

    def extended_header(self, header: int, size: int) -> bytes:
        if not 0 <= size <= MAX_EXTENDED_HEADER_BYTES:
            self.bad(
                header, f"an extended header of {size} bytes; at most {MAX_EXTENDED_HEADER_BYTES} are read", _TAR_AGAIN
            )
        return self.stream.take(_whole_blocks(size))[:size]

    def only_one(self, header: int, other: object) -> None:
        """Readers disagree on which of two names or sizes a member has: none is right."""
        if other is not None:
            self.bad(header, "two extended headers for one member", _TAR_AGAIN)

    def check_global(self, header: int, pax: Mapping[str, str]) -> None:
        if pax:
            self.bad(header, f"a global pax header sets {min(pax)!a} of all members", _TAR_AGAIN)

    def pax_records(self, header: int, raw: bytes) -> dict[str, str]:
        """What a pax header says of path, size and sparseness, in records "LENGTH KEY=VALUE\\n" of LENGTH bytes."""
        records: dict[str, str] = {}
        at = 0
        while at < len(raw):
            length, space, _ = raw[at : at + 20].partition(b" ")
            end = at + int(length) if space and length.isdigit() else 0
            key, equals, value = raw[at + len(length) + 1 : end - 1].partition(b"=")
            if not at + len(length) + 1 < end <= len(raw) or raw[end - 1 : end] != b"\n" or not equals:
                self.bad(header, "a malformed pax header", _TAR_AGAIN)
            if key in (b"path", b"size"):
                records[key.decode()] = value.decode("utf-8", "surrogateescape")
            elif key.startswith(_SPARSE.encode()):
                records[_SPARSE] = ""
            at = end
        return records

    def pax_size(self, header: int, pax: Mapping[str, str]) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", pax["size"], re.ASCII):
            self.bad(header, f"a pax header with size {pax['size'][:40]!a}", _TAR_AGAIN)
        return int(pax["size"])

    def refuse_type(self, header: int, name: str, kind: bytes) -> NoReturn:
        described = _REFUSED_TYPES.get(kind, f"of unknown type {kind!r}")
        self.bad(
            header,
            f"member {name!a} is {described}",
            "only files and folders are read: tar --dereference follows links",
        )

    # Samples

    def add(self, member: _Member) -> None:
        name = self.checked_name(member)
        base = name.rpartition("/")[2]
        if _WEBDATASET_META.match(name):
            self.ignored["(meta)"] += 1
            return
        if base.startswith(".") and base[1:].lower() not in USED_EXTS:
            self.ignored["(hidden)"] += 1
            return
        stem, _, ext = base.partition(".")
        ext = ext.lower()
        if not stem or not ext:
            missing = "extension" if stem else "key"
            self.bad(
                member.header, f"member {name!r} has no {missing}", "rename it to KEY.EXT, or take it out of the tar"
            )
        if "." in ext and ext.rpartition(".")[2] in USED_EXTS:
            self.bad(
                member.header,
                f"member {name!r} has more than one dot: WebDataset takes {stem!r} for its key and {ext!r} for its "
                "extension, and so mixes samples up",
                f"rename it so that one dot is left: {'_'.join(base.split('.')[:-1])}.{base.split('.')[-1]}",
            )
        key = name[: len(name) - len(base) + len(stem)]
        group = self.group_of(key, ext, name, member)
        if ext in IMAGE_EXTS:
            if group.picture is not None:
                self.bad(
                    member.header,
                    f"key {key!r} has two pictures, {group.picture.ext} and {ext}",
                    "give each picture its own key",
                )
            group.picture = PictureMember(member.offset, member.size, ext)
        elif ext in AUDIO_EXTS:
            if group.sound is not None:
                self.bad(
                    member.header,
                    f"key {key!r} has two sounds, {group.sound.ext} and {ext}",
                    "give each sound its own key",
                )
            group.sound = SoundMember(member.offset, member.size, ext)
        elif ext in TEXT_EXTS:
            self.read_text(group, ext, member)
        else:
            self.ignored[ext] += 1

    def checked_name(self, member: _Member) -> str:
        name = member.name
        while name.startswith("./"):
            name = name[2:]
        if not _is_plain(name):
            self.bad(member.header, f"member name {name!a} is not plain UTF-8 text", "rename the member")
        if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
            self.bad(
                member.header, f"member name {name!r} is not a plain relative path", "write the tar with relative names"
            )
        return name

    def group_of(self, key: str, ext: str, name: str, member: _Member) -> _Group:
        """The group that a member joins: the current one, or a new one if its key was never seen."""
        group = self.group
        if group is None or group.key != key:
            self.close_group()
            if key in self.seen:
                began, exts = self.seen[key]
                if ext in exts:
                    self.duplicate(name, key, began, member)
                raise SplitKey(
                    f"{self.path}: key {key!r} is split: its members begin at byte {began}, and {name!r} follows at "
                    f"byte {member.header}, after other keys",
                    _TAR_AGAIN,
                )
            group = self.group = _Group(key, member.header)
        if ext in group.exts:
            self.duplicate(name, key, group.header, member)
        if len(group.exts) == MAX_MEMBERS_OF_A_KEY:
            self.bad(
                group.header,
                f"key {key!r} has more than {MAX_MEMBERS_OF_A_KEY:,} members",
                "give each sample its own key, or take what is not used out of the tar",
            )
        group.exts.add(ext)
        return group

    def duplicate(self, name: str, key: str, began: int, member: _Member) -> NoReturn:
        raise DuplicateKey(
            f"{self.path}: member {name!r} at byte {member.header} repeats one of key {key!r}, begun at byte {began}",
            "give each sample its own key, and each key one member of a kind",
        )

    def close_group(self) -> None:
        if self.group is None:
            return
        self.seen[self.group.key] = (self.group.header, tuple(self.group.exts))
        sample = self.group.sample()
        if sample is None:
            self.filtered += 1
        else:
            self.samples.append(sample)
        self.group = None

    def read_text(self, group: _Group, ext: str, member: _Member) -> None:
        """Take captions and label from a json, txt or cls member."""
        where = f"{ext} of key {group.key!r}"
        limit = MAX_JSON_BYTES if ext == "json" else MAX_TEXT_BYTES
        if member.size > limit:
            self.bad(member.header, f"the {where} has {member.size} bytes; at most {limit} are read", "shorten it")
        raw = self.stream.take(member.size)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.bad(member.header, f"the {where} is not UTF-8 (byte {error.start})", "write it as UTF-8")
        if ext == "txt":
            group.txt_captions = tuple(filter(None, [text.strip()]))
        elif ext == "cls":
            group.cls_label = text.strip() or None
        else:
            try:
                record = json.loads(text, object_pairs_hook=_object)
                if not isinstance(record, dict):
                    raise ValueError(f"it is {_kind(record)}, not an object")
                group.json_captions = _captions(record)
                group.json_label = _label(record)
                group.label_name = _label_name(record)
            except RecursionError:
                self.bad(member.header, f"the {where} cannot be used: it is nested too deeply", "write it flat")
            except ValueError as error:
                self.bad(
                    member.header,
                    f"the {where} cannot be used: {error}",
                    'write an object such as {"captions": ["...", "..."]} or {"caption": "..."}',
                )

    # The end

    def check_end(self) -> None:
        marker = self.stream.position - 2 * _BLOCK
        zero = self.stream.rest_is_zero()
        self.check_unchanged()
        if not zero:
            self.bad(
                marker,
                "data follows the end-of-archive marker",
                "two tars joined by cat? keep them as two files, or join them with tar --concatenate",
            )
        padding = self.stream.position - marker - 2 * _BLOCK
        if padding > MAX_PADDING_BYTES:
            self.bad(
                marker,
                f"{padding} bytes of zeros follow the end-of-archive marker, more than any tar program writes: "
                "a hole left by a crash or a broken copy",
                _COPY_AGAIN,
            )

    def check_unchanged(self) -> None:
        if self.stream.position != self.file_bytes:
            raise BadTar(
                f"{self.path} changed while it was read: {self.file_bytes} bytes, then {self.stream.position}",
                "wait until it is written, then try again",
            )

    def bad(self, offset: int, what: str, way_out: str) -> NoReturn:
        raise BadTar(f"{self.path}, byte {offset}: {what}", way_out)


def plain_header(block: bytes) -> tuple[str, int, bytes] | None:
    """Name, size and type of an ordinary ustar header of a file; None for any other, which tarfile then parses.

    Nearly all headers are of this kind, and tarfile's parser alone would take half the time of a scan.
    """
    size, checksum = block[124:136].rstrip(b" \0"), block[148:156].rstrip(b" \0")
    if block[156:157] != tarfile.REGTYPE or block[257:262] != b"ustar" or not (size.isdigit() and checksum.isdigit()):
        return None
    try:
        if int(checksum, 8) != sum(block) - sum(block[148:156]) + 8 * 32:
            return None
        name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
        whole = prefix + b"/" + name if prefix else name
        return whole.decode("utf-8", "surrogateescape"), int(size, 8), tarfile.REGTYPE
    except ValueError:  # the digits 8 and 9
        return None


def _whole_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _is_plain(name: str) -> bool:
    """Whether a name is not empty, encodes as UTF-8, and holds no control character or line break."""
    if name.isprintable():
        return bool(name)
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name)


# ---------------------------------------------------------------------------------------------------------------------
# What the JSON says. ValueErrors below are turned into BadTar by the scan.


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key in _READ_JSON_KEYS if counts[key] > 1)
        if twice:
            raise ValueError(f"{twice[0]!r} appears twice")
    return record


def _captions(record: Mapping[str, object]) -> tuple[str, ...]:
    """The captions under "captions", or else under "caption"; blank ones dropped. null counts as absent."""
    many = _strings(record, "captions")
    return many or _strings(record, "caption")


def _strings(record: Mapping[str, object], key: str) -> tuple[str, ...]:
    value = record.get(key)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if key == "captions" and not isinstance(value, list):
        raise ValueError(f"'captions' is {_kind(value)}, not a list of strings")
    texts = (_text(item, key) for item in values)
    return tuple(text for text in texts if text)


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key!r} holds {_kind(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key!r} holds half a surrogate pair, which is no text") from None
    return value.strip()


def _label(record: Mapping[str, object]) -> str | None:
    value = record.get("label")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value is None else _text(value, "label") or None


def _label_name(record: Mapping[str, object]) -> str | None:
    value = record.get("label_name")
    return None if value is None else _text(value, "label_name") or None


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return kinds.get(type(value), "a number")
