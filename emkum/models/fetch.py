"""Where weights lie: files of the Hugging Face hub, of a release URL, or of an installed package, fetched once."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.errors import UnknownNetwork, WeightsUnavailable

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

TIMEOUT_SECONDS = 5.0  # for the first answer; a machine without a network is told so at once
WEIGHTS_DIR = "EMKUM_WEIGHTS"

_CONFIG = ("config.json", "preprocessor_config.json")
_TOKENIZER = ("tokenizer.json",)
_OLD_TOKENIZER = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


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


def from_url(url: str, offline: bool = False, folder: str = "") -> Fetched:
    """The file behind `url`, fetched once into `weights_dir()` with its sha256 recorded in <file>.json beside it.

    folder: one of its own there, for files whose names say nothing of the network.
    Raises WeightsUnavailable if it is not there and cannot be fetched.
    """
    path = weights_dir() / folder / url.rsplit("/", 1)[1]
    record = path.with_name(path.name + ".json")
    if path.is_file():
        return Fetched(path, _recorded_sha256(path, record, url))
    way_out = f"put the file at {path}, or name it or its folder, such as --teacher {path.name}"
    if offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        raise WeightsUnavailable(f"{path.name} from {url}: working offline, and it is not at {path}", way_out)
    try:
        sha256 = _fetch(url, path)
    except (OSError, urllib.error.URLError) as error:
        raise WeightsUnavailable(f"{path.name} from {url}: {_first_line(error)}", way_out) from error
    _write_record(record, url, path, sha256)
    return Fetched(path, sha256)


def _fetch(url: str, path: Path) -> str:
    """Downloads under a temporary name, renames when whole. Returns the sha256."""
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
        expected = int(answer.headers.get("Content-Length") or 0)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with (
                os.fdopen(descriptor, "wb") as file,
                tqdm(total=expected or None, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while part := answer.read(1 << 20):
                    file.write(part)
                    digest.update(part)
                    bar.update(len(part))
                file.flush()
                os.fsync(file.fileno())
            received = os.path.getsize(unfinished)
            if expected and received != expected:
                raise OSError(f"{received} of {expected} bytes arrived")
            os.replace(unfinished, path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
    return digest.hexdigest()


def _recorded_sha256(path: Path, record: Path, url: str) -> str:
    """The sha256 of a file fetched before, or put there by hand: then it is computed and recorded now."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no record, or one torn by a crash
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if found["bytes"] == path.stat().st_size:
            return str(found["sha256"])
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    _write_record(record, url, path, sha256)
    return sha256


def _write_record(record: Path, url: str, path: Path, sha256: str) -> None:
    content = json.dumps({"url": url, "bytes": path.stat().st_size, "sha256": sha256}, sort_keys=True)
    unfinished = record.with_name(record.name + ".tmp")
    unfinished.write_text(content + "\n", encoding="utf-8")
    os.replace(unfinished, record)


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
    text = str(getattr(error, "reason", error)).strip() or type(error).__name__
    return text.splitlines()[0][:200]
