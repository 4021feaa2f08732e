"""A dask.distributed scheduler as the engine of a pass: its workers read the cache themselves."""

from __future__ import annotations

import contextlib
import pkgutil
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import emkum
from emkum.errors import EmkumError, SchedulerUnreachable, UsageError, WorkersDiffer, WorkersLost
from emkum.shards.dask_logs import silent_dask
from emkum.shards.store import is_url

CONNECT_SECONDS = 10.0
COMEBACK_SECONDS = 60.0  # for a first worker to come
CLOSE_SECONDS = 6.0


class Cluster:
    """The workers of a scheduler. Made by `connected`."""

    def __init__(self, client: Any, address: str) -> None:
        self._client, self._address = client, address
        threads = self._client.nthreads()
        self.workers = sum(threads.values())
        self._machines = len(threads)

    def share(self, value: np.ndarray) -> Any:
        return self._client.scatter(value, broadcast=True, hash=False)

    def run(self, tasks: Sequence[Any]) -> Sequence[Any]:
        """Raises what a task raised; WorkersLost if workers died with it in their hands; SchedulerUnreachable."""
        from distributed import CancelledError
        from distributed.scheduler import KilledWorker

        futures = self._client.compute(list(tasks), retries=0)
        try:
            found: Sequence[Any] = self._client.gather(futures)
        except KilledWorker as error:
            raise WorkersLost(
                f"several workers of {self._address} died with the same piece in their hands; nothing was kept",
                "is there memory for them? See docs/statistics.md for what a task needs; the same command begins anew",
            ) from error
        except (CancelledError, OSError) as error:
            if isinstance(error, EmkumError):
                raise
            raise SchedulerUnreachable(
                f"the scheduler at {self._address} went away ({type(error).__name__}); nothing was kept",
                "start it and its workers again; the same command begins anew",
            ) from None
        finally:
            for future in futures:
                future.release()
        return found

    def __str__(self) -> str:
        return f"{self._machines} workers of {self._address}, {self.workers} threads"


@contextlib.contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """An engine of the scheduler's workers, at least one of which must come within a minute.

    Raises UsageError for no address, SchedulerUnreachable, WorkersLost, WorkersDiffer.
    """
    if not is_url(address):
        raise UsageError(
            f"--scheduler {address} cannot work", "give the address that `dask scheduler` prints, as tcp://host:8786"
        )
    import distributed

    dask_client: Any = distributed.Client
    with silent_dask(), contextlib.ExitStack() as held:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # versions of other packages; emkum's is compared below
                client = dask_client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise SchedulerUnreachable(
                f"no Dask scheduler answers at {address}: {' '.join(str(error).split())}",
                "start one with `dask scheduler`, and workers with `dask worker tcp://host:8786`; or leave --scheduler "
                "out: threads of this process then do the work",
            ) from None
        held.callback(_close, client)
        try:
            client.wait_for_workers(1, timeout=COMEBACK_SECONDS)
        except TimeoutError:
            raise WorkersLost(
                f"no worker came within {COMEBACK_SECONDS:.0f} s to {address}",
                f"start some: dask worker {address}",
            ) from None
        _require_same_emkum(client)
        yield Cluster(client, address)


def _require_same_emkum(client: Any) -> None:
    found = client.run(pkgutil.resolve_name, "emkum:__version__", on_error="return")
    for worker, version in found.items():
        if version != emkum.__version__:
            raise WorkersDiffer(
                f"the worker at {worker} has "
                + (f"emkum {version}" if isinstance(version, str) else f"no emkum ({version})")
                + f", this command is emkum {emkum.__version__}",
                f"install the same there: pip install emkum=={emkum.__version__}",
            )


def _close(client: Any) -> None:
    with contextlib.suppress(Exception):  # what is lost need not be closed
        client.close(timeout=CLOSE_SECONDS)
