"""Live table of many runs: state, env steps, steps per second, last evaluation, time left."""

import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Literal, Self

from rich import box, table
from rich.live import Live

from levin.core.process import print_line
from levin.scheduler.progress import Progress, read_progress

State = Literal["waiting", "running", "elsewhere", "complete", "stopped", "failed"]
TERMINAL_SECONDS, LINE_SECONDS = 1.0, 30.0  # between two updates of the table, and between two lines without a terminal


class Table:
    """Table of runs in the terminal, or a line every 30 seconds without one. Use it in a `with` statement.

    Args:
        total: Env steps of each complete run, by its folder.
        shared: Folder that the runs share, which is not repeated in their names.
    """

    def __init__(self, total: Mapping[Path, int], shared: Path) -> None:
        self.total, self.shared = dict(total), shared
        # Updated by `show` only: a thread of its own would be copied into the processes of the runs, half-way.
        self._live = (
            Live(auto_refresh=False, redirect_stdout=False, redirect_stderr=False) if sys.stdout.isatty() else None
        )
        self._shown = time.monotonic()
        self._progress: dict[Path, Progress] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def print(self, text: str) -> None:
        """Print a line above the table."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print_line(text)

    def show(self, states: Mapping[Path, State], title: str, *, now: bool = False) -> None:
        """Show the runs in these states, unless they were shown a moment ago."""
        period = LINE_SECONDS if self._live is None else TERMINAL_SECONDS
        if not now and time.monotonic() < self._shown + period:
            return
        self._shown = time.monotonic()
        for run, state in states.items():
            if state in ("running", "elsewhere") or run not in self._progress:
                self._progress[run] = read_progress(run)
        if self._live is not None:
            self._live.update(self._draw(states, title), refresh=True)
            return
        running = [self._describe(run) for run, state in states.items() if state in ("running", "elsewhere")]
        print_line(" · ".join([title, *running]))

    def _describe(self, run: Path) -> str:
        progress = self._progress[run]
        parts = [f"{os.path.relpath(run, self.shared)} {progress.env_steps:,}/{self.total[run]:,} env steps"]
        if progress.steps_per_second is not None:
            parts.append(f"{progress.steps_per_second:,.0f} steps/s")
        if progress.evaluation is not None:
            parts.append(f"evaluation {progress.evaluation:.1f}")
        return ", ".join([*parts, *([f"{left} left"] if (left := self._left(run)) else [])])

    def _left(self, run: Path) -> str:
        progress = self._progress[run]
        if not progress.steps_per_second:
            return ""
        seconds = max(0, self.total[run] - progress.env_steps) / progress.steps_per_second
        return str(timedelta(seconds=round(seconds)))

    def _draw(self, states: Mapping[Path, State], title: str) -> table.Table:
        """Return the table. Of more runs than fit into the terminal, those that wait or are complete are left out."""
        assert self._live is not None
        drawn = table.Table(box=box.SIMPLE, title=f"{self.shared}: {title}", title_justify="left")
        for name in ("run", "state"):
            drawn.add_column(name)
        for name in ("env steps", "steps/s", "last evaluation", "left"):
            drawn.add_column(name, justify="right")
        rows = max(3, self._live.console.height - 6)
        order = ("running", "failed", "elsewhere", "stopped", "waiting", "complete")
        chosen = set(sorted(states, key=lambda run: order.index(states[run]))[:rows])
        for run, state in states.items():
            if run in chosen:
                progress, runs = self._progress[run], state in ("running", "elsewhere")
                drawn.add_row(
                    os.path.relpath(run, self.shared),
                    state,
                    f"{progress.env_steps:,}/{self.total[run]:,}",
                    f"{progress.steps_per_second:,.0f}" if runs and progress.steps_per_second is not None else "",
                    "" if progress.evaluation is None else f"{progress.evaluation:.1f}",
                    self._left(run) if runs else "",
                )
        if len(states) > len(chosen):
            drawn.add_row(f"and {len(states) - len(chosen)} others")
        return drawn
