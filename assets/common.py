"""What all modules share: errors in one line, lines on the terminal, JSON files; and the first look
at the command line, before the packages load, which takes seconds.
"""

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

SCRIPT = Path(__file__).parents[1] / "grpo_demo.py"
FLAGS = Path(__file__).with_name("flags.json")  # written by python -m assets.research.flags


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
        with tqdm.external_write_mode(file=sys.stdout):
            print(message, flush=True)


def print_error(message: str) -> None:
    """Print an error or a warning on stderr, on the first process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with tqdm.external_write_mode(file=sys.stderr):
            print(message, file=sys.stderr, flush=True)


def write_json(path: Path, value: dict) -> None:
    """Write JSON with an atomic rename: never a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(value, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def first_process(decide: Callable[[], Any]) -> Any:
    """Call `decide` on the first process; return its result, or raise its error, on all."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    result, error = None, None
    if PartialState().is_main_process:
        try:
            result = decide()
        except (UserError, SystemExit) as stop:
            error = stop
        except Exception as failure:  # of any kind: not all of them can be sent
            error = UserError(str(failure))
    result, error = broadcast_object_list([result, error])
    if error:
        raise error
    return result


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults of all flags, and the description as it is."""


class Flags(argparse.ArgumentParser):
    """All flags, from plain data: TRL's parser, which takes their values, loads torch."""

    def __init__(self, flags: list[list]):
        script = ast.parse(SCRIPT.read_text())
        about = ast.get_docstring(script).split("GRPO in six lines")[0]
        usage = "python grpo_demo.py [--config FILE] [--flag value ...]"
        texts = {"usage": usage, "description": about, "formatter_class": Help}
        super().__init__(allow_abbrev=False, **texts)
        self.add_argument("--config", action="append", metavar="FILE", help="Settings, in YAML.")
        kinds = {"int": int, "float": float, "bool": yes_or_no, "str": str}
        for names, options in flags:
            if "type" in options:
                options["type"] = or_none(kinds[options["type"]])
            self.add_argument(*names, **options)
        constants = {}
        for line in script.body:
            with suppress(AttributeError, ValueError):  # no name = value that can be read here
                constants[line.targets[0].id.lower()] = ast.literal_eval(line.value)
        names = constants.keys() & {options["dest"] for _, options in flags}
        self.set_defaults(**{name: constants[name] for name in names})

    def error(self, message: str):
        """Raise UserError; argparse would print all 200 flags first."""
        raise UserError(message)


def or_none(kind: Callable) -> Callable:
    """Return a type of argparse that takes None too: TRL's parser knows for which flags."""

    @wraps(kind)
    def read(text: str) -> object:
        return text if text.lower() in ("none", "null") else kind(text)

    return read


def yes_or_no(text: str) -> str:
    """Return the text of a yes or no, in one of the ways that transformers reads."""
    if text.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text


def check_flags(argv: list[str]) -> list[str]:
    """Return the command line with `~` and `--config=FILE` written out, or print the help.

    With other versions of the packages, which may have other flags, it is left to TRL's parser.
    UserError for a flag or YAML key that is none, a value of another type, a missing YAML file.
    """
    split = [arg.split("=", 1) if arg.startswith("--config=") else [arg] for arg in argv]
    argv = [os.path.expanduser(arg) for parts in split for arg in parts]
    versions, *flags = json.loads(FLAGS.read_text())
    if any(version(package) != listed for package, listed in versions.items()):
        return argv
    parser = Flags(flags)
    found, unknown = parser.parse_known_args(argv)
    known, strange = vars(found), [("flag", flag) for flag in unknown]
    if len(files := known.pop("config") or []) > 1:
        raise UserError("--config can be given once")
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"--config {file}: there is no such YAML file")
        with as_user_error("settings", yaml.YAMLError):
            settings = yaml.safe_load(Path(file).read_text())
        keys = settings if isinstance(settings, dict) else {}
        texts = {
            key: str(value) for key, value in keys.items() if isinstance(value, str | float | int)
        }
        parser.set_defaults(**{key: texts[key] for key in texts.keys() & known})
        strange += [("key in the YAML file:", key) for key in keys if key not in {"env", *known}]
    for kind, name in strange:
        near = get_close_matches(str(name).lstrip("-"), known, n=1)
        dashes = "--" if str(name).startswith("--") else ""
        hint = f"did you mean {dashes}{near[0]}?" if near else "--help lists all"
        raise UserError(f"unknown {kind} {name}; {hint}")
    parser.parse_args(argv)  # converts the texts of the YAML file too
    return argv


def look_first() -> None:
    """Let `check_flags` end the script before the packages load."""
    try:
        check_flags(sys.argv[1:])
    except UserError as error:
        print_error(f"error: {' '.join(str(error).split())}")
        raise SystemExit(2) from None
