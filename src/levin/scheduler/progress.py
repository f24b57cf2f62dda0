"""Read how far a run is from its metrics.csv, without reading the whole file."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from levin.results.curves import METRICS

TAIL = 1 << 16  # bytes at the end of the file that are read


@dataclass(frozen=True)
class Progress:
    """Last numbers of a run; None where it has none yet."""

    env_steps: int = 0
    steps_per_second: float | None = None
    evaluation: float | None = None  # mean return of the last evaluation


def read_progress(run: Path) -> Progress:
    """Return the last numbers in a run's metrics.csv. An incomplete last line is left out."""
    try:
        with (run / METRICS).open("rb") as file:
            header = file.readline().decode(errors="replace")
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return Progress()
    names = next(csv.reader([header]), [])
    rows = [dict(zip(names, row, strict=True)) for row in csv.reader(lines) if len(row) == len(names)]

    def last(name: str) -> float | None:
        return next((float(row[name]) for row in reversed(rows) if row.get(name)), None)

    return Progress(int(last("env_steps") or 0), last("time/env_steps_per_second"), last("eval/return_mean"))
