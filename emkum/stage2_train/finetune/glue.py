"""GLUE tasks: the text side of a student, or the whole text network, trained with a linear layer on its pooled output.

Two sentences are one text, [CLS] a [SEP] b [SEP], as BERT takes them; the second has no token type of its own, as in
DistilBERT (arXiv:1910.01108).

Legend: B batch, L text tokens, N texts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emkum.errors import UsageError
from emkum.models.network import load_saved
from emkum.models.tokenizer import pad_id, text_ids
from emkum.shards.reader import Cache
from emkum.stage2_train.evaluate.contestants import Contestants
from emkum.stage2_train.evaluate.encode import Settings
from emkum.stage2_train.finetune.classify import shuffled
from emkum.stage2_train.finetune.folder import FinetuneConfig, FinetuneFolder
from emkum.stage2_train.finetune.glue_files import GlueTask, Sentences, glue_task, read_sentences
from emkum.stage2_train.finetune.loop import Batch, Job, Say, Scores, run_job
from emkum.stage2_train.finetune.metrics import METRICS
from emkum.stage2_train.finetune.results import over_seeds
from emkum.stage2_train.finetune.settings import GlueSettings
from emkum.stage2_train.finetune.trunks import Classifier, NetworkTrunk, StudentTrunk, Trunk
from emkum.stage2_train.losses import autocast
from emkum.stage2_train.run_folder import LoadedRun

MEAN = "mean"  # of a task's measures: its score in GLUE


class GlueWork:
    """One task of GLUE, its texts as token ids, and the networks that are fine-tuned on it."""

    def __init__(
        self, config: FinetuneConfig, run: LoadedRun, cache: Cache, compute: str, identity: dict[str, Any]
    ) -> None:
        """Raises UsageError for a run without texts, or without a training file and one to measure on."""
        assert isinstance(config.settings, GlueSettings)
        side = run.student.spec.text
        if side is None:
            raise UsageError(f"{run.dir} trained on {run.recipe.kind} only", "use --task classify, or a run with texts")
        if len(config.data) != 2:
            raise UsageError("GLUE needs a file to learn from and one to measure on", "--train FILE --dev FILE")
        self.config, self.settings, self.compute = config, config.settings, compute
        self.task: GlueTask = glue_task(config.glue_task)
        self.train, self.dev = (read_sentences(Path(path), self.task) for path in config.data)
        contestants = Contestants(run, cache, Settings(config.device, config.batch_size, baselines=config.baselines))
        self.device = contestants.device
        network = load_saved(cache.model_dir(side.encoder))
        assert network.tokenizer is not None
        student = run.student
        assert student.text_embedding is not None
        self.max_tokens = min(self.settings.max_tokens, student.text_embedding.max_tokens)
        if student.shared_positions is not None:
            self.max_tokens = min(self.max_tokens, len(student.shared_positions))
        self.train_ids, self.dev_ids = (self._ids(network.tokenizer, part) for part in (self.train, self.dev))
        self.pad = pad_id(network.tokenizer)
        self.trunks: dict[str, Trunk] = {
            name: StudentTrunk(student, "text") for name, student in contestants.students.items()
        }
        if config.baselines:
            whole = NetworkTrunk(network, 0, "mean" if side.pooling == "mean" else "cls").to(self.device)
            self.trunks[contestants.frozen_name(network)] = whole
        self.identity = identity | {
            "settings": vars(self.settings),
            "glue": self.task.name,
            "train": self.train.sha256,
            "dev": self.dev.sha256,
        }

    def _ids(self, tokenizer: bytes, part: Sentences) -> list[list[int]]:
        return joined_ids(tokenizer, part.first, part.second, self.max_tokens)

    def run(self, folder: FinetuneFolder, say: Say) -> dict[str, Any]:
        """Every model from every seed; what results.json says of them."""
        task = self.task
        say(
            f"{task.name}: {len(self.train):,} {'pairs' if task.pair else 'sentences'} to learn from, "
            f"{len(self.dev):,} to measure on, at most {self.max_tokens} tokens"
        )
        scores = {}
        for name in self.trunks:
            histories = {seed: run_job(self._job(folder, name, seed), say) for seed in self.config.seeds}
            scores[name] = over_seeds(histories)
        found: dict[str, Any] = {
            "on": f"GLUE {task.name}, {len(self.dev):,} of {Path(self.dev.source).name}",
            "source": [self.train.source, self.dev.source],
            "train": len(self.train),
            "test": len(self.dev),
            "broken_lines": [self.train.num_broken, self.dev.num_broken],
            "max_tokens": self.max_tokens,
            "scores": scores,
        }
        if not task.regression:
            guess = np.full(len(self.dev), np.bincount(self.train.labels).argmax())
            found["most frequent"] = {name: METRICS[name](guess, self.dev.labels) for name in task.metrics}
            found["most frequent"][MEAN] = float(np.mean(list(found["most frequent"].values())))
        return found

    def _job(self, folder: FinetuneFolder, name: str, seed: int) -> Job:
        task, num = self.task, len(self.train)
        batch = min(self.settings.batch, num)
        trunk = copy.deepcopy(self.trunks[name])

        def batches(epoch: int) -> Iterator[Batch]:
            for chosen in shuffled(num, batch, seed, epoch):
                labels = torch.from_numpy(self.train.labels[chosen]).to(self.device)
                yield self._batch(self.train_ids, chosen.tolist()), labels

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            return F.mse_loss(outputs[:, 0], labels.float()) if task.regression else F.cross_entropy(outputs, labels)

        return Job(
            name=f"{name}, seed {seed}",
            dir=folder.job(name, seed),
            model=Classifier(trunk, trunk.width, 1 if task.regression else len(task.labels), norm=False, seed=seed),
            schedule=self.settings,
            steps=num // batch,
            batches=batches,
            loss=loss,
            score=self._score,
            compute=self.compute,
            device=self.device,
            identity={**self.identity, "model": name, "seed": seed},
        )

    def _batch(self, ids: Sequence[list[int]], chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """ids_BL int64 and mask_BL bool, as long as the longest text of the batch."""
        longest = max(len(ids[index]) for index in chosen)
        ids_BL = torch.full((len(chosen), longest), self.pad)
        mask_BL = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for place, index in enumerate(chosen):
            ids_BL[place, : len(ids[index])] = torch.tensor(ids[index])
            mask_BL[place, : len(ids[index])] = True
        return ids_BL.to(self.device), mask_BL.to(self.device)

    def _score(self, model: nn.Module) -> Scores:
        order = sorted(range(len(self.dev)), key=lambda index: len(self.dev_ids[index]))
        answers = np.empty(len(order))
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            with autocast(self.compute, self.device):
                outputs = model(*self._batch(self.dev_ids, chosen)).float()
            best = outputs[:, 0] if self.task.regression else outputs.argmax(dim=1)
            answers[chosen] = best.cpu().numpy()
        if not np.isfinite(answers).all():
            raise UsageError("fine-tuning diverged: the model answers NaN or infinity", "lower the rate: --lr 1e-5")
        scores = {name: METRICS[name](answers, self.dev.labels) for name in self.task.metrics}
        return scores | {MEAN: sum(scores.values()) / len(scores)}


def joined_ids(tokenizer: bytes, first: Sequence[str], second: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, or of two as one: opening, a, closing, b, closing; whatever the tokenizer's marks are.

    Too long: the longer one of the two loses its last token, again and again.
    """
    single = _ids(tokenizer, first, max_tokens)
    if not second:
        return single
    empty, word = _ids(tokenizer, ["", "a"], max_tokens)
    opening = next((i for i, (a, b) in enumerate(zip(empty, word, strict=False)) if a != b), len(empty))
    start, end = empty[:opening], empty[opening:]
    # One closing mark stays behind each sentence, where there is any.
    room = max_tokens - len(start) - 2 * len(end)
    if room < 2:
        raise UsageError(f"two sentences in {max_tokens} tokens", "--set max_tokens=128")
    joined = []
    for ids_a, ids_b in zip(single, _ids(tokenizer, second, max_tokens), strict=True):
        a, b = (ids[len(start) : len(ids) - len(end)] for ids in (ids_a, ids_b))
        while len(a) + len(b) > room:
            (a if len(a) > len(b) else b).pop()
        joined.append([*start, *a, *end, *b, *end])
    return joined


def _ids(tokenizer: bytes, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    ids_NL, lengths_N = text_ids(tokenizer, texts, max_tokens)
    return [row[:length].tolist() for row, length in zip(ids_NL, lengths_N, strict=True)]
