"""Extraction against the bare forward pass of the same network: same batch, same type, same run, interleaved.

    python benchmarks/extract.py --teacher FOLDER --data TAR [--pictures 512] [--rounds 3] [--batch-size 32]

Without --data it draws scenes. Prints the median rates and `extract_over_forward`, 1.0 being the bare forward pass; the
extraction decodes, runs the network, rounds, writes and syncs (loop time, without loading the network and scanning).
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from machine import machine

from emkum.models.catalogue import load_network
from emkum.models.network import normalise
from emkum.models.passes import good_compute
from emkum.shards.datasets.scenes import write_scenes
from emkum.shards.tars import find_tars, read_member, scan_tars
from emkum.stage1_extract.extract import extract
from emkum.stage1_extract.plan import ExtractConfig


def main() -> None:
    arguments = parse()
    compute = arguments.compute or good_compute(torch.device(arguments.device))
    with tempfile.TemporaryDirectory() as folder:
        tar = first_pictures(arguments.data, arguments.pictures, Path(folder))
        forward, whole = [], []
        network = load_network(arguments.teacher).placed(arguments.device, getattr(torch, compute))
        for number in range(arguments.rounds):
            forward.append(forward_rate(network, arguments))
            whole.append(extract_rate(tar, Path(folder) / f"cache{number}", compute, arguments))
            print(f"round {number}: forward {forward[-1]:.1f}/s, extract {whole[-1]:.1f}/s", flush=True)
    ratio = statistics.median(w / f for w, f in zip(whole, forward, strict=True))
    result = {
        "ratios": {"extract_over_forward": round(ratio, 4)},
        "forward_per_second": round(statistics.median(forward), 2),
        "extract_per_second": round(statistics.median(whole), 2),
        "pictures": arguments.pictures,
        "batch_size": arguments.batch_size,
        "size": arguments.size,
        "compute": compute,
        "machine": machine(),
    }
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=1))


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


def extract_rate(tar: Path, cache: Path, compute: str, arguments: argparse.Namespace) -> float:
    result = extract(
        ExtractConfig(
            teacher=(arguments.teacher,),
            data=(str(tar),),
            cache=cache,
            text_encoder="none",
            cut=arguments.cut,
            targets=tuple(arguments.targets.split(",")),
            size=arguments.size,
            compute=compute,
            batch_size=arguments.batch_size,
            device=arguments.device,
        ),
        say=lambda line: None,
    )
    return result.rows / result.loop_seconds


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
