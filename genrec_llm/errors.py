"""Errors for the person who made the mistake: what is wrong, where, and how to mend it, all at once."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence

EXIT_CODE = 2
_SHOWN = 3  # examples that one problem shows; the count is always given


class GenRecError(Exception):
    """Base of the errors that a user can mend.

    Args:
        problems: one problem or several; each names the place (file, row, column, key) and the mend.
    """

    alone: bool = False
    """Met by one process of several: it is printed by whichever that is."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(GenRecError):
    """An interaction log, an item file or an id is not what it has to be."""


class ConfigError(GenRecError):
    """Arguments, a YAML file, a backbone or a run directory do not fit together."""


class ExportError(GenRecError):
    """An artifact could not be written, or does not reproduce the model it came from."""


def exits_cleanly(main: Callable[[], None]) -> Callable[[], None]:
    """Turn a `GenRecError` that leaves a program's `main` into its text on stderr and exit code 2.

    Under a launcher every rank meets the same error, but for those it meets `alone`: the first of a host prints it.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except GenRecError as error:
            if error.alone or os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
                sys.stdout.flush()
                for problem in error.problems:
                    print(f"error: {problem}", file=sys.stderr, flush=True)
            sys.exit(EXIT_CODE)
        except KeyboardInterrupt:
            if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
                print("\nstopped; what was whole before is still there", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)  # so that a shell's loop over such commands ends as well

    return wrapped


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(examples: Iterable[str]) -> str:
    """The first examples of a problem, with dots where there are more: `'x', 'y', 'z', ...`."""
    first = list(itertools.islice(examples, _SHOWN + 1))
    return ", ".join([*first[:_SHOWN], *(["..."] if len(first) > _SHOWN else [])])
