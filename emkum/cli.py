"""The door: flags to configurations, handed to the rooms; their errors to one line and an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from emkum import __version__, stopping
from emkum.commands.ablate import ablate
from emkum.commands.finetune import finetune
from emkum.commands.places import cache_place as _place
from emkum.commands.recipes import recipes_app
from emkum.commands.runs import runs_app
from emkum.commands.stats import cache_stats
from emkum.errors import CorruptCache, EmkumError, Interrupted, StorageFailure, UsageError

app = typer.Typer(
    name="emkum",
    help="Distil frozen self-supervised teachers into small students, from a cache computed once.\n\n"
    "Stage 1, `emkum extract`, runs a teacher once over your picture-caption tars and keeps what it says. "
    "Stage 2, `emkum train`, trains a small student from that cache alone, as often as you like. "
    "`emkum demo` shows all of it on generated data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="Look at a cache, check it, repair it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache_app, name="cache")
cache_app.command("stats")(cache_stats)
teachers_app = typer.Typer(rich_markup_mode=None)
app.add_typer(teachers_app, name="teachers")
app.add_typer(recipes_app, name="recipes")
app.add_typer(runs_app, name="runs")
app.command("ablate")(ablate)
app.command("finetune")(finetune)

DEFAULT_CACHE = "./shards"
OPEN_FILES = 16_384
# Options that take every word up to the next option or the folder of a cache.
MANY = ("--data", "--teacher", "--set", "--images", "--texts", "--allow-teacher")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"emkum {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


CacheOption = Annotated[
    str, typer.Option("--cache", help="Folder of the cache, or its URL in an object store (s3://bucket/folder).")
]
CacheArgument = Annotated[
    str, typer.Argument(help="Folder of the cache, or its URL in an object store (s3://bucket/folder).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, everything else to stderr.")]


@app.command()
def extract(
    teacher: Annotated[
        list[str],
        typer.Option(
            help="The frozen network to learn from: a name (`emkum teachers` lists them), a Hugging Face id, a folder "
            "or file of weights, timm:NAME, or a function of your own, module:function. Several may be given."
        ),
    ],
    data: Annotated[
        Optional[list[str]],  # noqa: UP045 (Typer reads it)
        typer.Option(help="WebDataset tars: files, folders, globs or {000..012} patterns. Default: ./data"),
    ] = None,
    cache: CacheOption = DEFAULT_CACHE,
    split: Annotated[str, typer.Option(help="What these tars are for: train, val, test or a name of yours.")] = "train",
    encoder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The frozen network whose first layers feed the student (name, id or folder). "
            "Default: the first picture teacher, so that both share one run; `none` keeps targets only."
        ),
    ] = None,
    cut: Annotated[
        str,
        typer.Option(
            metavar="INTEGER|prenet",
            help="After how many blocks of the encoder the student takes over: 0 keeps patch embeddings, so that the "
            "student may have all blocks; 6 keeps the tokens after block 6, so that training skips those; prenet "
            "keeps those after the blocks that Data2Vec2 counts to its picture encoder.",
        ),
    ] = "0",
    store_inputs: Annotated[
        str,
        typer.Option(
            help="What the student reads: tokens of the encoder, or crops: the pixels themselves, exact, half the "
            "bytes of a ViT-B's float16 tokens, good for every cut (training runs the encoder's frozen blocks) and for "
            "teachers added later without the tars (--from-crops)."
        ),
    ] = "tokens",
    from_crops: Annotated[
        bool,
        typer.Option(
            "--from-crops",
            help="Take pictures from the crops that the cache keeps, and captions from the cache: a further teacher "
            "or target without the tars.",
        ),
    ] = False,
    text_encoder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The text network the student starts from; its tokenizer makes the token ids. "
            "Default: the text teacher if there is one, else bert-base; of a teacher of pairs alone its own tokenizer; "
            "`none` leaves captions out, unless a teacher reads them."
        ),
    ] = None,
    targets: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="What to keep of the teacher, comma-separated: cls (one vector a picture), patches (one a patch), "
            "mean (of the patches, of a text's tokens, or of a sound's frames), layers (mean of layers, normalised, "
            "one a token: --layers), logits. Default: what `emkum teachers show NAME` says; cls,patches for most "
            "picture teachers, cls,logits for ResNets, layers for text teachers, mean,layers for sounds, cls,layers "
            "for teachers of pairs, which read a caption with its picture: one vector, or one a token, a caption."
        ),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The rule of the target layers: thesis, data2vec or data2vec2, or pairs such as "
            "site=ffn,last=10,norm=layer,final=no,prefix=drop (docs/extract.md). Default: the one the teacher was "
            "trained with, if it was, else thesis."
        ),
    ] = None,
    logits_top: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Keep so many of the logits, the largest, their classes, and log-sum-exp of the rest, in place of all."
        ),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Name of the teacher in the cache. Default: its own."),
    ] = None,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Side of the square crops, in pixels. Default: 224; with --from-crops that of the crops."),
    ] = None,
    crop: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Share of the picture's area that crops take: a range for random crops (0.9-1.0), or one number for "
            "centre crops (1.0). Default: 0.9-1.0 for the split train, 1.0 otherwise."
        ),
    ] = None,
    flip: Annotated[
        bool, typer.Option("--flip", help="Mirror crops at random (captions may name left and right).")
    ] = False,
    jitter: Annotated[
        float, typer.Option(help="Strength of random brightness, contrast and saturation, 0 to 1.")
    ] = 0.0,
    views: Annotated[int, typer.Option(help="Random crops kept of each picture.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the random crops.")] = 0,
    storage: Annotated[
        str, typer.Option(help="float16, float32, or int8 (half the bytes; the error made is measured and shown).")
    ] = "float16",
    compute: Annotated[
        str,
        typer.Option(
            help="Type of matrix products: float32, bfloat16, float16. Default: as the cache has it, else bfloat16 "
            "where the device is good at it."
        ),
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Tokens kept of a caption; a multiple of 16.")] = 64,
    max_seconds: Annotated[
        float, typer.Option(help="Seconds kept of a sound; longer ones are cut, counted and said.")
    ] = 30.0,
    batch_size: Annotated[int, typer.Option(help="Pictures, captions or sounds in one forward pass.")] = 32,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Threads that decode pictures and sounds. Default: one a core, 2 to 16."),
    ] = None,
    rows_per_block: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Rows written and committed together; fixed when the cache is made. Default: 1024."),
    ] = None,
    max_bad: Annotated[
        float, typer.Option(help="Share of pictures, captions or sounds that may be unusable before the run stops.")
    ] = 0.001,
    on_nonfinite: Annotated[
        str,
        typer.Option(
            help="What to do with a sample for which a network gives inf, NaN or a number the storage cannot hold: "
            "stop, or quarantine it (it counts against --max-bad)."
        ),
    ] = "stop",
    on_truncated: Annotated[
        str,
        typer.Option(
            help="What to do with a tar that ends too early: error, or keep-complete, which keeps the samples that "
            "are surely whole and records the loss."
        ),
    ] = "error",
    allow_missing_eof: Annotated[
        bool,
        typer.Option("--allow-missing-eof", help="Accept tars that are whole but for their end-of-archive marker."),
    ] = False,
    join: Annotated[
        bool,
        typer.Option("--join", help="Work beside other extract commands on the same cache, each on blocks of its own."),
    ] = False,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Share the work among so many processes on this machine, one a GPU. Default: no others."),
    ] = None,
    scheduler: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Share the work among the workers of a running Dask cluster (tcp://host:8786). They need emkum, the "
            "tars and the cache at the same paths."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu. Default: cuda if there is one.")] = "auto",
    label_free: Annotated[
        bool,
        typer.Option(
            "--label-free",
            help="Refuse networks whose weights learned from labels: from classes, transcripts, answers or pairs that "
            "people made. A result that claims to need no labels must not lean on a teacher that had them. Judged by "
            "the catalogue, by names and by the tensors of files, before anything is fetched; what nobody knows is "
            "refused.",
        ),
    ] = False,
    text_free: Annotated[
        bool,
        typer.Option(
            "--text-free",
            help="As --label-free, and refuse those that learned what pictures show from words: from captions, or "
            "through a tokenizer that was distilled from CLIP, as BEiT-2's was.",
        ),
    ] = False,
    allow_teacher: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="An exception from --label-free or --text-free: a network named exactly as in this command. It is "
            "recorded with the fields. Several may be given."
        ),
    ] = None,
) -> None:
    """Run a frozen teacher once over your tars and keep its targets.

    The same command again finishes what is missing, or does nothing. Example:

        emkum extract --teacher dinov2-s --data ./data --split train
    """
    if not join:  # said before the slow imports
        from emkum.shards.claims import Claims
        from emkum.shards.store import open_store

        Claims(open_store(_place(cache))).require_alone()

    from emkum.stage1_extract.config import DEFAULT_DATA, ExtractConfig
    from emkum.stage1_extract.extract import extract as run_extract

    config = ExtractConfig(
        teacher=tuple(teacher),
        data=tuple(data or DEFAULT_DATA),
        cache=_place(cache),
        split=split,
        encoder=encoder,
        cut=_cut(cut),
        store_inputs=store_inputs,  # type: ignore[arg-type]  # checked by ExtractConfig
        from_crops=from_crops,
        text_encoder=text_encoder,
        targets=tuple(t.strip() for t in targets.split(",") if t.strip()) if targets else (),
        layers=layers,
        logits_top=logits_top,
        name=name,
        size=size,
        crop=_crop(crop),
        flip=flip,
        jitter=jitter,
        seed=seed,
        views=views,
        storage=storage,
        compute=compute,
        max_tokens=max_tokens,
        max_seconds=max_seconds,
        batch_size=batch_size,
        threads=threads,
        rows_per_block=rows_per_block,
        max_bad=max_bad,
        on_nonfinite=on_nonfinite,  # type: ignore[arg-type]  # checked by ExtractConfig
        on_truncated=on_truncated,  # type: ignore[arg-type]
        allow_missing_eof=allow_missing_eof,
        join=join,
        workers=workers,
        scheduler=scheduler,
        device=device,
        label_free=label_free,
        text_free=text_free,
        allow_teacher=tuple(allow_teacher or ()),
    )
    config.guard.check_exceptions((*teacher, encoder or "", text_encoder or ""))
    if allow_teacher:
        _say(f"taken by name whatever they learned from: {', '.join(allow_teacher)}; the fields this begins say so")
    run_extract(config, say=_say)


@app.command()
def train(
    cache: CacheOption = DEFAULT_CACHE,
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="What to train: ssmke (pictures and captions meet each other and the teacher), itc-only (each other "
            "alone), cls-mse (both regress the teacher's vector), shre and shre-transformer (both guess the teacher's "
            "classes), image-kd (a smaller picture network), text-kd (a "
            "smaller text network), or a TOML file. Default: what the cache's fields allow."
        ),
    ] = None,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="Change a value of the recipe: --set training.epochs=3 optimiser.lr=1e-4"),
    ] = None,
    run_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the run. Default: runs/<recipe>, or runs/<recipe>-2 and so on."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --run-dir, exactly where it stopped.")
    ] = False,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Seed of new weights, of the order and of drawn captions. Default: 0."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16; auto takes bfloat16 where the device is good at it.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu. Default: cuda if there is one.")] = "auto",
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Run encoder and teacher in every step instead of reading what they said: the slow path, to compare "
            "with. Needs the source tars and the teacher's weights.",
        ),
    ] = False,
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Where the source tars lie now, for --live, and for a student of pixels from a cache without crops. "
            "Default: where they were extracted from."
        ),
    ] = None,
    max_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Train for so many steps instead of the recipe's epochs."),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Train on the rows that are there though blocks are missing.")
    ] = False,
    shuffle: Annotated[
        str,
        typer.Option(
            help="rows: every row at random, best on SSDs and in memory. blocks: whole blocks in random order, their "
            "rows mixed, for hard disks, network volumes and object stores. auto measures the storage for 5 seconds "
            "if the fields are too large to stay in memory, and says what it chose."
        ),
    ] = "auto",
    mix_blocks: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="How many blocks --shuffle blocks mixes, in memory; naming it chooses blocks. Default: 8."),
    ] = None,
    verify: Annotated[
        str,
        typer.Option(help="When the checksum of a row is looked at: first (when it is first read), always, never."),
    ] = "first",
    threads: Annotated[int, typer.Option(help="Threads that share the reading of batches.")] = 8,
    prefetch: Annotated[int, typer.Option(help="Batches read ahead.")] = 3,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory for about a third more time.")
    ] = False,
    chunk: Annotated[
        int,
        typer.Option(
            help="Compute a batch so many samples at a time, and each again in the backward pass: large contrastive "
            "batches in little memory, the same losses. Default: the whole batch at once."
        ),
    ] = 0,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the student's blocks, which takes minutes (no gain on CPUs, not measured on GPUs). Needs a "
            "C++ compiler; without one the run goes on as written.",
        ),
    ] = False,
    devices: Annotated[
        int,
        typer.Option(help="GPUs that share each batch, or with --device cpu processes; training.batch is of them all."),
    ] = 1,
    logger: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Where curves are drawn, beside metrics.csv and metrics.jsonl: tensorboard, wandb, wandb-offline (for "
            "a later `wandb sync`), none. Repeat it for several. Default: tensorboard."
        ),
    ] = None,
    fast_dev_run: Annotated[
        bool,
        typer.Option("--fast-dev-run", help="Three steps and a validation in a folder that is thrown away: a test."),
    ] = False,
) -> None:
    """Train a student from a cache alone. Example: emkum train --cache ./shards --recipe ssmke"""
    from emkum.stage2_train.train import TrainConfig
    from emkum.stage2_train.train import train as run_train

    run_train(
        TrainConfig(
            cache=_place(cache),
            recipe=recipe,
            overrides=tuple(set_ or ()),
            run_dir=run_dir,
            resume=resume,
            seed=seed,
            precision=precision,  # type: ignore[arg-type]  # checked by TrainConfig
            device=device,
            live=live,
            data=tuple(data or ()),
            max_steps=max_steps,
            allow_partial=allow_partial,
            shuffle=shuffle,  # type: ignore[arg-type]  # checked by TrainConfig
            mix_blocks=mix_blocks,
            verify=verify,  # type: ignore[arg-type]  # checked by TrainConfig
            threads=threads,
            prefetch=prefetch,
            activation_checkpointing=activation_checkpointing,
            chunk=chunk,
            compile=compile_,
            devices=devices,
            loggers=tuple(logger or ("tensorboard",)),
            fast_dev_run=fast_dev_run,
        ),
        say=_say,
    )


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run that `emkum train` made.")],
    cache: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Folder of the cache, or its URL. Default: the one the run was trained on."),
    ] = None,
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Measure on this split of the cache. Default: val, if no other data is named."),
    ] = None,
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Measure picture-caption retrieval on these tars, from the files on."),
    ] = None,
    images: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Measure picture retrieval by label: .npz files with x_train, y_train, x_test, y_test, or pairs of "
            "labelled tars, the bank before its queries."
        ),
    ] = None,
    texts: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Measure text-pair retrieval on a QQP or MRPC file."),
    ] = None,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Side of the pictures of --images, in pixels. Default: the cache's crop size."),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="Measure the student before training, and its whole frozen network, beside it."
        ),
    ] = False,
    max_bad: Annotated[
        float, typer.Option(help="Share of pictures that may be unusable before the command stops.")
    ] = 0.001,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 256,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu. Default: cuda if there is one.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure a trained student. Example: emkum evaluate runs/ssmke --cache ./shards --split val

    Without other data: picture-caption retrieval (R@1, R@5, R@10, both ways; any caption of the picture counts) on a
    split of the cache; for picture or text students their distance from the teacher. Results are added to
    evaluation.json in the run's folder.
    """
    if split is not None and data:
        raise UsageError(
            f"--split {split} and --data {' '.join(data)}: evaluation.json holds one image-text retrieval",
            "measure them in two commands, and keep the first one's numbers if you want both",
        )
    if size is not None and not images:
        raise UsageError(f"--size {size} without --images", "it is the side of labelled pictures; leave it out")

    from emkum.shards.reader import Cache
    from emkum.stage2_train.evaluate.encode import Settings
    from emkum.stage2_train.evaluate.pictures import labelled_sets
    from emkum.stage2_train.evaluate.results import merge_results, refuse_equal_names, table, write_results
    from emkum.stage2_train.evaluate.run import evaluate_cache, evaluate_pictures, evaluate_tars, evaluate_texts
    from emkum.stage2_train.evaluate.texts import read_text_pairs
    from emkum.stage2_train.run_folder import load_run

    loaded = load_run(run)
    opened = Cache.open(_place(cache) if cache is not None else loaded.cache_path)
    settings = Settings(device=device, batch_size=batch_size, max_bad=max_bad, baselines=baselines)
    labelled, pairs = labelled_sets(images or ()), [read_text_pairs(path) for path in texts or ()]
    refuse_equal_names("--images", ((found.name, found.source) for found in labelled))
    refuse_equal_names("--texts", ((found.name, found.source) for found in pairs))
    results = []
    if split is not None or not (data or images or texts):
        results.append(evaluate_cache(loaded, opened, split or "val", settings))
    if data:
        results.append(evaluate_tars(loaded, data, opened, settings))
    results += [evaluate_pictures(loaded, found, size, opened, settings) for found in labelled]
    results += [evaluate_texts(loaded, found, opened, settings) for found in pairs]
    merged = merge_results(*results)
    written = write_results(run, merged)
    if as_json:
        print(json.dumps(merged, allow_nan=False))
    else:
        print(table(merged))
    _say(f"written to {written}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put data, cache, run and report.")] = Path("./demo"),
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Another teacher: a name, a Hugging Face id, or a folder. Default: dinov2-s-imgfocus."),
    ] = None,
    text_encoder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Another text encoder. Default: minilm."),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu. Default: cuda if there is one.")] = "auto",
) -> None:
    """All of it on generated data: draw scenes with captions, extract, train, evaluate, and write a page about it."""
    from dataclasses import replace

    from emkum.demo import DemoConfig, run_demo

    config = DemoConfig(folder=folder, device=device)
    if teacher is not None:
        config = replace(config, teacher=teacher)
    if text_encoder is not None:
        config = replace(config, text_encoder=text_encoder)
    report = run_demo(config, say=_say)
    print(report)


@teachers_app.callback(invoke_without_command=True)
def teachers(
    context: typer.Context,
    as_json: JsonOption = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of docs/teachers.md.", hidden=True)
    ] = False,
) -> None:
    """List the networks known by name: what they are and learned from, their licence, shape, and what they cost.

    What they learned from: none (raw pictures, texts or sound), none+clip_tokenizer (codes of a tokenizer that learned
    from captions), paired_text (pictures with captions), text_pairs, class_labels, transcripts, unknown.
    """
    if context.invoked_subcommand is not None:
        return
    from emkum.models.listing import listed, markdown, table

    found = listed()
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=1))
    else:
        print(markdown(found) if as_markdown else table(found))


@teachers_app.command("show")
def teachers_show(
    source: Annotated[str, typer.Argument(help="A name, a Hugging Face id, a folder, a file or a URL.")],
    as_json: JsonOption = False,
) -> None:
    """All that is known of one network without fetching or loading it, and how to extract it."""
    from emkum.models.listing import show, show_text

    known = show(source)
    print(json.dumps(known, indent=1) if as_json else show_text(known))


@teachers_app.command("convert")
def teachers_convert(
    file: Annotated[
        str, typer.Argument(help="An original checkpoint (.pth, .pt, .safetensors); FILE#text for a tower.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    family: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Whose file it is, such as beit2. Default: the family that recognises its tensors."),
    ] = None,
    tokenizer: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder with the tokenizer of a text network. Default: the folder of the file."),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Name of the network in caches. Default: the catalogue's, or one made of the file's."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a folder of safetensors of an original checkpoint, with a record of where it comes from.

    Nothing in the file is executed. The folder then serves as --teacher FOLDER, with the same weights_sha256. Example:

        emkum teachers convert beitv2_base_patch16_224_pt1k.pth --out ./beit2
    """
    from emkum.models.convert import convert, summary, told

    made = convert(file, out, family, tokenizer, name)
    print(json.dumps(told(made), indent=1) if as_json else summary(made))


@cache_app.command("info")
def cache_info(cache: CacheArgument = DEFAULT_CACHE, as_json: JsonOption = False) -> None:
    """What a cache holds: fields, rows, bytes, storage error, fingerprints, and what is missing."""
    from emkum.shards.audit import describe, table
    from emkum.shards.reader import Cache

    description = describe(Cache.open(_place(cache)))
    print(json.dumps(description, indent=1) if as_json else table(description))


@cache_app.command("verify")
def cache_verify(
    cache: CacheArgument = DEFAULT_CACHE,
    sample: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Also compute so many committed rows of each field again, with --teacher, and compare them."),
    ] = None,
    teacher: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="For --sample: the network that fields come from (name, id or folder). Several may be given."
        ),
    ] = None,
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="For --sample: where the source tars lie now. Default: where they were extracted from."),
    ] = None,
    seed: Annotated[int, typer.Option(help="For --sample: of the draw of rows.")] = 0,
    batch_size: Annotated[int, typer.Option(help="For --sample: rows in one forward pass.")] = 32,
    device: Annotated[
        str, typer.Option(help="For --sample: cuda, cuda:1, cpu. Default: cuda if there is one.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a cache and say what is damaged, which rows and samples suffer, and what undoes it.

    Exit code 4 if anything is damaged, or if a row of --sample is not what its network says now; 5 if the network has
    other weights than the cache was made with. Blocks that were not extracted yet are no damage.
    """
    from emkum.shards.audit import report_json, report_table
    from emkum.shards.store import exists, open_store
    from emkum.shards.verify import verify

    store = open_store(_place(cache))
    if cache == DEFAULT_CACHE and (teacher or data) and not exists(store, "zarr.json"):
        raise UsageError(
            f"no cache was named, and there is none in {DEFAULT_CACHE}; every word behind --teacher or --data belongs "
            "to it, unless it is the folder of a cache",
            "name the cache first: emkum cache verify CACHE --sample N --teacher NAME",
        )
    config, networks = None, []
    if sample is not None or teacher:
        from emkum.stage1_extract.live_check import SampleConfig, load_teachers

        config = SampleConfig(sample or 0, tuple(teacher or ()), tuple(data or ()), seed, batch_size, device)
        networks = load_teachers(store, config)
    with _Bar("verify") as bar:
        report = verify(store, progress=bar.show)
    if report.findings or config is None:
        print(json.dumps(report_json(store, report), indent=1) if as_json else report_table(store, report))
    if report.findings:
        raise CorruptCache(_damage(cache, len(report.findings), "damaged"), f"next: emkum cache repair {cache}")
    if config is not None:
        from emkum.stage1_extract.live_check import check_sample, require_agreement, table

        with _Bar("compute again", " rows") as bar:
            compared = check_sample(store, config, networks, progress=bar.show)
        if as_json:
            print(json.dumps(report_json(store, report) | {"sample": compared.to_json()}, indent=1))
        else:
            print(report_table(store, report) + "\n" + table(compared))
        require_agreement(compared)


@cache_app.command("repair")
def cache_repair(
    cache: CacheArgument = DEFAULT_CACHE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify a cache, then drop what is damaged, so that the same `emkum extract` redoes that and nothing else.

    Exit code 4 if something is left that only a copy of the cache can restore.
    """
    from emkum.shards.audit import printable, repair_json, repair_table
    from emkum.shards.repair import repair
    from emkum.shards.store import open_store

    store = open_store(_place(cache))
    with _Bar("verify") as bar:
        done = repair(store, dry_run=dry_run, say=lambda line: bar.say(printable(line)), progress=bar.show)
    print(json.dumps(repair_json(store, done), indent=1) if as_json else repair_table(done, dry_run))
    if done.left:
        raise CorruptCache(_damage(cache, len(done.left), "damaged beyond repair"), done.left[0].way_out)


@cache_app.command("digest")
def cache_digest(
    cache: CacheArgument = DEFAULT_CACHE,
    quick: Annotated[
        bool, typer.Option("--quick", help="Trust the receipts instead of reading every object again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """One SHA-256 of everything committed: equal for equal content, whoever wrote it, when, where, in what order."""
    from emkum.shards.digest import digest

    found = digest(_place(cache), trust_receipts=quick)
    print(json.dumps({"path": cache, "digest": found, "quick": quick}) if as_json else found)


@cache_app.command("quarantine")
def cache_quarantine(
    cache: CacheArgument = DEFAULT_CACHE,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the list to this .csv, .json or .parquet file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the samples that fields leave out, with tar, key, row, place in the tar, and the reason."""
    from emkum.shards.audit import export_left_out, left_out, left_out_json, left_out_table
    from emkum.shards.reader import Cache

    samples = left_out(Cache.open(_place(cache)))
    if out is not None:
        export_left_out(samples, out)
        _say(f"{len(samples):,} samples written to {out}")
    print(json.dumps(left_out_json(samples), indent=1) if as_json else left_out_table(samples))


def _damage(cache: str, count: int, kind: str) -> str:
    return f"{cache}: {count} {'thing is' if count == 1 else 'things are'} {kind}"


class _Bar:
    """A progress bar on stderr, if that is a terminal. A context manager."""

    def __init__(self, name: str, unit: str = "B") -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=name, unit=unit, unit_scale=True, leave=False, disable=not sys.stderr.isatty())

    def show(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def say(self, line: str) -> None:
        self._bar.clear()
        _say(line)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _cut(text: str) -> int | Literal["prenet"]:
    if text == "prenet":
        return "prenet"
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--cut {text} is no number", "give a number of blocks, or prenet") from None


def _crop(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        parts = [float(part) for part in text.replace(",", "-").split("-")]
    except ValueError:
        parts = []
    if len(parts) == 1:
        return parts[0], parts[0]
    if len(parts) == 2:
        return parts[0], parts[1]
    raise UsageError(f"--crop {text} is not an area share", "give one number (1.0) or a range (0.9-1.0)")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _spread(arguments: list[str]) -> list[str]:
    """`--data a b c` -> `--data a --data b --data c`, so that globs the shell expanded work.

    A cache among them is no value, but what the command works on: `cache verify --teacher beit2 ./shards`.
    """
    spread: list[str] = []
    takes_cache = arguments[:1] == ["cache"]
    option = None
    words = 0
    for argument in arguments:
        if argument.startswith("-"):
            option, words = (argument if argument in MANY else None), 0
        elif option is not None:
            words += 1
            if takes_cache and words > 1 and _is_cache(argument):
                option = None
            elif words > 1:
                spread.append(option)
        spread.append(argument)
    return spread


def _is_cache(word: str) -> bool:
    in_object_store = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", word) and not word.startswith(("http://", "https://"))
    return bool(in_object_store) or (Path(word) / "zarr.json").is_file()


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; every failure ends in one line on stderr."""
    try:
        app(args=_spread(arguments), standalone_mode=False)
    except Interrupted as error:
        stopping.heard()
        return _fail(error.line(), error.exit_code)
    except KeyboardInterrupt:
        return _fail("Interrupted: what was committed is kept | the same command continues", Interrupted.exit_code)
    except typer.Exit as stop:
        return stop.exit_code
    except (BrokenPipeError, SystemExit) as error:
        if stopped := stopping.heard():  # a library's way to end where a signal came
            return _fail(stopped.line(), stopped.exit_code)
        if isinstance(error, SystemExit):
            raise
        # The reader of our output went away, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if stopped := stopping.heard():  # of which a library made an error of its own; any other will come again
            return _fail(stopped.line(), stopped.exit_code)
        if isinstance(error, EmkumError):
            return _fail(error.line(), error.exit_code)
        if isinstance(error, OSError):
            return _fail(f"StorageFailure: {error} | check the path and its permissions", StorageFailure.exit_code)
        kind = type(error).__name__
        if kind == "OutOfMemoryError":
            way_out = "extract: a smaller --batch-size; train: --chunk N, --activation-checkpointing, a smaller batch"
            return _fail(f"OutOfMemory: {str(error).splitlines()[0]} | {way_out}", UsageError.exit_code)
        if hasattr(error, "format_message"):  # Typer's own: a mistyped option, a missing argument
            if kind == "NoArgsIsHelpError":
                print(error.format_message())
                return UsageError.exit_code
            return _fail(f"{error.format_message()} | see --help", UsageError.exit_code)
        traceback.print_exc()
        return _fail(f"Bug: {kind}: {' '.join(str(error).split())} | please report it with the lines above", 1)
    return 0


def _fail(line: str, code: int) -> int:
    print("emkum: " + "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    return code


def allow_open_files() -> None:
    """As many open files as the system lets this process have: a large cache has thousands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    """Entry point of the `emkum` command."""
    allow_open_files()
    try:
        stopping.listen()
        code = run(sys.argv[1:])
        sys.stdout.flush()
        sys.stderr.flush()
        if "emkum.shards.reader" in sys.modules:
            from emkum.shards.reader import remove_copies

            remove_copies()
    except Interrupted as stopped:  # before or after the command itself
        stopping.heard()
        code = _fail(stopped.line(), stopped.exit_code)
    os._exit(code)  # threads of C++ libraries may abort the process while Python tears itself down


if __name__ == "__main__":
    main()
