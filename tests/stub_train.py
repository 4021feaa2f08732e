"""Stands for `emkum train` in tests of what starts it: a run folder in no time, without torch.

BEHAVIOUR (environment): by the name of a variant's folder, `fail`, `die`, `stay` until SIGTERM, `meet` another, or a
score to which the seed is added. Every start and end is a line of LOG.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 60


def main() -> None:
    arguments = sys.argv[1:]
    folder = Path(arguments[arguments.index("--run-dir") + 1])
    asked = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    behaviour = json.loads(os.environ["BEHAVIOUR"]).get(folder.parent.name, 10.0)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{folder.parent.name}/{folder.name}"

    def tell(word: str) -> None:
        with Path(os.environ["LOG"]).open("a") as log:
            log.write(f"{word} {name}{' --resume' if '--resume' in arguments else ''}\n")

    def write(status: str, **more: Any) -> None:
        info = {
            "recipe": asked["recipe"],
            "seed": asked["seed"],
            "live": asked["live"],
            "cache": {"uuid": asked["cache"]["uuid"], "path": "c"},
            "identity": {"fields": dict.fromkeys(asked["cache"]["fields"], "")},
            "device": os.environ.get("DEVICE", "cpu"),
            "total_steps": 5,
            "status": status,
        }
        written = folder / ".run.json"
        written.write_text(json.dumps(info | more))
        written.replace(folder / "run.json")

    def stop(*_: Any) -> None:
        write("interrupted")
        tell("stopped")
        os._exit(75)

    def stop_by_terminal(*_: Any) -> None:
        tell("reached by SIGINT:")
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop_by_terminal)  # explicitly: it may be ignored where the tests run
    write("running")
    tell("start")
    if behaviour == "fail":
        write("failed", error="training diverged")
        print("emkum: UsageError: training diverged: the loss is nan at step 3 | lower the rate", file=sys.stderr)
        sys.exit(2)
    if behaviour == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while behaviour == "stay" and time.monotonic() < deadline:
        time.sleep(0.01)
    while behaviour == "meet" and Path(os.environ["LOG"]).read_text().count("start") < 2:
        if time.monotonic() > deadline:
            sys.exit("nobody came")
        time.sleep(0.01)
    score = (behaviour if isinstance(behaviour, float) else 10.0) + asked["seed"]
    (folder / "metrics.csv").write_text(
        f"step,lr,seconds,val_mean_recall,val_text_to_image_R@1\n5,0.1,2,,\n5,,,{score - 1},{2 * score}\n"
    )
    seconds = float(os.environ.get("SECONDS", "2")) * (5 if asked["live"] else 1)
    write(
        "finished",
        steps=5,
        seconds=seconds,
        samples_per_second=40 / seconds,
        peak_memory_bytes=2**30,
        score={"name": "mean recall", "value": score, "step": 5, "split": "val"},
    )
    tell("end")


if __name__ == "__main__":
    main()
