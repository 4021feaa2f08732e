"""The machine, versions and commit that a benchmark's numbers belong to."""

from __future__ import annotations

import os
import platform
import subprocess

import torch

import emkum


def machine() -> dict[str, str]:
    """Processor or GPU, cores, versions, commit."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), model)
    except OSError:
        pass
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "emkum": emkum.__version__,
        "commit": commit or "unknown",
    }
