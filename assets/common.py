"""What all modules share: errors in one line, lines on the terminal, JSON files."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


class UserError(Exception):
    """An error the user can fix: printed as one line, exit status 2."""


@contextmanager
def as_user_error(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a library's ValueError, OSError or one of `kinds` into a UserError: `what: message`."""
    try:
        yield
    except (ValueError, OSError, *kinds) as error:
        raise UserError(f"{what}: {error}") from error


def print_once(message: str = "") -> None:
    """Print a line on stdout, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message)
        sys.stdout.flush()


def print_error(message: str) -> None:
    """Print an error or a warning on stderr, on the first process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)


def write_json(path: Path, value: dict) -> None:
    """Write JSON with an atomic rename: never a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(value, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def first_process(decide: Callable[[], Any]) -> Any:
    """Call `decide` on the first process; return its result, or raise its error, on all."""
    from accelerate import PartialState, utils

    result, error = None, None
    if PartialState().is_main_process:
        try:
            result = decide()
        except (UserError, SystemExit) as stop:
            error = stop
        except Exception as failure:  # of any kind: not all of them can be sent
            error = UserError(str(failure))
    result, error = utils.broadcast_object_list([result, error])
    if error:
        raise error
    return result
