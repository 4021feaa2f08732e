"""The house rules: who may import whom, what importing must not do, and what the door says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import emkum
from emkum import errors

PACKAGE = Path(emkum.__file__).parent
# room -> rooms it may import; the door (cli, demo) may import all, and nobody imports the door
ALLOWED = {
    "errors": set(),
    "stopping": {"errors"},
    "shards": {"errors", "shards"},
    "models": {"errors", "models"},
    "stage1_extract": {"errors", "shards", "models", "stage1_extract"},
    "stage2_train": {"errors", "shards", "models", "stage2_train"},
}
DOOR = {"cli", "commands", "demo"}


def _modules() -> list[tuple[Path, str]]:
    return [(path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")) for path in sorted(PACKAGE.rglob("*.py"))]


def _imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            if node.module == "emkum":
                found |= {f"emkum.{alias.name}" for alias in node.names}
    return found


def test_rooms_import_only_what_they_may() -> None:
    wrong = []
    for path, room in _modules():
        if room in DOOR or room == "__init__":
            continue
        assert room in ALLOWED, f"{path} is in no known room"
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "emkum" and len(parts) > 1 and parts[1] not in ALLOWED[room]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_shards_never_imports_torch_at_import_time() -> None:
    for path, room in _modules():
        if room == "shards":
            assert not [n for n in _imports(path) if n.split(".")[0] in ("torch", "lightning", "transformers")], path
            top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {a.name for n in top for a in n.names} | {n.module for n in top if isinstance(n, ast.ImportFrom)}
            assert not [n for n in names if n and n.startswith("webdataset")], f"{path}: webdataset pulls torch in"


def test_no_code_is_executed_from_data() -> None:
    for path, _ in _modules():
        text = path.read_text()
        assert not _imports(path) & {"dill", "joblib", "marshal"}, path
        uses = set(re.findall(r"pickle\.(\w+)", text))
        assert uses <= {"UnpicklingError"}, path  # the error that torch.load(weights_only=True) raises
        assert "weights_only=False" not in text, path
        assert "trust_remote_code=True" not in text, path


@pytest.mark.parametrize("statement", ["import emkum", "import emkum.cli"])
def test_importing_emkum_loads_nothing_heavy(statement: str) -> None:
    code = f"{statement}; import sys; print([m for m in ('torch', 'zarr', 'pyarrow', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_shards_room_does_not_load_torch() -> None:
    code = "import emkum.shards.reader, emkum.shards.writer, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_help_names_the_commands_and_loads_no_torch() -> None:
    code = "import sys, emkum.cli\nassert emkum.cli.run(['--help']) == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("extract", "train", "evaluate", "demo", "cache", "teachers"):
        assert command in done.stdout


def test_every_error_has_the_exit_code_of_its_kind() -> None:
    codes = {0, 1, 2, 3, 4, 5, 6, 7, 75}
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.EmkumError)]
    assert len(kinds) > 20
    for kind in kinds:
        assert kind.exit_code in codes
        assert kind.__doc__
        assert kind in (errors.EmkumError, errors.WorkersLost, errors.RankLost) or kind.exit_code != 1
        line = kind("the cache is in Rome, this run asks for Oslo", "travel").line()
        assert line == f"{kind.__name__}: the cache is in Rome, this run asks for Oslo | travel"
        assert "\n" not in line


def test_no_file_is_a_drawer() -> None:
    assert not [p for p, _ in _modules() if p.stem in ("utils", "common", "helpers", "misc")]


def test_every_module_says_what_it_is_for() -> None:
    for path, _ in _modules():
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, path
        assert docstring.splitlines()[0].endswith((".", ":", ")", "?")), path
