"""What each way to store activations loses, in bytes and in time, on real activations of a real network.

    python benchmarks/codec.py [--pictures 128] [--statistics 256]

DINOv2-S of ../shared/weights (or $EMKUM_SHARED/weights) on Flickr8k pictures of ../shared/data, float32, 224 px, at
every cut: the tokens before the first block (cut 0), after each block, and after the final norm. The channel statistics
of int8 come from other pictures than those that are stored. Times are of the processor alone, without a disk.

    float16, bfloat16   rounded
    int8                ours: per token, after standardising each channel (docs/format.md, section 4)
    int8 per token      without standardising: one large channel takes the levels of all others
    fp8                 float8_e4m3fn with a scale per token, as many bytes as int8

"relative L2" is |decoded - value| / |value|, over all pictures and for the worst one; "standardised" the same after
every channel was centred and divided by its deviation, so that a channel counts as much as any other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import machine
from torch import Tensor

from emkum.models.catalogue import load_network
from emkum.models.network import Network, normalise
from emkum.models.quantise import decode_int8, encode_int8
from emkum.shards.tars import find_tars, read_member, scan_tars
from emkum.shards.views import ViewPolicy, box_for, decode_view

SHARED = Path(os.environ.get("EMKUM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
TIMED_ROWS = 32
ROUNDS = 9


def main() -> None:
    arguments = parse()
    weights, tars = SHARED / "weights" / "dinov2-small-imgfocus", SHARED / "data" / "pairs"
    if not weights.is_dir() or not list(tars.glob("flickr8k_train_*.tar")):
        print(
            f"skipped: no DINOv2-S and Flickr8k under {SHARED}; set EMKUM_SHARED to the folder with weights/ and data/"
        )
        print(json.dumps({"ratios": {}, "skipped": f"nothing under {SHARED}", "machine": machine()}))
        return
    network = load_network(str(weights))
    crops = crops_of(sorted(tars.glob("flickr8k_train_*.tar"))[0], arguments.statistics + arguments.pictures)
    moments = channel_moments(network, crops[: arguments.statistics], arguments.batch)
    codecs = {name: [codec(*m) for m in moments] for name, codec in CODECS.items() if available(name)}
    errors = {name: [Error() for _ in moments] for name in codecs}
    timed: list[Tensor] = []
    for layers in activations(network, crops[arguments.statistics :], arguments.batch):
        for cut, values_BTD in enumerate(layers):
            for name, of_cut in codecs.items():
                codec = of_cut[cut]
                errors[name][cut].add(values_BTD, codec.decode(codec.encode(values_BTD)), *moments[cut])
        timed = timed or [layers[len(layers) // 2][:TIMED_ROWS]]
    costs = measure(codecs, timed[0])
    labels = [f"cut {cut}" for cut in range(network.depth + 1)] + ["final"]
    print_tables(labels, errors, costs)
    result = {
        "ratios": ratios(errors, costs),
        "relative_l2": {
            name: {k: e.table() for k, e in zip(labels, found, strict=True)} for name, found in errors.items()
        },
        "costs": costs,
        "row_shape": list(timed[0].shape[1:]),
        "pictures": arguments.pictures,
        "statistics_from": arguments.statistics,
        "machine": machine(),
    }
    print(json.dumps(result) if arguments.json else json.dumps({k: result[k] for k in ("ratios", "machine")}, indent=1))


# --- activations -------------------------------------------------------------------------------------------------


def crops_of(tar: Path, num: int) -> Tensor:
    """uint8 [N, 224, 224, 3]: the centred crops of the first pictures."""
    found, policy = [], ViewPolicy()
    for source in scan_tars(find_tars([str(tar)])):
        for sample in source.samples[:num]:
            assert sample.picture is not None
            data = read_member(source.path, sample.picture.offset, sample.picture.size)
            key = sample.key
            crop, _ = decode_view(data, 224, lambda w, h, key=key: box_for(policy, tar.name, key, 0, w, h))
            found.append(torch.from_numpy(crop))
    return torch.stack(found)


@torch.inference_mode()
def activations(network: Network, crops_NHWC: Tensor, batch: int) -> Iterator[list[Tensor]]:
    """Per batch, the tokens_BTD at every cut and after the final norm."""
    for crops_BHWC in crops_NHWC.split(batch):
        images_BCHW = normalise(network, crops_BHWC)
        tokens_BTD = network.backbone.embed(images_BCHW)
        grid = network.backbone.grid(*images_BCHW.shape[2:])
        hidden = network.backbone.run(tokens_BTD, grid=grid).hidden
        yield [tokens_BTD, *hidden, network.backbone.finish(hidden[-1])]


def channel_moments(network: Network, crops_NHWC: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Mean and deviation of every channel at every cut, as extraction freezes them."""
    count, totals, squares = 0, [], []
    for layers in activations(network, crops_NHWC, batch):
        count += layers[0].shape[0] * layers[0].shape[1]
        sums = [values.double().sum((0, 1)) for values in layers]
        square_sums = [values.double().square().sum((0, 1)) for values in layers]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        squares = [a + b for a, b in zip(squares, square_sums, strict=True)] if squares else square_sums
    found = []
    for total, square in zip(totals, squares, strict=True):
        mean, std = total / count, (square / count - (total / count) ** 2).clamp_min(0).sqrt()
        found.append((mean.float(), torch.where(std > 1e-6, std, 1.0).float()))
    return found


# --- codecs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codec:
    """encode: float32 [B, T, D] to what is stored; decode: back to float32."""

    encode: Callable[[Tensor], tuple[Tensor, ...]]
    decode: Callable[[tuple[Tensor, ...]], Tensor]


def rounded(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Codec]:
    return lambda mean_D, std_D: Codec(lambda values: (values.to(dtype),), lambda stored: stored[0].float())


def ours(mean_D: Tensor, std_D: Tensor) -> Codec:
    return Codec(
        lambda values: encode_int8(values, mean_D, std_D),
        lambda stored: decode_int8(stored[0], stored[1], mean_D, std_D),
    )


def int8_per_token(mean_D: Tensor, std_D: Tensor) -> Codec:
    return ours(torch.zeros_like(mean_D), torch.ones_like(std_D))


def fp8_per_token(mean_D: Tensor, std_D: Tensor) -> Codec:
    def encode(values: Tensor) -> tuple[Tensor, ...]:
        scale = values.abs().amax(-1) / torch.finfo(torch.float8_e4m3fn).max
        scale = torch.where(scale == 0, 1.0, scale)
        return (values / scale[..., None]).to(torch.float8_e4m3fn), scale

    return Codec(encode, lambda stored: stored[0].float() * stored[1][..., None])


CODECS: dict[str, Callable[[Tensor, Tensor], Codec]] = {
    "float16": rounded(torch.float16),
    "bfloat16": rounded(torch.bfloat16),
    "int8": ours,
    "int8 per token": int8_per_token,
    "fp8": fp8_per_token,
}


def available(name: str) -> bool:
    return name != "fp8" or hasattr(torch, "float8_e4m3fn")


# --- what is measured --------------------------------------------------------------------------------------------


class Error:
    """Sums of squares of errors and values of one codec at one cut."""

    def __init__(self) -> None:
        self._errors: list[Tensor] = []  # per picture: plain, standardised
        self._values: list[Tensor] = []

    def add(self, values_BTD: Tensor, decoded_BTD: Tensor, mean_D: Tensor, std_D: Tensor) -> None:
        difference = (decoded_BTD - values_BTD).double()
        standardised = ((values_BTD - mean_D) / std_D).double()
        self._errors.append(torch.stack([squares(difference), squares(difference / std_D)]))
        self._values.append(torch.stack([squares(values_BTD.double()), squares(standardised)]))

    def table(self) -> dict[str, float]:
        errors, values = torch.cat(self._errors, 1), torch.cat(self._values, 1)
        plain, standardised = (errors.sum(1) / values.sum(1)).sqrt().tolist()
        worst = float((errors[0] / values[0]).sqrt().max())
        return {"mean": plain, "worst_picture": worst, "standardised": standardised}


def squares(values_BTD: Tensor) -> Tensor:
    return values_BTD.square().sum((1, 2))


@torch.inference_mode()
def measure(codecs: dict[str, list[Codec]], values_BTD: Tensor) -> dict[str, dict[str, float]]:
    """Bytes of a row, and microseconds to encode and decode one: medians of rounds in which all take their turn."""
    found: dict[str, dict[str, list[float]]] = {name: {"encode_us": [], "decode_us": []} for name in codecs}
    bytes_per_row = {}
    for round_number in range(ROUNDS + 1):  # the first one warms up
        for name, of_cut in codecs.items():
            codec = of_cut[len(of_cut) // 2]
            started = time.perf_counter()
            stored = codec.encode(values_BTD)
            encoded = time.perf_counter()
            codec.decode(stored)
            if round_number:
                found[name]["encode_us"].append((encoded - started) / len(values_BTD) * 1e6)
                found[name]["decode_us"].append((time.perf_counter() - encoded) / len(values_BTD) * 1e6)
            bytes_per_row[name] = sum(tensor.nbytes for tensor in stored) / len(values_BTD)
    return {
        name: {"bytes_per_row": bytes_per_row[name]} | {k: round(statistics.median(v), 1) for k, v in times.items()}
        for name, times in found.items()
    }


def ratios(errors: dict[str, list[Error]], costs: dict[str, dict[str, float]]) -> dict[str, float]:
    tables = {name: [error.table() for error in found] for name, found in errors.items()}
    ours = tables["int8"]
    found = {
        "int8_relative_l2_worst_cut": max(table["mean"] for table in ours),
        "int8_relative_l2_worst_picture": max(table["worst_picture"] for table in ours),
        "int8_relative_l2_mean_of_cuts": statistics.mean(table["mean"] for table in ours),
        "int8_over_float16_bytes": costs["int8"]["bytes_per_row"] / costs["float16"]["bytes_per_row"],
    }
    for name in ("int8 per token", "fp8"):
        if name in tables:
            both = zip(tables[name], ours, strict=True)
            found[f"{name.replace(' ', '_')}_over_int8_error"] = statistics.median(
                a["mean"] / b["mean"] for a, b in both
            )
    return {name: round(value, 5) for name, value in found.items()}


def print_tables(labels: list[str], errors: dict[str, list[Error]], costs: dict[str, dict[str, float]]) -> None:
    for key, title in (("mean", "relative L2"), ("worst_picture", "worst picture"), ("standardised", "standardised")):
        print(f"\n{title:14}" + "".join(f"{name:>16}" for name in errors))
        for cut, label in enumerate(labels):
            print(f"{label:14}" + "".join(f"{found[cut].table()[key]:16.5f}" for found in errors.values()))
    print(f"\n{'':14}" + "".join(f"{name:>16}" for name in costs))
    for key, title in (("bytes_per_row", "bytes a row"), ("encode_us", "encode us"), ("decode_us", "decode us")):
        print(f"{title:14}" + "".join(f"{cost[key]:16,.0f}" for cost in costs.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=128, help="that are stored")
    parser.add_argument("--statistics", type=int, default=256, help="other pictures, for the statistics of int8")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="32 pictures, statistics of 32 others")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pictures, arguments.statistics = 32, 32
    if arguments.pictures + arguments.statistics > 1000:
        parser.error("the tar has 1,000 pictures")
    return arguments


if __name__ == "__main__":
    main()
