"""Where weights lie: files of the Hugging Face hub, of a release URL, or of an installed package, fetched once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.errors import StorageFailure, UnknownNetwork, WeightsChanged, WeightsUnavailable

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

TIMEOUT_SECONDS = 5.0  # for the first answer; a machine without a network is told so at once
ATTEMPTS = 5  # of one download that breaks off; each must bring it further
WEIGHTS_DIR = "EMKUM_WEIGHTS"

_CONFIG = ("config.json", "preprocessor_config.json", "processor_config.json")
_TOKENIZER = ("tokenizer.json",)
_OLD_TOKENIZER = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENOTDIR)


@dataclass(frozen=True)
class Fetched:
    """A folder or file on this machine, and the commit, sha256 or version it has."""

    path: Path
    revision: str


def from_hub(repo: str, offline: bool = False) -> Fetched:
    """The files of a hub repository ("owner/name" or "owner/name@revision") that a network is read from.

    The revision is resolved to a commit. Without a network, or with `offline` or HF_HUB_OFFLINE, what an earlier run
    fetched is used. Raises WeightsUnavailable if that is not whole, UnknownNetwork if the hub has no such repository.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    repo, _, revision = repo.partition("@")
    if offline or constants.HF_HUB_OFFLINE:
        return _from_hub_cache(repo, revision, "working offline")
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision or None, timeout=TIMEOUT_SECONDS)
    except errors.GatedRepoError as error:
        raise WeightsUnavailable(
            f"{repo} asks for its terms to be accepted", f"accept them at https://huggingface.co/{repo} and log in"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UnknownNetwork(
            f"the hub has no {repo}{'@' + revision if revision else ''}, or it is private", "check the name, or log in"
        ) from error
    except Exception as error:  # whichever HTTP library is below, its errors have no common base
        return _from_hub_cache(repo, revision, f"the hub cannot be reached ({_first_line(error)})")
    try:
        folder = _download(repo, str(info.sha), wanted_files(_names(info)))
    except Exception as error:
        raise WeightsUnavailable(
            f"{repo}: the download broke off ({_first_line(error)})", "run the same command again, it continues"
        ) from error
    return Fetched(folder, str(info.sha))


def wanted_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files: configuration, one form of the weights (all its shards), one of the tokenizer."""
    present = set(names)
    chosen = [name for name in _CONFIG if name in present]
    chosen += [name for name in _TOKENIZER if name in present] or [n for n in _OLD_TOKENIZER if n in present]
    for weights in _WEIGHTS:
        if weights in present:
            chosen.append(weights)
            if weights.endswith(".index.json"):
                stem, suffix = weights.removesuffix(".index.json").split(".")
                chosen += sorted(n for n in present if n.startswith(f"{stem}-") and n.endswith(f".{suffix}"))
            break
    return chosen


def _names(info: ModelInfo) -> list[str]:
    return [sibling.rfilename for sibling in info.siblings or ()]


def _download(repo: str, commit: str, names: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download

    paths = [hf_hub_download(repo, name, revision=commit, etag_timeout=TIMEOUT_SECONDS) for name in names]
    return Path(paths[0]).parent


def _from_hub_cache(repo: str, revision: str, why: str) -> Fetched:
    """What an earlier run fetched of `repo`, without asking the network."""
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision or None)
    if isinstance(config, str):
        folder = Path(config).parent
        if any((folder / weights).is_file() for weights in _WEIGHTS):
            return Fetched(folder, folder.name)
    raise WeightsUnavailable(
        f"{repo}: {why}, and no copy of config.json and {_WEIGHTS[0]} lies in {constants.HF_HUB_CACHE}",
        f"where there is a network: hf download {repo.split('@')[0]} --local-dir FOLDER; then name FOLDER, "
        "such as --teacher FOLDER",
    )


def weights_dir() -> Path:
    """Where files fetched by URL are kept: $EMKUM_WEIGHTS, else emkum/weights in the user's cache."""
    if chosen := os.environ.get(WEIGHTS_DIR):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "emkum" / "weights"


def folder_of(url: str) -> str:
    """The folder in `weights_dir()` of a file behind `url`: its host and path, so that equal names do not meet."""
    parts = urllib.parse.urlsplit(url)
    steps = [re.sub(r"[^A-Za-z0-9._-]", "_", step) for step in (parts.netloc, *parts.path.split("/")[1:-1])]
    folders = [step for step in steps if step.strip(".")]
    return "/".join([*folders, hashlib.sha256(parts.query.encode()).hexdigest()[:12]] if parts.query else folders)


def place_of(url: str, folder: str) -> Path:
    """Where the file behind `url` lies once it is fetched."""
    return weights_dir() / folder / urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])


def from_url(url: str, offline: bool = False, folder: str = "", sha256: str = "", tower: str | None = "") -> Fetched:
    """The file behind `url`, fetched once into `weights_dir()` with its sha256 recorded in <file>.json beside it.

    folder: one of its own there, for files whose names say nothing of the network. sha256: that it must have; "" for
    whatever it had when it was first fetched. tower: what stands behind the file where it is named as a teacher, such
    as "#text"; None: it is none, but lies beside one. A download that broke off goes on where it stopped.
    Raises WeightsUnavailable if it is not there and cannot be fetched, WeightsChanged if it is another file,
    StorageFailure if the disk refuses it.
    """
    path = place_of(url, folder)
    record = path.with_name(path.name + ".json")
    recorded = _read_record(record)
    way_out = f"put the file at {path}"
    if tower is not None:
        way_out += f", or name it or its folder, such as --teacher {path.name}{tower}"
    if not path.is_file():
        if offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
            raise WeightsUnavailable(f"{path.name} from {url}: working offline, and it is not at {path}", way_out)
        try:
            _fetch(url, path)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise _refused_by_disk(path, error) from error
            raise WeightsUnavailable(f"{path.name} from {url}: {_first_line(error)}", way_out) from error
    found = recorded.sha256 if recorded.fits(path) else _sha256(path)
    if sha256 and found != sha256:
        raise WeightsChanged(
            f"{path} from {url} has sha256 {found}; {sha256} was asked for",
            f"delete {path} and {record.name} to fetch it again; or name the file itself, such as --teacher "
            f"{path}{tower or ''}",
        )
    if recorded.sha256 and found != recorded.sha256 and found != sha256:
        raise WeightsChanged(
            f"{path} from {url} has sha256 {found}; when it was fetched first it had {recorded.sha256}",
            f"restore it; or, if the new file is meant, delete {record}",
        )
    if not recorded.fits(path) or recorded.sha256 != found:
        _write_record(record, url, path, found)
    return Fetched(path, found)


@dataclass(frozen=True)
class _Record:
    """Of a file fetched before. Its times are kept so that it is not read again to see that it is the same."""

    sha256: str = ""
    bytes: int = -1
    mtime_ns: int = -1

    def fits(self, path: Path) -> bool:
        status = path.stat()
        return (self.bytes, self.mtime_ns) == (status.st_size, status.st_mtime_ns)


def _read_record(record: Path) -> _Record:
    try:
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return _Record(str(found["sha256"]), int(found["bytes"]), int(found.get("mtime_ns", -1)))
    except (OSError, ValueError, KeyError, TypeError):  # no record, or one torn by a crash
        return _Record()


def _write_record(record: Path, url: str, path: Path, sha256: str) -> None:
    status = path.stat()
    content = {"url": url, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256}
    unfinished = record.with_name(f"{record.name}.{uuid.uuid4().hex}.tmp")
    try:
        unfinished.write_text(json.dumps(content, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(unfinished, record)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise _refused_by_disk(path, error) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url: str, path: Path) -> None:
    """Downloads into .<file>.part, goes on with what lies there, and renames when whole.

    Of several processes that want the file one fetches it and the others wait for it.
    """
    part, state = (path.with_name(f".{path.name}.{suffix}") for suffix in ("part", "part.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _opened_alone(part)
    try:
        if path.is_file():
            return
        for _ in range(ATTEMPTS):
            had = os.fstat(descriptor).st_size
            try:
                _receive(url, descriptor, path, state)
                break
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in _DISK or os.fstat(descriptor).st_size <= had:
                    raise
                last = error
        else:
            raise OSError(f"it broke off {ATTEMPTS} times ({_first_line(last)}); the same command goes on")
        os.fsync(descriptor)
        os.replace(part, path)
        state.unlink(missing_ok=True)
    finally:
        if os.fstat(descriptor).st_size == 0:
            part.unlink(missing_ok=True)
            state.unlink(missing_ok=True)
        os.close(descriptor)


def _opened_alone(part: Path) -> int:
    """A descriptor of the part that no other process writes to, waited for."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(part), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # whom we waited for renamed or removed it


def _receive(url: str, descriptor: int, path: Path, state: Path) -> None:
    """One answer, appended to what is there if the server says that it is the same file still."""
    from tqdm import tqdm

    have, validator = os.fstat(descriptor).st_size, _validator(state, url)
    headers = {"User-Agent": "emkum"}
    if have and validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    with _opened(urllib.request.Request(url, headers=headers), descriptor) as answer:
        if "text/html" in (answer.headers.get("Content-Type") or ""):
            raise OSError("a web page answers instead of a file")
        if not (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            os.ftruncate(descriptor, have := 0)
        expected = int(answer.headers.get("Content-Length") or 0)
        free = shutil.disk_usage(path.parent).free
        if expected > free:
            raise OSError(errno.ENOSPC, f"{expected:,} bytes are to come, {free:,} are free")
        _note_validator(state, url, answer.headers)
        total = have + expected if expected else None
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=path.name) as bar:
            while received := answer.read(1 << 20):
                _write_all(descriptor, received)
                bar.update(len(received))
        size = os.fstat(descriptor).st_size
        if total is not None and size != total:
            raise OSError(f"{size:,} of {total:,} bytes arrived")


def _opened(request: urllib.request.Request, descriptor: int) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        os.ftruncate(descriptor, 0)  # more lies here than the file has: it was another one
        plain = urllib.request.Request(request.full_url, headers={"User-Agent": "emkum"})
        return urllib.request.urlopen(plain, timeout=TIMEOUT_SECONDS)


def _validator(state: Path, url: str) -> str:
    """What tells the server which file the part is of; "" where nothing does, so that it is fetched from its start."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(state.read_text(encoding="utf-8"))
        return str(found["validator"]) if found["url"] == url else ""
    return ""


def _note_validator(state: Path, url: str, headers: Any) -> None:
    etag = headers.get("ETag") or ""
    validator = headers.get("Last-Modified") or "" if not etag or etag.startswith("W/") else etag
    state.write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _refused_by_disk(path: Path, error: OSError) -> StorageFailure:
    return StorageFailure(
        f"{path.name} cannot be kept in {path.parent}: {_first_line(error)}",
        f"free space there, or choose another place with {WEIGHTS_DIR}=FOLDER; the same command goes on",
    )


def from_package(requirement: str, module: str, inside: str) -> Fetched | None:
    """A file or folder inside an installed package, which is not imported; None if it is not installed.

    requirement: "name==version" as pip is told. `inside`: the path within the package's folder.
    """
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / inside
        if path.exists():
            return Fetched(path, _installed_version(requirement.partition("==")[0]))
    return None


def _installed_version(distribution: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _first_line(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, OSError) and error.errno in _DISK:
        return error.strerror or str(error)
    text = str(getattr(error, "reason", error)).strip() or type(error).__name__
    return text.splitlines()[0][:200]
