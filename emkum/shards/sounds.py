"""From the bytes of a wav or flac file to one channel of float32 numbers at the rate a network hears.

S samples of the wave, one channel.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np

from emkum.errors import BadSound, MissingPackage

DECODER = "libsndfile-float32, mean of channels, soxr-HQ"  # the rule; part of the fingerprint of every field of sounds
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz that a file may state
MAX_CHANNELS = 64
_PIECE_FRAMES = 1 << 16  # decoded at a time, so that many channels at a high rate take little memory
_FORMATS = {"wav": {"WAV", "WAVEX", "RF64"}, "flac": {"FLAC"}}
_UNKNOWN_SIZE = 0xFFFFFFFF  # what programs state that write a wav to a pipe; in an RF64 file: see its ds64 chunk


@dataclass(frozen=True)
class Sound:
    """samples_S: float32, finite. seconds: how long the file is. was_cut: it is longer than what was asked for."""

    samples_S: np.ndarray
    seconds: float
    was_cut: bool


def require_decoder() -> None:
    """Raises MissingPackage unless sounds can be decoded here."""
    try:
        import soundfile  # noqa: F401
        import soxr  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: soundfile without its libsndfile
        raise MissingPackage(
            f"sounds are decoded with soundfile and soxr, and they are not to be had: {error}",
            "pip install 'emkum[audio]'",
        ) from error


def decoder_versions() -> dict[str, str]:
    """What decodes sounds here; recorded beside a field's fingerprint, never compared."""
    import soundfile
    import soxr

    return {"libsndfile": soundfile.__libsndfile_version__, "soxr": soxr.__libsoxr_version__}


def decode_sound(data: bytes, ext: str, rate: int, max_seconds: float) -> Sound:
    """One channel of a file's first `max_seconds`, at `rate` Hz; several channels become their mean.

    Samples of integer types are divided by 2^(bits - 1), those of float types taken as they are. Another rate is
    resampled with soxr ("HQ"), after the cut. Raises BadSound for a file that is damaged, that ends before what its
    header states, that is of another format than its extension says, or that holds no samples, inf or NaN.
    """
    import soundfile
    import soxr

    if ext == "wav":
        _check_wav(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, ext)
            num_frames = min(file.frames, round(max_seconds * file.samplerate))
            mono_S = _mean_of_channels(file, num_frames)
            seconds, file_rate, was_cut = file.frames / file.samplerate, file.samplerate, file.frames > num_frames
    except (soundfile.SoundFileError, OverflowError) as error:
        raise BadSound(f"cannot be decoded: {_line(error)}") from error
    if not np.isfinite(mono_S).all():
        raise BadSound(f"holds inf or NaN among its {len(mono_S):,} samples")
    if file_rate != rate:
        mono_S = np.asarray(soxr.resample(mono_S, file_rate, rate, quality="HQ"), np.float32)
    mono_S = mono_S[: round(max_seconds * rate)]
    return Sound(mono_S, seconds, was_cut)


def _check_header(file: soundfile.SoundFile, ext: str) -> None:  # type: ignore[name-defined]  # noqa: F821
    if file.format not in _FORMATS[ext]:
        raise BadSound(f"is a {file.format} file named .{ext}")
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        raise BadSound(f"states {file.samplerate:,} samples a second; {MIN_RATE:,} to {MAX_RATE:,} are read")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise BadSound(f"states {file.channels} channels; at most {MAX_CHANNELS} are read")
    if not 0 <= file.frames < 1 << 48:  # of a flac that states no length libsndfile says 2^63 - 1
        raise BadSound("states no length")
    if file.frames == 0:
        raise BadSound("holds no samples")


def _mean_of_channels(file: soundfile.SoundFile, num_frames: int) -> np.ndarray:  # type: ignore[name-defined]  # noqa: F821
    mono_S = np.empty(num_frames, np.float32)
    at = 0
    while at < num_frames:
        piece = file.read(min(_PIECE_FRAMES, num_frames - at), dtype="float32", always_2d=True)
        if not len(piece):
            raise BadSound(f"ends after {at:,} samples; its header states {file.frames:,}")
        with np.errstate(over="ignore", invalid="ignore"):  # inf and NaN are looked for afterwards
            mono_S[at : at + len(piece)] = piece[:, 0] if piece.shape[1] == 1 else piece.mean(axis=1)
        at += len(piece)
    return mono_S


def _check_wav(data: bytes) -> None:
    """The chunks lie within the file: libsndfile reads what there is of one that was cut off, and says nothing."""
    if data[:4] not in (b"RIFF", b"RF64") or data[8:12] != b"WAVE":
        return  # libsndfile says what it is
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])[0]
        if name == b"data":
            if size == _UNKNOWN_SIZE and data[:4] == b"RIFF":
                raise BadSound("states no length: it was written to a pipe")
            if size != _UNKNOWN_SIZE and at + 8 + size > len(data):
                raise BadSound(f"states {size:,} bytes of samples; {len(data) - at - 8:,} are there")
            return
        at += 8 + size + size % 2
    raise BadSound("holds no samples: no data chunk lies within its bytes")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # libsndfile names the Python object it reads from, with its address: another one every time.
    return text.rpartition(">: ")[2] or text
