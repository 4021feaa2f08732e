"""Classes of pictures: a linear layer on the mean of the patches, on frozen features or with the student trained too.

Legend: B batch, C classes, D width, N pictures, T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from emkum.errors import BadPicture, InputDataError, TooManyBadSamples, UsageError
from emkum.models.network import load_saved, normalise
from emkum.shards.durable import write_file
from emkum.shards.reader import Cache
from emkum.shards.shard_files import cores
from emkum.stage2_train.evaluate.contestants import Contestants
from emkum.stage2_train.evaluate.encode import Settings, encode_pictures
from emkum.stage2_train.evaluate.pictures import LabelledPictures, Pictures, labelled_sets
from emkum.stage2_train.finetune.augment import Augment, smoothed
from emkum.stage2_train.finetune.folder import FinetuneConfig, FinetuneFolder
from emkum.stage2_train.finetune.loop import Batch, Job, Say, Scores, run_job
from emkum.stage2_train.finetune.metrics import top
from emkum.stage2_train.finetune.results import over_seeds
from emkum.stage2_train.finetune.settings import ClassifySettings
from emkum.stage2_train.finetune.trunks import Classifier, FrozenPrefix, NetworkTrunk, StudentTrunk, Trunk
from emkum.stage2_train.losses import autocast
from emkum.stage2_train.run_folder import LoadedRun

KS = (1, 5)
KEEP_SECONDS = 20.0  # between checkpoints of a head alone, whose epochs take milliseconds


@dataclass(frozen=True)
class Classes:
    """The classes of the training pictures, counted from 0; of the test pictures too, -1 for one that is not there."""

    num: int
    train_N: np.ndarray
    test_M: np.ndarray

    @classmethod
    def of(cls, pictures: LabelledPictures) -> Classes:
        """Raises InputDataError where there is nothing to tell apart."""
        names, train_N = np.unique(pictures.bank.labels, return_inverse=True)
        if len(names) < 2:
            raise InputDataError(
                f"the training pictures of {pictures.source} are all of one class", "give pictures of two or more"
            )
        place = np.minimum(np.searchsorted(names, pictures.queries.labels), len(names) - 1)
        test_M = np.where(names[place] == pictures.queries.labels, place, -1)
        return cls(len(names), train_N.astype(np.int64), test_M.astype(np.int64))


class PictureTask:
    """A set of labelled pictures, and the networks that are to tell its classes apart."""

    def __init__(
        self, config: FinetuneConfig, run: LoadedRun, cache: Cache, compute: str, identity: dict[str, Any]
    ) -> None:
        """Raises UsageError for a run without pictures, a size that patches do not fill, or other than one set."""
        assert isinstance(config.settings, ClassifySettings)
        if run.student.spec.image is None:
            raise UsageError(f"{run.dir} trained on {run.recipe.kind} only", "use --task glue, or a run with pictures")
        self.config, self.compute = config, compute
        self.settings = config.settings.unaugmented() if config.linear else config.settings
        self.pictures = _one_set(config.data)
        self.classes = Classes.of(self.pictures)
        self.asked = Settings(config.device, config.batch_size, config.threads, config.max_bad, config.baselines)
        contestants = Contestants(run, cache, self.asked)
        self.device = contestants.device
        self.size = contestants.crop_size if config.size is None else config.size
        contestants.check_size(self.size)
        self.trunks: dict[str, Trunk] = {
            name: StudentTrunk(student, "image") for name, student in contestants.students.items()
        }
        side, pixels = run.student.spec.image, run.student.spec.pixels
        self.prefix: Callable[[Tensor], Tensor]
        if pixels is not None:  # nothing frozen is in front
            self.preprocessing, self.prefix = pixels.preprocessing, lambda images_BCHW: images_BCHW.to(self.device)
        else:
            network = load_saved(cache.model_dir(side.encoder))
            assert network.preprocessing is not None
            self.preprocessing = network.preprocessing
            self.prefix = FrozenPrefix(network, side.cut, contestants.compute, self.device)
            if config.baselines:
                whole = NetworkTrunk(network, side.cut, "patches").to(self.device)
                self.trunks[contestants.frozen_name(network)] = whole
        self.bad: dict[str, str] = {}
        self.identity = identity | {
            "settings": dataclasses.asdict(self.settings),
            "linear": config.linear,
            "size": self.size,
            "pictures": _digest(self.pictures, config.data),
        }

    def run(self, folder: FinetuneFolder, say: Say) -> dict[str, Any]:
        """Every model from every seed; what results.json says of them."""
        pictures, classes = self.pictures, self.classes
        unseen = int((classes.test_M < 0).sum())
        say(
            f"{pictures.name}: {len(classes.train_N):,} pictures of {classes.num} classes to learn from, "
            f"{len(classes.test_M):,} to measure on, at {self.size} px"
            + (f"; {unseen} of a class that is not learned count as wrong" if unseen else "")
        )
        job = self._linear_jobs(folder, say) if self.config.linear else self._full_job(folder)
        scores = {}
        for name in self.trunks:
            scores[name] = over_seeds({seed: run_job(job(name, seed), say) for seed in self.config.seeds})
        how = "linear layer on frozen features" if self.config.linear else "fine-tuned"
        counts = np.bincount(classes.train_N, minlength=classes.num)
        return {
            "on": f"classes of {pictures.name} at {self.size} px, {how}",
            "source": pictures.source,
            "train": len(classes.train_N),
            "test": len(classes.test_M),
            "classes": classes.num,
            "scores": scores,
            "most frequent": {"top-1": 100.0 * float(np.mean(classes.test_M == counts.argmax()))},
            "trained": {name: self._num_trained(name) for name in self.trunks},
            "quarantined": [f"{name}: {why}" for name, why in sorted(self.bad.items())],
        }

    def _num_trained(self, name: str) -> int:
        trunk = None if self.config.linear else self.trunks[name]
        model = Classifier(trunk, self.trunks[name].width, self.classes.num, norm=True, seed=0)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def _job(
        self,
        folder: FinetuneFolder,
        name: str,
        seed: int,
        trunk: Trunk | None,
        num: int,
        batches: Callable[[int, int, int], Iterator[Batch]],
        score: Callable[[nn.Module], Scores],
    ) -> Job:
        """batches: of seed, epoch and batch size. num: pictures to learn from."""
        batch = min(self.settings.batch, num)
        return Job(
            name=f"{name}, seed {seed}",
            dir=folder.job(name, seed),
            model=Classifier(trunk, self.trunks[name].width, self.classes.num, norm=True, seed=seed),
            schedule=self.settings,
            steps=num // batch,
            batches=lambda epoch: batches(seed, epoch, batch),
            loss=F.cross_entropy,
            score=score,
            compute="float32" if trunk is None else self.compute,
            device=self.device,
            identity={**self.identity, "model": name, "seed": seed},
            keep_seconds=KEEP_SECONDS if trunk is None else 0.0,
        )

    # Frozen features: pictures are encoded once.

    def _linear_jobs(self, folder: FinetuneFolder, say: Say) -> Callable[[str, int], Job]:
        found = self._features(folder, say)
        train_classes, test_classes = self.classes.train_N[found["train"]], self.classes.test_M[found["test"]]
        soft = smoothed(torch.from_numpy(train_classes), self.classes.num, self.settings.smoothing)

        def job(name: str, seed: int) -> Job:
            train, test = (found[f"{part}/{name}"].to(self.device) for part in ("train", "test"))
            targets = soft.to(self.device)

            def batches(seed: int, epoch: int, batch: int) -> Iterator[Batch]:
                for chosen in shuffled(len(train), batch, seed, epoch):
                    rows = torch.from_numpy(chosen).to(self.device)
                    yield (train[rows],), targets[rows]

            def score(model: nn.Module) -> Scores:
                return _scores(model(test).cpu().numpy(), test_classes)

            return self._job(folder, name, seed, None, len(train), batches, score)

        return job

    def _features(self, folder: FinetuneFolder, say: Say) -> dict[str, Any]:
        """Features of both parts by "train/<name>" and "test/<name>"; "train", "test": the pictures they are of."""
        made_of = [self.identity[name] for name in ("student", "cache", "precision", "size", "pictures")]
        key = "-".join(map(str, [*made_of, *self.trunks]))
        try:
            with safe_open(folder.features, "pt") as file:
                if file.metadata().get("of") == key:
                    say(f"features are read from {folder.features}")
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError):
            pass
        found: dict[str, Tensor] = {}
        for part, pictures in (("train", self.pictures.bank), ("test", self.pictures.queries)):
            features, good, bad = encode_pictures(pictures, self.size, self._encode, self.asked)
            self._note(bad)
            found[part] = torch.from_numpy(good)
            found |= {f"{part}/{name}": torch.from_numpy(values) for name, values in features.items()}
        write_file(folder.features, save(found, {"of": key}))
        return found

    @torch.no_grad()
    def _encode(self, crops_BHWC: Tensor) -> dict[str, Tensor]:
        tokens_BTD = self.prefix(normalise(self.preprocessing, crops_BHWC.to(self.device)))
        with autocast(self.compute, self.device):
            return {name: trunk.eval()(tokens_BTD) for name, trunk in self.trunks.items()}

    # The student trained too: pictures are decoded, changed at random and sent through the frozen prefix each epoch.

    def _full_job(self, folder: FinetuneFolder) -> Callable[[str, int], Job]:
        num = len(self.classes.train_N)
        augment = Augment(self.settings, self.size, self.preprocessing, self.classes.num)
        if self.settings.mixes and min(num, self.settings.batch) < 2:
            raise UsageError("mixup and cutmix mix two pictures of a batch of 1", "--batch 2 or more, or --no-augment")

        def batches(seed: int, epoch: int, batch: int) -> Iterator[Batch]:
            order = list(shuffled(num, batch, seed, epoch))
            decoded = self._decoded([int(index) for chosen in order for index in chosen], augment.crop_size)
            for number, chosen in enumerate(order):
                crops = [(next(decoded), self.classes.train_N[index]) for index in chosen]
                good = [(crop, label) for crop, label in crops if crop is not None]
                if len(good) > self.settings.mixes:
                    pictures, labels = [crop for crop, _ in good], np.array([label for _, label in good])
                    images_BCHW, targets_BC = augment(pictures, labels, seed, epoch, number)
                    yield (self.prefix(images_BCHW),), targets_BC.to(self.device)

        def job(name: str, seed: int) -> Job:
            trunk = copy.deepcopy(self.trunks[name])
            return self._job(folder, name, seed, trunk, num, batches, self._score)

        return job

    def _score(self, model: nn.Module) -> Scores:
        def encode(crops_BHWC: Tensor) -> dict[str, Tensor]:
            tokens_BTD = self.prefix(normalise(self.preprocessing, crops_BHWC.to(self.device)))
            with autocast(self.compute, self.device):
                return {"classes": model(tokens_BTD)}

        found, good, bad = encode_pictures(self.pictures.queries, self.size, encode, self.asked)
        self._note(bad)
        return _scores(found["classes"], self.classes.test_M[good])

    def _decoded(self, indices: Sequence[int], size: int) -> Iterator[np.ndarray | None]:
        """Crops in order, decoded ahead by threads; None for a picture that cannot be. Raises TooManyBadSamples."""
        bank: Pictures = self.pictures.bank
        threads = self.config.threads or min(16, max(2, cores()))
        window = 2 * self.settings.batch
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            ahead: deque[tuple[int, Future[np.ndarray]]] = deque()
            try:
                for place in range(len(indices)):
                    while len(ahead) < window and place + len(ahead) < len(indices):
                        index = indices[place + len(ahead)]
                        ahead.append((index, pool.submit(bank.crop, index, size)))
                    index, future = ahead.popleft()
                    try:
                        yield future.result()
                    except BadPicture as error:
                        self._note([f"{bank.names[index] if bank.names else f'picture {index}'}: {error.what}"])
                        self._refuse_too_many()
                        yield None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _note(self, bad: Sequence[str]) -> None:
        self.bad.update({name: why for name, _, why in (line.partition(": ") for line in bad)})

    def _refuse_too_many(self) -> None:
        num = len(self.pictures.bank)
        if len(self.bad) > self.config.max_bad * num:
            name, why = next(iter(self.bad.items()))
            raise TooManyBadSamples(
                f"{len(self.bad)} of {num} pictures cannot be used, {self.config.max_bad:g} of them may; the first: "
                f"{name}: {why}",
                f"look at these files, or allow more: --max-bad {min(1.0, 2 * len(self.bad) / num):.2g}",
            )


def shuffled(num: int, batch: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """The batches of an epoch, int64 [batch] each: a function of seed and epoch. What is left over is left out."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num, generator=generator).numpy()
    for start in range(0, num // batch * batch, batch):
        yield order[start : start + batch]


def _scores(outputs_NC: np.ndarray, classes_N: np.ndarray) -> Scores:
    return {f"top-{k}": top(outputs_NC, classes_N, k) for k in KS if k == 1 or k < outputs_NC.shape[1]}


def _one_set(paths: Sequence[str]) -> LabelledPictures:
    if not paths:
        raise UsageError("no pictures to learn from", "--images FILE.npz, or two labelled tars: --images train test")
    found = labelled_sets(paths)
    if len(found) != 1:
        raise UsageError(f"--images names {len(found)} sets of pictures", "fine-tune on one at a time")
    return found[0]


def _digest(pictures: LabelledPictures, paths: Sequence[str]) -> str:
    """Of labels and names of both parts, and of the bytes of an npz, or how many they are of a tar."""
    digest = hashlib.sha256()
    for part in (pictures.bank, pictures.queries):
        digest.update(part.labels.astype("<i8").tobytes() + b"|" + "\0".join(part.names or ()).encode() + b"|")
    for path in map(Path, paths):
        if path.is_file():
            digest.update(path.read_bytes() if path.suffix == ".npz" else str(path.stat().st_size).encode())
    return digest.hexdigest()
