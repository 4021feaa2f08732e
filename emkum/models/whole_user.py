"""A user's own teacher: the function that builds it, as named on the command line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from emkum.errors import UnknownNetwork, UnsupportedNetwork, UsageError
from emkum.models import whole
from emkum.models.families.family import Supervision
from emkum.models.preprocessing import Preprocessing
from emkum.models.whole import Described, Run, UserTeacher, WholeNetwork

_NAMED = re.compile(r"(?P<folder>.*/)?(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")


def is_named(source: str) -> bool:
    """Whether `source` reads as module:function, or FOLDER/module:function."""
    return _NAMED.fullmatch(source) is not None and "://" not in source and not os.path.exists(source)


def anywhere(source: str) -> str:
    """The same function for a process with another current folder: FOLDER/module:function, absolute.

    A module that comes from PYTHONPATH or is installed stays as it is, and must be there too.
    """
    found = _NAMED.fullmatch(source)
    if found is None:
        return source
    folder = os.path.abspath(os.path.expanduser(found["folder"] or "."))
    first = Path(folder, *found["module"].split("."))
    here = first.with_suffix(".py").is_file() or (first / "__init__.py").is_file()
    return f"{folder}/{found['module']}:{found['function']}" if here or found["folder"] else source


def read_whole(source: str) -> tuple[WholeNetwork, UserTeacher, Preprocessing | None, str]:
    """The network that the function of `source` builds, what the function said, how pictures come, sha256 of its file.

    The function is looked for in FOLDER or the current folder, then on PYTHONPATH. Raises UnknownNetwork if it is not
    there, UsageError for what fails in it or is no UserTeacher.
    """
    found = _NAMED.fullmatch(source)
    assert found is not None
    name = f"{found['module']}:{found['function']}"
    function = _function(found["folder"] or "", found["module"], found["function"])
    try:
        teacher = function()
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:200]
        raise UsageError(f"{name} raised {type(error).__name__}: {said}", "correct the function") from error
    if not isinstance(teacher, UserTeacher) or not isinstance(teacher.module, nn.Module):
        raise UsageError(
            f"{name} returns {type(teacher).__name__}, not a UserTeacher with a torch module",
            "see emkum.models.whole.UserTeacher",
        )
    if teacher.supervision not in get_args(Supervision):
        raise UsageError(
            f"{name} says supervision={teacher.supervision!r}", f"choose one of {', '.join(get_args(Supervision))}"
        )
    sha256 = _source_sha256(function, name)
    text = teacher.modality == "text"
    described = Described(
        library="module",
        name=name,
        config={"source_sha256": sha256},
        module=teacher.module,
        run=_run_texts(teacher.run) if text else _run_pictures(teacher.run),
        num_prefix=teacher.num_prefix,
        max_tokens=teacher.max_tokens,
        labels=teacher.labels,
    )
    if not text:
        preprocessing = Preprocessing(teacher.image_size, teacher.mean, teacher.std)
        return whole.of_pictures(described, preprocessing), teacher, preprocessing, sha256
    if teacher.tokenizer is None or teacher.max_tokens < 16:
        raise UsageError(
            f"{name} reads texts, and has "
            + ("no tokenizer" if teacher.tokenizer is None else f"max_tokens={teacher.max_tokens}"),
            "give tokenizer=Path('tokenizer.json').read_bytes() and max_tokens of 16 or more",
        )
    return whole.of_texts(described, teacher.max_tokens), teacher, None, sha256


def _function(folder: str, module: str, function: str) -> Callable[[], Any]:
    """Imports as `python -m` would: the folder first. It stays on the path, last, for what the module imports later."""
    place = os.path.abspath(os.path.expanduser(folder or "."))
    sys.path.insert(0, place)
    try:
        importlib.invalidate_caches()
        _forget_other(module, place)
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise UnknownNetwork(
                f"there is no module {module} in {place} or on PYTHONPATH",
                f"run the command where it lies, or name its folder: FOLDER/{module}:{function}",
            ) from error
        raise UsageError(f"{module} imports {error.name}, which is not installed", "install it") from error
    except Exception as error:
        raise UsageError(f"{module} cannot be imported: {type(error).__name__}: {error}", "correct it") from error
    finally:
        sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)
    found = getattr(imported, function, None)
    if not callable(found):
        known = [n for n, value in vars(imported).items() if inspect.isfunction(value) and value.__module__ == module]
        raise UnknownNetwork(
            f"{module} ({imported.__file__}) has no function {function}", f"it has {', '.join(known) or 'none'}"
        )
    return found  # type: ignore[no-any-return]


def _forget_other(module: str, place: str) -> None:
    """Of two modules with one name in different folders, the one that is named now is imported."""
    loaded = sys.modules.get(module)
    spec = importlib.util.find_spec(module) if loaded is None else None
    origin = getattr(loaded, "__file__", None) or getattr(spec, "origin", None)
    first = Path(place, *module.split("."))
    for wanted in (first.with_suffix(".py"), first / "__init__.py"):
        if loaded is not None and wanted.is_file() and origin and not os.path.samefile(origin, wanted):
            del sys.modules[module]


def _source_sha256(function: Callable[..., Any], name: str) -> str:
    """Of the file that the function stands in."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        path = None
    if path is None or not os.path.isfile(path):
        raise UnsupportedNetwork(
            f"{name} has no source file, so two of its versions could not be told apart", "write it as a def in a file"
        )
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _run_pictures(run: Callable[..., Any]) -> Run:
    def of_pictures(module: nn.Module, inputs: Tensor, mask_BL: Tensor | None, wanted: Collection[str]) -> Any:
        return run(module, inputs)

    return of_pictures


def _run_texts(run: Callable[..., Any]) -> Run:
    def of_texts(module: nn.Module, inputs: Tensor, mask_BL: Tensor | None, wanted: Collection[str]) -> Any:
        return run(module, inputs, mask_BL)

    return of_texts
