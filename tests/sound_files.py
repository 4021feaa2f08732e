"""Wav and flac files of sines and noise, tars of them, and a tiny random teacher that hears them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from emkum.models.audio import AudioBackbone, AudioSpec
from emkum.models.network import Network, save_network, weights_digest

RATE = 16_000
WIDTH, DEPTH = 16, 3
CONVS = ((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (8, 2, 2))  # data2vec's


def noise(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """float32, within -0.9 and 0.9."""
    return np.random.default_rng(seed).uniform(-0.9, 0.9, round(seconds * rate)).astype(np.float32)


def sine(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(wave: np.ndarray, rate: int, form: str, subtype: str | None = None) -> bytes:
    """wave: [S] or [S, channels]."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sounds_tar(path: Path, count: int, seed: int = 0, shortest: float = 0.1, longest: float = 1.0) -> Path:
    """`count` sounds of several lengths, rates and numbers of channels, wav and flac by turns, each with a txt."""
    members = {}
    lengths = np.random.default_rng(seed).uniform(shortest, longest, count)
    for i, seconds in enumerate(lengths.tolist()):
        rate = (RATE, 44_100, 8_000)[i % 3]
        wave = noise(seconds, rate, seed + i)
        wave = np.stack([wave, wave[::-1]], 1) if i % 4 == 3 else wave
        ext = ("wav", "flac")[i % 2]
        members[f"s{i:04d}.{ext}"] = encoded(wave, rate, ext.upper())
        members[f"s{i:04d}.txt"] = f"sound {i}".encode()
    return write_tar(path, members)


def tiny_ear(name: str = "ear", seed: int = 0, **changes: object) -> Network:
    """A random network of sound."""
    fields = {"heads": 2, "mlp_width": 32, "convs": CONVS, "position_kernel": 5, "position_layers": 2}
    fields |= {"position_groups": 4, "alibi": 1}
    spec = AudioSpec("data2vec2-audio", DEPTH, WIDTH, **(fields | changes))  # type: ignore[arg-type]
    backbone = AudioBackbone(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5, generator=generator)
    backbone.eval().requires_grad_(False)
    weights = weights_digest(backbone)
    return Network(name, spec.family, "audio", backbone, None, None, 0, weights, f"random:{name}", "", "none", "none")


def save_ear(folder: Path, name: str = "ear", seed: int = 0, **changes: object) -> Path:
    save_network(tiny_ear(name, seed, **changes), folder)
    return folder
