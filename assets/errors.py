"""How this project reports errors and writes files. Imports nothing of the project."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm


class UserError(Exception):
    """An error the user can fix: printed as one line, exit status 2."""


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn any exception of a library into a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {error}") from error


def say(message: str = "", error: bool = False) -> None:
    """Print a line, on the first process only; an error, on the first process of each machine."""
    if os.environ.get("LOCAL_RANK" if error else "RANK", "0") == "0":
        with tqdm.external_write_mode(file=(file := sys.stderr if error else sys.stdout)):
            print(message, file=file, flush=True)


def write_json(path: Path, value: dict) -> None:
    """Write JSON with an atomic rename: never a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(value, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def first_process(decide: Callable[[], Any]) -> Any:
    """Call `decide` on the first process; return its result, or raise its error, on all."""
    result = [None, None]
    if PartialState().is_main_process:
        try:
            result[0] = decide()
        except (UserError, SystemExit) as error:
            result[1] = error
        except Exception as error:  # of any kind: not all of them can be sent
            result[1] = UserError(str(error))
    result, error = broadcast_object_list(result)
    if error:
        raise error
    return result
