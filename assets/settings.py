"""Settings: constants, then YAML, then flags. Refused is what would go wrong silently or late."""

import ast
import json
import math
import os
import re
import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import yaml

import rewards

NOT_SUPPORTED = (  # they would end in other weights, choose by the test, or show a token
    "data_seed dataloader_persistent_workers hub_token ignore_data_skip load_best_model_at_end "
    "push_to_hub resume_from_checkpoint save_only_model sync_ref_model trust_remote_code"
)
NOT_ZERO = (
    "generation_batch_size gradient_accumulation_steps logging_steps lora_alpha max_steps top_p "
    "max_completion_length num_generations num_iterations num_train_epochs save_steps temperature "
    "per_device_eval_batch_size per_device_train_batch_size save_total_limit steps_per_generation"
)
CHOICES = {
    "eval_strategy": "no",  # TRL would sample, and log a mean of its batches' means
    "loss_type": "grpo bnpo dr_grpo dapo luspo cispo sapo vespo",  # of TRL 1.16
    "scale_rewards": "group batch none",
    "importance_sampling_level": "token sequence",
    "save_strategy": "no steps epoch",  # the best would be that on the test questions
}
UNSET = {("max_steps", -1), ("local_rank", -1)}
SAMPLING = "temperature top_p top_k min_p repetition_penalty"  # what --generation_kwargs may have
ADVICE = {  # pattern of a library's error: what to do. inline_container, iostream: of torch.save
    "out of memory|can't allocate memory": "out of memory: try --gradient_checkpointing True, then "
    "--use_peft, a smaller --max_completion_length or a file of assets/cards",
    "No space left|Disk quota|inline_container|iostream": "the disk is full: make room, run again",
}


class UserError(Exception):
    """An error the user can fix: printed as one line, exit status 2."""


@contextmanager
def exit_on_error():
    """End the script with status 2, and one line, for an error that the user can fix."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        advice = [text for known, text in ADVICE.items() if re.search(known, str(error))]
        if os.environ.get("TRACEBACK") or not (advice or isinstance(error, UserError)):
            raise
        print_error(f"error: {' '.join([*advice, str(error)][0].split())}")
        raise SystemExit(2) from None


@contextmanager
def as_user_error(what: str, *kinds: type[Exception]):
    """Turn a library's ValueError, OSError or one of `kinds` into a UserError: `what: message`."""
    try:
        yield
    except (ValueError, OSError, *kinds) as error:
        raise UserError(f"{what}: {error}") from error


def print_once(message: str = "", stream=None, rank: str = "RANK") -> None:
    """Print a line on stdout, on the first process only."""
    if os.environ.get(rank, "0") != "0":
        return
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"  # it may lack a character of a completion
    try:
        print(message.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
    except OSError:  # the terminal, or the reader of a pipe, is gone: the run goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(message: str) -> None:
    """Print an error or a warning on stderr, on the first process of each machine."""
    print_once(message, sys.stderr, "LOCAL_RANK")


def read_names(script: str) -> dict[str, str]:
    """Return all settings with their help, read from source files: nothing is imported."""
    trl, transformers = (Path(find_spec(name).origin).parent for name in ("trl", "transformers"))
    configs, found = [trl / f"trainer/{name}_config.py" for name in ("grpo", "base", "model")], {}
    for file in (script, *configs, transformers / "training_args.py"):
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        nodes = [x for x in ast.walk(tree) if isinstance(x, ast.AnnAssign) and x.col_offset == 4]
        for field in nodes:  # of classes
            texts = [str(x.value) for x in ast.walk(field) if isinstance(x, ast.Constant)]
            found.setdefault(field.target.id, max(texts, key=len, default=""))
    constants = re.findall(r"^([A-Z]\w+) = (.+)", Path(script).read_text(encoding="utf-8"), re.M)
    ours = {name.lower(): text for name, text in constants if name.lower() in found}
    return {**ours, **found, **ours}  # the script's constants come first


def check_names(what: str, given, names: dict[str, str]) -> None:
    """Raise UserError for a name that is no setting; it says the nearest one."""
    for name in given:
        if name not in names:
            near = get_close_matches(str(name).lower(), [*names, "config"], n=1) or ["--help"]
            raise UserError(f"unknown {what} {name}; did you mean {near[0]}?")


def collect(argv: list[str], script: dict[str, object]) -> tuple[dict[str, dict], list[str]]:
    """Return the settings of the script and of each YAML file, and the other flags."""
    names = read_names(script["__file__"])
    if {"-h", "--help"} & {*argv}:
        print_once(script["__doc__"])
        print_once("\n".join(f"  --{name}  {text}" for name, text in names.items()))
        raise SystemExit(0)
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    with as_user_error("settings", ArgumentError):
        files, flags = parser.parse_known_args(argv)
    constants = {name.lower(): value for name, value in script.items() if name.isupper()}
    near = (name for name in constants if get_close_matches(name, names, n=1, cutoff=0.8))
    check_names("constant", near, names)  # what is not near is the user's own
    sources = {"grpo_demo.py": {n: value for n, value in constants.items() if n in names}}
    given = (flag.partition("=")[0] for flag in flags if re.match(r"-[^\d.]", flag))
    given = (flag.replace("-", "_").removeprefix("__").removeprefix("no_") for flag in given)
    check_names("flag", given, names)
    for file in files.config:
        with as_user_error(f"--config {file}", UserError, TypeError, yaml.YAMLError):
            text = Path(file).expanduser().absolute().read_text(encoding="utf-8")
            values = sources[f"--config {file}"] = {**yaml.safe_load(text)}
            check_names("key", values, names)
    return sources, flags


def read(argv: list[str], script: dict[str, object], config_classes: tuple) -> tuple:
    """Return an instance of each class of settings; script: the globals of grpo_demo.py."""
    from trl import TrlParser

    sources, flags = collect(argv, script)
    parser = TrlParser(config_classes, allow_abbrev=False, exit_on_error=False)
    takes = {name: str(kind) for c in config_classes for name, kind in get_type_hints(c).items()}
    for where, values in sources.items():
        with as_user_error(where, UserError, ArgumentError):
            for name, value in values.items():
                kind = type(value).__name__.removesuffix("Type")
                if kind not in ("None", "list", "dict"):
                    value = getattr(parser.parse_known_args([f"--{name}={value}"])[0], name)
                elif kind not in takes[name]:
                    raise UserError(f"{name} cannot be {value}")
                parser.set_defaults(**{name: value})
    flags = [f" {flag}" if re.match(r"-[\d.]", flag) else flag for flag in flags]  # a number
    with as_user_error("settings", TypeError, ImportError, ArgumentError):
        configs = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    check_values(configs[1])  # the first one has checked itself
    return configs


def check_values(args: object) -> None:
    """Refuse what is not supported, out of range or no choice; read texts of JSON."""
    for name, value in list(vars(args).items()):
        if value and name in NOT_SUPPORTED.split():
            raise UserError(f"--{name}: not supported; use --seed, hf upload, or the same command")
        number = isinstance(value, int | float) and (name, value) not in UNSET
        if number and not (0 < value < math.inf or (value == 0 and name not in NOT_ZERO.split())):
            raise UserError(f"--{name} {value}: it must be a positive number")
        if name in CHOICES and value not in CHOICES[name].split():
            raise UserError(f"--{name} {value}: it must be one of {CHOICES[name]}")
        if name.endswith("_kwargs") and isinstance(value, str):
            with as_user_error(f"--{name} {value}: no JSON mapping", TypeError):
                setattr(args, name, {**json.loads(value)})


def check_tools(args: object) -> None:
    """Raise UserError for what would fail after the evaluation, or train something else."""
    from transformers import Trainer

    if args.use_vllm and not find_spec("vllm"):
        raise UserError("--use_vllm needs vLLM: pip install vllm==0.31.0")
    with as_user_error("--optim", ImportError):
        Trainer.get_optimizer_cls_and_kwargs(args)
    if args.loss_type == "cispo" and (args.epsilon_high or args.epsilon) < 1:
        raise UserError("--loss_type cispo: below 1, --epsilon_high scales every gradient; use 5")
    if args.use_transformers_continuous_batching and (args.bf16 or args.fp16):
        raise UserError("continuous batching would cast the weights: add --bf16 False --fp16 False")
    n = len(rewards.REWARD_FUNCS)
    weights = args.reward_weights or [1.0] * n
    with as_user_error(f"--reward_weights {weights}", TypeError):
        args.reward_weights = [float(weight) for weight in weights]
        if len(weights) != n or not 0 < math.hypot(*args.reward_weights) < math.inf:
            raise ValueError(f"give {n} finite numbers, not all 0")
    options = {"temperature": args.temperature, **(args.generation_kwargs or {})}
    with as_user_error(f"--generation_kwargs {options}", UserError, TypeError):
        if other := options.keys() - SAMPLING.split():
            raise UserError(f"not {', '.join(other)}: it may have {SAMPLING}")
        options["temperature"] = float(options["temperature"])  # transformers refuses 1
        check_values(Namespace(**options))
    args.generation_kwargs = options
