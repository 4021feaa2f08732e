"""Dask's loggers, silent while it works for us: what concerns a user is raised or said."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def silent_dask() -> Iterator[None]:
    """Nothing short of critical from distributed and asyncio."""
    import distributed  # noqa: F401  (it makes the loggers)

    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in ("distributed", "asyncio")]
    before = {name: logging.getLogger(name).level for name in [*names, "asyncio"]}
    for name in before:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
