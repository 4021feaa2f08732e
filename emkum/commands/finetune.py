"""`emkum finetune`: a trained student on a task with labels, or on pictures and captions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from emkum.errors import UsageError


def finetune(
    run: Annotated[Path, typer.Argument(help="Folder of a run that `emkum train` made.")],
    task: Annotated[
        str,
        typer.Option(
            help="retrieval: pictures and captions find each other (R@1, R@5, R@10). classify: the class of a picture "
            "(top-1, top-5). glue: a task of GLUE, on sentences or pairs of them."
        ),
    ],
    cache: Annotated[
        Optional[str],  # noqa: UP045 (Typer reads it)
        typer.Option(
            help="Folder of the cache, or its URL. Default: the one the run was trained on. For retrieval the cache "
            "with the pictures and captions to train on."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="retrieval: train on this split of the cache.")] = "train",
    test_split: Annotated[str, typer.Option(help="retrieval: validate and measure on this split.")] = "val",
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="retrieval: measure on these tars instead, from the picture files on."),
    ] = None,
    chunk: Annotated[
        int,
        typer.Option(help="retrieval: compute a batch so many samples at a time: large batches in little memory."),
    ] = 0,
    images: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="classify: an .npz file with x_train, y_train, x_test, y_test, or two labelled tars (patterns, "
            "folders), train before test."
        ),
    ] = None,
    linear: Annotated[
        bool,
        typer.Option(
            "--linear",
            help="classify: train a LayerNorm and a linear layer alone, on the student's features as they are. "
            "Pictures are encoded once, without augmentation.",
        ),
    ] = False,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="classify: side of the pictures, in pixels. Default: the cache's crop size."),
    ] = None,
    no_augment: Annotated[
        bool,
        typer.Option(
            "--no-augment",
            help="classify: pictures as they are: no crops, flips, RandAugment, erasing, mixup, cutmix. Without it "
            "timm is needed: pip install 'emkum[finetune]'.",
        ),
    ] = False,
    glue_task: Annotated[str, typer.Option(help="glue: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli.")] = "",
    train_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--train",
            help="glue: the file to learn from: tab-separated with a header, or .jsonl; sentence1, sentence2, label.",
        ),
    ] = None,
    dev_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--dev", help="glue: the file to measure on, in the same form."),
    ] = None,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Passes over the data. Default: 15 for classify, 5 for retrieval, 3 for glue."),
    ] = None,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Samples a step. Default: 256 for classify, 1024 for retrieval, 32 for glue."),
    ] = None,
    lr: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="The highest learning rate, for the batch as it is. Default: 1e-3 for classify, 3e-5 for retrieval, "
            "5e-5 for glue."
        ),
    ] = None,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="Change another setting: --set layer_decay=0.81 mixup=0 (docs/finetune.md)."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, as 0,1,2: each trains anew.")] = "0",
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Do the same with the student as it was before training and with the whole frozen network. Retrieval "
            "always measures the run before fine-tuning.",
        ),
    ] = False,
    checkpoint: Annotated[
        str, typer.Option(help="The run's weights: best, ema, last, or the path of a checkpoint.")
    ] = "best",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for weights and results. Default: RUN/finetune-<task>-<n>."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the fine-tuning in --out after its last whole epoch.")
    ] = False,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16; auto takes bfloat16 where the device is good at it.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu. Default: cuda if there is one.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass of a measurement.")] = 256,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Threads that decode pictures. Default: one a core, 2 to 16."),
    ] = None,
    max_bad: Annotated[
        float, typer.Option(help="Share of pictures that may be unusable before the command stops.")
    ] = 0.001,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, everything else to stderr.")
    ] = False,
) -> None:
    """Fine-tune a trained student, and measure it. Examples:

    emkum finetune runs/image-kd --task classify --images cifar10.npz --linear

    emkum finetune runs/text-kd --task glue --glue-task mrpc --train msr_train.tsv --dev msr_dev.tsv --seeds 0,1,2

    Settings are the published ones. Weights, results.json and a checkpoint of every epoch lie in a folder of their own.
    """
    from emkum.stage2_train.finetune.settings import ClassifySettings, settings_of

    words = [word.strip() for word in seeds.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--seeds {seeds} is not a list of numbers", "give them as 0,1,2")
    settings = settings_of(task, set_ or (), epochs=epochs, batch=batch, lr=lr)
    of_task = {"retrieval": data, "classify": images, "glue": [str(file) for file in (train_file, dev_file) if file]}
    given = {
        "--data": ("retrieval", data),
        "--chunk": ("retrieval", chunk),
        "--images": ("classify", images),
        "--linear": ("classify", linear),
        "--no-augment": ("classify", no_augment),
        "--size": ("classify", size),
        "--glue-task": ("glue", glue_task),
        "--train": ("glue", train_file),
        "--dev": ("glue", dev_file),
    }
    for flag, (owner, value) in given.items():
        if value and owner != task:
            raise UsageError(f"{flag} is of --task {owner}; this is --task {task}", "leave it out")
    if no_augment:
        assert isinstance(settings, ClassifySettings)
        settings = settings.unaugmented()

    from emkum.stage2_train.finetune.folder import FinetuneConfig
    from emkum.stage2_train.finetune.start import finetune as run_finetune
    from emkum.stage2_train.finetune.start import shown

    config = FinetuneConfig(
        run=run,
        task=task,
        settings=settings,
        cache=cache,
        out=out,
        resume=resume,
        seeds=tuple(int(word) for word in words),
        checkpoint=checkpoint,
        baselines=baselines,
        linear=linear,
        data=tuple(of_task[task] or ()),
        size=size,
        glue_task=glue_task,
        split=split,
        test_split=test_split,
        chunk=chunk,
        device=device,
        precision=precision,
        batch_size=batch_size,
        threads=threads,
        max_bad=max_bad,
    )
    results = run_finetune(config, say=_say)
    print(json.dumps(results, allow_nan=False) if as_json else shown(results))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
