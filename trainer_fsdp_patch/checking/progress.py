"""What `check` says while it runs: a bar with the time that is left on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Reporter:
    """Says lines at once, and on a terminal what is running and how long it will take.

    Args:
        console: where to.
        runs: number of runs in all.
    """

    def __init__(self, console: Console, runs: int) -> None:
        self._console, self._runs, self._begun = console, runs, 0
        self._bar: Progress | None = None

    def __enter__(self) -> Reporter:
        if self._console.is_terminal:
            from rich import progress

            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TimeRemainingColumn())
            self._bar = progress.Progress(*columns, console=self._console, transient=True)
            self._bar.add_task("", total=self._runs)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def began(self, text: str) -> None:
        """Another run has begun, and those before it have ended.

        Args:
            text: names the run.
        """
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._begun, description=text)
        self._begun += 1

    def skip_to(self, runs: int) -> None:
        """So many runs are over, whether they were run or not.

        Args:
            runs: number of them.
        """
        self._begun = runs

    def say(self, line: str) -> None:
        """Print a line above the bar.

        Args:
            line: without its end.
        """
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
