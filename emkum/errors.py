"""Every failure a user can cause or meet, by name, with its exit code.

Codes: 2 usage or configuration; 3 input data beyond tolerance; 4 corrupt cache; 5 identity mismatch;
6 another writer; 7 storage or credentials; 75 interrupted, the same command continues. 1 is our own bug, or workers
that died and died again, or a rank that died.
"""

from __future__ import annotations


class EmkumError(Exception):
    """Base of all user-facing failures. `str()` is what is wrong; `way_out` is what to do next."""

    exit_code = 1

    def __init__(self, what: str, way_out: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.way_out = way_out

    def line(self) -> str:
        """The one line shown to the user: the class, what is wrong, the way out."""
        text = f"{type(self).__name__}: {self.what}"
        return " ".join((f"{text} | {self.way_out}" if self.way_out else text).split())


class UsageError(EmkumError):
    """A flag, a recipe or a combination of them that cannot work."""

    exit_code = 2


class NoData(UsageError):
    """No source tar was found where the user pointed."""


class UnknownNetwork(UsageError):
    """A teacher or encoder name that is neither in the catalogue, nor a hub id, nor a folder."""


class UnsupportedNetwork(UsageError):
    """Weights of a family or shape we do not read, or that lack what was asked of them."""


class WeightsUnavailable(UsageError):
    """Weights that would have to be fetched, and cannot be from here."""


class MissingPackage(UsageError):
    """A part of emkum that needs a package which is not installed, or does not work here."""


class RefusedTeacher(UsageError):
    """A network that learned from what --label-free or --text-free excludes."""


class NotACache(UsageError):
    """A folder that holds no emkum cache."""


class NewerFormat(UsageError):
    """A cache written by a newer emkum."""


class MissingField(UsageError):
    """A recipe or command needs a field the cache does not hold."""


class IncompleteCache(UsageError):
    """A field lacks blocks that the command needs."""


class MissingStatistic(UsageError):
    """A statistic of a field that training needs, and nobody has computed."""


class MissingCaptions(UsageError):
    """Captions are needed and the data or cache has none."""


class UnknownRecipe(UsageError):
    """A recipe name that is not shipped and not a file, or a key no recipe has."""


class UnknownAblation(UsageError):
    """An ablation's name that is not shipped and not a file, or a key no ablation has."""


class RunsFailed(UsageError):
    """Runs of an ablation that failed; the others went on. Its exit code is that of the first of them."""


class NothingFits(UsageError):
    """An earlier run that a student was to start from, and no part of which is like this student's."""


class WorkersDiffer(UsageError):
    """Workers of a Dask cluster that have another emkum than this command, or none."""


class NotARun(UsageError):
    """A folder that holds no training run, or one without what is asked."""


class InputDataError(EmkumError):
    """Source data that cannot be used as it is."""

    exit_code = 3


class BadTar(InputDataError):
    """A tar that breaks a rule of docs/data.md: truncated, mis-grouped, duplicate, unsafe names."""


class TruncatedTar(BadTar):
    """A tar that ends before its end-of-archive marker."""


class SplitKey(BadTar):
    """Members of one key that do not lie side by side."""


class DuplicateKey(BadTar):
    """A key or member that appears twice in one tar."""


class BadPicture(InputDataError):
    """A picture that cannot be decoded. Quarantined by the caller, row by row."""


class BadSound(InputDataError):
    """A sound that cannot be decoded. Quarantined by the caller, row by row."""


class TooManyBadSamples(InputDataError):
    """More samples were quarantined than --max-bad allows."""


class NonFiniteFeature(InputDataError):
    """A network gave inf, NaN, or a value its storage type cannot hold."""


class CorruptCache(EmkumError):
    """A committed object is missing, has another length, or fails its checksum."""

    exit_code = 4


class IdentityMismatch(EmkumError):
    """What the cache holds was made with other settings, weights or data than this command asks for."""

    exit_code = 5


class FingerprintMismatch(IdentityMismatch):
    """A field of the same name was computed differently."""


class StaleStatistic(IdentityMismatch):
    """A statistic of a field that has grown or changed since."""


class SourceChanged(IdentityMismatch):
    """A source tar known to the cache has other contents now."""


class WeightsChanged(IdentityMismatch):
    """A file of weights whose digest is not the one recorded, or asked for."""


class ResumeMismatch(IdentityMismatch):
    """A checkpoint that belongs to another recipe, cache or seed."""


class AblationMismatch(IdentityMismatch):
    """A run folder of an ablation that holds a run of another recipe, seed, or state of the cache."""


class AnotherWriter(EmkumError):
    """Another process is writing to this cache."""

    exit_code = 6


class ClaimLost(AnotherWriter):
    """Another process took over what this one was about to commit, because it gave no heartbeat."""


class SchedulerUnreachable(EmkumError):
    """No Dask scheduler answers at the address given, or it went away."""

    exit_code = 7


class WorkersLost(EmkumError):
    """The processes that shared the work died and none came back, or one block kills every process that takes it."""

    exit_code = 1


class RankLost(EmkumError):
    """One of the processes that train together died, and the others were stopped."""

    exit_code = 1


class OutOfMemory(UsageError):
    """What was asked for does not fit into the memory of the GPU or of the machine."""


class StorageFailure(EmkumError):
    """The disk is full, a quota or permission stops a write, or storage cannot be reached."""

    exit_code = 7


class Interrupted(BaseException):
    """SIGINT or SIGTERM. What was committed stays; the same command continues.

    No Exception: whoever retries, or turns a failure into another, must let it pass.
    """

    exit_code = 75

    def __init__(self, what: str, way_out: str = "the same command continues") -> None:
        super().__init__(what)
        self.what = what
        self.way_out = way_out

    def line(self) -> str:
        """As EmkumError.line."""
        return f"{type(self).__name__}: {self.what} | {self.way_out}"
