"""From wav and flac bytes to what a network hears; damaged, cut and lying files."""

from __future__ import annotations

import random

import numpy as np
import pytest

from emkum.errors import BadSound, MissingPackage
from emkum.shards.sounds import decode_sound, require_decoder
from tests.sound_files import RATE, encoded, noise, sine


def heard(data: bytes, ext: str = "wav", max_seconds: float = 30.0) -> np.ndarray:
    return decode_sound(data, ext, RATE, max_seconds).samples_S


def refused(data: bytes, ext: str = "wav") -> str:
    with pytest.raises(BadSound) as error:
        decode_sound(data, ext, RATE, 30.0)
    return error.value.what


@pytest.mark.parametrize(
    ("subtype", "worst"),
    [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-23), ("FLOAT", 0), ("DOUBLE", 2**-24)],
)
def test_every_kind_of_wav_is_read_as_it_was_written(subtype: str, worst: float) -> None:
    wave = noise(0.5)
    sound = decode_sound(encoded(wave, RATE, "WAV", subtype), "wav", RATE, 30.0)
    assert sound.samples_S.dtype == np.float32
    assert (sound.seconds, sound.was_cut, len(sound.samples_S)) == (0.5, False, 8000)
    assert np.abs(sound.samples_S - wave).max() <= worst


@pytest.mark.parametrize(("form", "ext"), [("FLAC", "flac"), ("WAVEX", "wav"), ("RF64", "wav")])
def test_other_containers(form: str, ext: str) -> None:
    wave = noise(0.3)
    assert np.abs(heard(encoded(wave, RATE, form, "PCM_16"), ext) - wave).max() <= 2**-15


def test_channels_are_averaged() -> None:
    left, right = noise(0.2, seed=1), noise(0.2, seed=2)
    data = encoded(np.stack([left, right], 1), RATE, "WAV", "FLOAT")
    np.testing.assert_allclose(heard(data), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 999_983 // 2])
def test_another_rate_is_resampled(rate: int) -> None:
    found = heard(encoded(sine(440, 1.0, rate), rate, "WAV", "FLOAT"))
    assert abs(len(found) - RATE) <= 1
    inner = slice(400, 15_600)
    assert np.abs(found[inner] - sine(440, 1.0, RATE)[inner]).max() < 1e-4
    np.testing.assert_array_equal(found, heard(encoded(sine(440, 1.0, rate), rate, "WAV", "FLOAT")))


def test_what_a_lower_rate_cannot_hold_is_filtered_out() -> None:
    found = heard(encoded(sine(12_000, 1.0, 48_000), 48_000, "WAV", "FLOAT"))
    assert np.abs(found[400:-400]).max() < 1e-4  # it would come back as 4 kHz


def test_a_long_sound_is_cut_and_says_so() -> None:
    wave = noise(2.0)
    sound = decode_sound(encoded(wave, RATE, "WAV", "FLOAT"), "wav", RATE, 0.75)
    np.testing.assert_array_equal(sound.samples_S, wave[:12_000])
    assert (sound.was_cut, sound.seconds) == (True, 2.0)
    assert not decode_sound(encoded(wave, RATE, "WAV", "FLOAT"), "wav", RATE, 2.0).was_cut
    assert len(heard(encoded(noise(2.0, 44_100), 44_100, "FLAC"), "flac", 0.75)) == 12_000
    assert len(heard(encoded(noise(2.0, 8_000), 8_000, "WAV"), "wav", 0.7777)) == 12_443  # soxr gives 12,444


def test_silence_is_a_sound() -> None:
    assert not heard(encoded(np.zeros(1000), RATE, "WAV")).any()


def test_a_file_that_ends_early_is_refused() -> None:
    wav, flac = encoded(noise(0.5), RATE, "WAV"), encoded(noise(0.5), RATE, "FLAC")
    assert refused(wav[:-10]) == "states 16,000 bytes of samples; 15,990 are there"
    assert "cannot be decoded" in refused(flac[:-100], "flac")
    assert "cannot be decoded" in refused(flac[: len(flac) // 2], "flac")
    assert refused(wav[:40]) == "holds no samples: no data chunk lies within its bytes"


def test_a_flipped_byte_of_flac_is_noticed() -> None:
    flac = bytearray(encoded(noise(0.5), RATE, "FLAC"))
    flac[len(flac) // 2] ^= 0xFF
    assert "cannot be decoded" in refused(bytes(flac), "flac")


def test_headers_that_cannot_be_are_refused() -> None:
    wav = encoded(noise(0.5), RATE, "WAV")
    at = wav.index(b"data") + 4
    assert refused(wav[:at] + b"\xff" * 4 + wav[at + 4 :]) == "states no length: it was written to a pipe"
    fast = wav[:24] + (5_000_000).to_bytes(4, "little") + wav[28:]
    assert refused(fast) == "states 5,000,000 samples a second; 1,000 to 768,000 are read"
    assert refused(encoded(np.zeros(0), RATE, "WAV")) == "holds no samples"
    flac = bytearray(encoded(noise(0.5), RATE, "FLAC"))
    flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])  # total samples in STREAMINFO: unknown
    assert refused(bytes(flac), "flac") == "states no length"


def test_the_extension_must_be_true() -> None:
    assert refused(encoded(noise(0.1), RATE, "FLAC"), "wav") == "is a FLAC file named .wav"
    assert refused(encoded(noise(0.1), RATE, "WAV"), "flac") == "is a WAV file named .flac"
    assert refused(encoded(noise(0.1), RATE, "OGG", "VORBIS"), "wav") == "is a OGG file named .wav"
    assert "cannot be decoded" in refused(b"no sound" * 100)
    assert "cannot be decoded" in refused(b"")


def test_numbers_that_are_none_are_refused() -> None:
    wave = noise(0.1)
    wave[7] = np.nan
    assert refused(encoded(wave, RATE, "WAV", "FLOAT")) == "holds inf or NaN among its 1,600 samples"
    wave[7] = np.inf
    assert (
        refused(encoded(np.stack([wave, wave], 1), RATE, "WAV", "FLOAT")) == "holds inf or NaN among its 1,600 samples"
    )


def test_the_same_damage_always_has_the_same_reason() -> None:
    """Reasons are part of a cache's digest: no address of an object may be in them."""
    broken = encoded(noise(0.5), RATE, "FLAC")[:-100]
    reasons = {refused(broken, "flac") for _ in range(3)} | {refused(b"no sound" * 100)}
    assert len(reasons) == 2
    assert not any("0x" in reason or "BytesIO" in reason for reason in reasons)


def test_whatever_the_bytes_are_the_answer_is_a_sound_or_a_reason() -> None:
    draw = random.Random(0)
    originals = [encoded(noise(0.2), RATE, "WAV"), encoded(noise(0.2), RATE, "FLAC"), encoded(noise(0.2), 8000, "RF64")]
    for _ in range(300):
        data = bytearray(draw.choice(originals))
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(len(data) if draw.random() < 0.5 else 64)] = draw.randrange(256)
        try:
            sound = decode_sound(bytes(data[: draw.randrange(len(data))] if draw.random() < 0.2 else data),
                                 draw.choice(["wav", "flac"]), RATE, 1.0)  # fmt: skip
        except BadSound:
            continue
        assert np.isfinite(sound.samples_S).all()
        assert len(sound.samples_S) <= RATE


def test_without_the_packages_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    require_decoder()
    monkeypatch.setitem(__import__("sys").modules, "soxr", None)
    with pytest.raises(MissingPackage, match="sounds are decoded with soundfile and soxr") as error:
        require_decoder()
    assert error.value.way_out == "pip install 'emkum[audio]'"
    assert error.value.exit_code == 2
