"""Train the seeds that a file of learning curves lacks, and write it."""

import csv
import gzip
from collections.abc import Callable, Iterable
from pathlib import Path


def train_missing(file: str, seeds: str, columns: tuple[str, ...], train: Callable[[int], Iterable[tuple]]) -> None:
    """Train the seeds that the file lacks, and write it after each.

    Args:
        file: Path of the curves, a CSV file packed by gzip.
        seeds: Seeds, separated by spaces.
        columns: Names of the columns; the first is `seed`.
        train: Function that trains a seed and returns its rows, without the seed.
    """
    rows: list[tuple] = []
    if Path(file).is_file():
        with gzip.open(file, "rt") as old:
            rows = [tuple(row[column] for column in columns) for row in csv.DictReader(old)]
    for seed in map(int, seeds.split()):
        if any(int(row[0]) == seed for row in rows):
            continue
        rows += [(seed, *row) for row in train(seed)]
        with gzip.GzipFile(file, "wb", mtime=0) as packed:
            text = "\n".join(",".join(map(str, row)) for row in [columns, *rows])
            packed.write(f"{text}\n".encode())
