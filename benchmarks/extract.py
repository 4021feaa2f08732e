"""Extraction against the bare forward pass of the same network: same batch, same type, same run, interleaved.

    python benchmarks/extract.py --teacher FOLDER --data TAR [--pictures 512] [--rounds 3] [--batch-size 32]
    python benchmarks/extract.py --teachers FOLDER FOLDER     # several in one pass, against a run for each
    python benchmarks/extract.py --store-inputs crops         # against tokens; then the teacher again, from the crops

Without --data it draws scenes. Prints the median rates and `extract_over_forward`, 1.0 being the bare forward pass; the
extraction decodes, runs the network, rounds, writes and syncs (loop time, without loading the network and scanning).
`one_pass_over_separate`: seconds of a run for each of --teachers, over those of one run for all.
`crops_over_tokens`: pictures a second with --store-inputs crops, over those with tokens.
`from_crops_over_tars`: pictures a second of the same targets from the cache's crops, over those from the tars.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine

from emkum.models.catalogue import load_network
from emkum.models.network import normalise
from emkum.models.passes import good_compute
from emkum.shards.datasets.scenes import write_scenes
from emkum.shards.tars import find_tars, read_member, scan_tars
from emkum.stage1_extract.config import ExtractConfig
from emkum.stage1_extract.extract import extract


def main() -> None:
    arguments = parse()
    compute = arguments.compute or good_compute(torch.device(arguments.device))
    rates: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        tar = first_pictures(arguments.data, arguments.pictures, Path(folder))
        network = load_network(arguments.teacher).placed(arguments.device, getattr(torch, compute))
        for number in range(arguments.rounds):
            config = extract_config(tar, Path(folder) / str(number), compute, arguments)
            rates["forward"].append(forward_rate(network, arguments))
            rates["extract"].append(extract_rate(config))
            if arguments.store_inputs == "crops":
                measure_crops(config, rates)
            if arguments.teachers:
                measure_teachers(config, arguments.teachers, rates)
            print(f"round {number}: " + ", ".join(f"{n} {r[-1]:.1f}/s" for n, r in rates.items()), flush=True)
    result = {
        "ratios": ratios(rates),
        **{f"{name}_per_second": round(statistics.median(found), 2) for name, found in rates.items()},
        "pictures": arguments.pictures,
        "batch_size": arguments.batch_size,
        "size": arguments.size,
        "compute": compute,
        "machine": machine(),
    }
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=1))


def ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of what was measured in one round."""
    wanted = {
        "extract_over_forward": ("extract", "forward"),
        "one_pass_over_separate": ("one_pass", "separate"),
        "crops_over_tokens": ("crops", "extract"),
        "from_crops_over_tars": ("from_crops", "from_tars"),
    }
    return {
        name: round(statistics.median(a / b for a, b in zip(rates[over], rates[under], strict=True)), 4)
        for name, (over, under) in wanted.items()
        if over in rates
    }


def forward_rate(network, arguments: argparse.Namespace) -> float:
    """Pictures a second through the whole network, from crops in memory."""
    draw = torch.Generator().manual_seed(0)
    shape = (arguments.batch_size, arguments.size, arguments.size, 3)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    batches = max(1, arguments.pictures // arguments.batch_size)
    with torch.inference_mode():
        network.backbone(normalise(network, crops.to(arguments.device)))  # warm
        started = time.perf_counter()
        for _ in range(batches):
            network.backbone(normalise(network, crops.to(arguments.device)))
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize()
        return batches * arguments.batch_size / (time.perf_counter() - started)


def extract_config(tar: Path, folder: Path, compute: str, arguments: argparse.Namespace) -> ExtractConfig:
    return ExtractConfig(
        teacher=(arguments.teacher,),
        data=(str(tar),),
        cache=folder / "tokens",
        text_encoder="none",
        cut=arguments.cut,
        targets=tuple(arguments.targets.split(",")),
        size=arguments.size,
        compute=compute,
        batch_size=arguments.batch_size,
        device=arguments.device,
    )


def extract_rate(config: ExtractConfig) -> float:
    """Pictures a second."""
    result = extract(config, say=lambda line: None)
    return result.rows / result.loop_seconds


def measure_crops(config: ExtractConfig, rates: dict[str, list[float]]) -> None:
    """The same teacher with crops in place of tokens; then its targets alone, from the tars and from the crops."""
    crops = replace(config, cache=config.cache.with_name("crops"), cut=0, store_inputs="crops")
    rates["crops"].append(extract_rate(crops))
    targets = replace(config, encoder="none", cut=0, name="again")
    rates["from_tars"].append(extract_rate(targets))
    rates["from_crops"].append(extract_rate(replace(targets, cache=crops.cache, data=(), from_crops=True)))


def measure_teachers(config: ExtractConfig, teachers: Sequence[str], rates: dict[str, list[float]]) -> None:
    """Targets of all teachers: each picture decoded once for all, or once for each. Rates count a picture once."""
    targets = replace(config, encoder="none", cut=0, cache=config.cache.with_name("together"), teacher=tuple(teachers))
    rates["one_pass"].append(extract_rate(targets))
    alone = replace(targets, cache=config.cache.with_name("separate"))
    rates["separate"].append(1 / sum(1 / extract_rate(replace(alone, teacher=(teacher,))) for teacher in teachers))


def first_pictures(data: list[str] | None, num: int, folder: Path) -> Path:
    """A tar of the first `num` pictures of the data, or of drawn scenes."""
    if not data:
        data = write_scenes(folder / "scenes", num, 1, seed=0, size=224)["train"]
    path = folder / "first.tar"
    written = 0
    with tarfile.open(path, "w") as out:
        for tar in scan_tars(find_tars(data)):
            for sample in tar.samples:
                if sample.picture is None or written == num:
                    continue
                content = read_member(tar.path, sample.picture.offset, sample.picture.size)
                info = tarfile.TarInfo(f"{written:06d}.{sample.picture.ext}")
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
                written += 1
    assert written, "no pictures in the data"
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="dinov2-s-imgfocus")
    parser.add_argument("--teachers", nargs="*", help="several, in one pass and each for itself")
    parser.add_argument("--store-inputs", choices=("tokens", "crops"), default="tokens")
    parser.add_argument("--data", nargs="*")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--cut", type=int, default=6)
    parser.add_argument("--targets", default="cls")
    parser.add_argument("--compute")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="64 pictures of 112 px, two rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pictures, arguments.rounds, arguments.size = 64, 2, 112
    return arguments


if __name__ == "__main__":
    main()
