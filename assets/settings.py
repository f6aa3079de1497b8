"""Settings: read constants, YAML and flags; refuse what would fail late, or never, in one line.

`read` loads no large package, so that `--help` and a wrong value are answered at once; the checks
that need those follow. What libraries refuse clearly is left to them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from assets.common import UserError, as_user_error, print_error

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from trl import GRPOConfig, GRPOTrainer

FLAGS = Path(__file__).with_name("flags.json")  # written by python -m assets.research.flags
NOT_SUPPORTED = {
    "trust_remote_code": "the script runs no code from a model's repository",
    "resume_from_checkpoint": "run the same command again, it resumes",
    "push_to_hub": "it would upload W&B files and completions. After training: hf upload YOU/NAME "
    "OUTPUT_DIR . --exclude 'wandb/*' --exclude 'completions/*' --exclude 'checkpoint-*/*' "
    "--exclude run.json",
    "hub_token": "it would be logged. Set the environment variable HF_TOKEN",
    "save_only_model": "such a checkpoint cannot be resumed",
    "ignore_data_skip": "a resumed run would train on the same questions again",
    "dataloader_persistent_workers": "a resumed run would draw other random numbers",
    "load_best_model_at_end": "it would choose the model by the test questions",
    "remove_unused_columns": "the rewards need the answers",
    "use_liger_kernel": "TRL deprecates it",
}
PATHS = "model_name_or_path dataset_name output_dir"
RANGES = {  # what is said: what must hold, for which settings
    "a name": (bool, f"run_name project {PATHS}"),
    "above 0": (
        lambda x: 0 < x < math.inf,
        "adam_epsilon generation_batch_size gradient_accumulation_steps logging_steps lora_alpha "
        "lora_r max_completion_length max_prompt_length num_generations num_iterations "
        "num_train_epochs per_device_eval_batch_size per_device_train_batch_size "
        "repetition_penalty save_steps save_total_limit steps_per_generation temperature top_p "
        "vllm_gpu_memory_utilization vllm_tensor_parallel_size",
    ),
    "0 or above": (
        lambda x: 0 <= x < math.inf,
        "beta epsilon eval_generations eval_samples learning_rate max_grad_norm "
        "num_completions_to_print print_steps seed top_k warmup_steps weight_decay",
    ),
    "from 0 to 1": (
        lambda x: 0 <= x <= 1,
        "adam_beta1 adam_beta2 lora_dropout min_p top_p vllm_gpu_memory_utilization",
    ),
    "-1 (all), or above 0": (lambda x: x == -1 or x > 0, "max_steps"),
    "True": (bool, "dataloader_in_order"),  # else chance would order the questions
}
CHOICES = {  # which the libraries would refuse late
    "loss_type": "grpo bnpo dr_grpo dapo luspo cispo sapo vespo",  # TRL 1.16
    "scale_rewards": "group batch none",
    "importance_sampling_level": "token sequence",
    "logging_strategy": "steps epoch",
    "save_strategy": "no steps epoch",  # the best would be that on the test questions
    "vllm_mode": "colocate server",
}
FIXED_OPTIONS = {  # of generation: which cannot be set there
    "--num_generations sets the group": "num_return_sequences n",
    "use --max_completion_length": "max_new_tokens max_length max_tokens",
    "a group is sampled; greedy answers would all be equal": "num_beams do_sample",
    "write it in generation_config.json in the model's folder": "eos_token_id",
    "TRL needs the tokens alone": "return_dict_in_generate",
}


def yes_or_no(text: str) -> bool:
    """Return the truth of a yes or no, in one of the ways that transformers reads."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def mapping(text: str) -> str:
    """Return the text of a JSON mapping, which transformers reads."""
    with suppress(ValueError):
        if isinstance(json.loads(text), dict):
            return text
    raise argparse.ArgumentTypeError(f'{text!r} is no JSON mapping, such as {{"a": 0.9}}')


def or_none(kind: Callable) -> Callable:
    """Return a type of argparse that reads None too."""

    @wraps(kind)
    def read(text: str) -> object:
        return None if text.lower() in ("none", "null") else kind(text)

    return read


class Parser(argparse.ArgumentParser):
    """All flags, from plain data: TRL's parser, which wrote them, takes seconds to load."""

    def __init__(self, about: str):
        usage = "python grpo_demo.py [--config FILE] [--flag value ...]"
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=usage, description=about, formatter_class=form, allow_abbrev=False)
        text = "Settings, in YAML; of several files, the last one that has a key wins."
        self.add_argument("--config", action="append", default=[], metavar="FILE", help=text)
        self.takes: dict[str, list[str]] = {}  # setting -> what it takes beside one value
        kinds = {"int": int, "float": float, "bool": yes_or_no, "str": str}
        for names, takes, options in json.loads(FLAGS.read_text()):
            options["help"] += " (default: %(default)s)"
            if options["dest"] in CHOICES:
                options["choices"] = CHOICES[options["dest"]].split()
            if "type" in options:
                kind = mapping if names[0].endswith("_kwargs") else kinds[options["type"]]
                optional = "None" in takes and kind is not str and options.get("nargs") != "+"
                options["type"] = or_none(kind) if optional else kind
            action = self.add_argument(*names, **options)
            self.takes.setdefault(action.dest, takes)

    def error(self, message: str):
        """Raise UserError; argparse would print all 200 flags first."""
        raise UserError(message)

    def refuse(self, what: str, name: object) -> None:
        """Raise the UserError for a name that is no setting."""
        dashes = "--" if what == "flag" else ""
        known = [*self.takes, "config"] if dashes else self.takes
        near = get_close_matches(str(name).lstrip("-").lower(), known, n=1)
        hint = f"did you mean {dashes}{near[0]}?" if near else "--help lists all"
        raise UserError(f"unknown {what} {name}; {hint}")

    def override(self, settings: dict[str, object]) -> None:
        """Make settings the defaults of their flags; each value is read as the flag reads it."""
        flags, kept = [], {}
        for name, value in settings.items():
            kind = {type(None): "None", list: "list", dict: "dict"}.get(type(value), "")
            if kind and kind not in self.takes[name]:
                self.error(f"{name}: {json.dumps(value, default=str)} is no value for it")
            if kind == "list":
                read = [vars(self.parse_args([f"--{name}={item}"]))[name] for item in value]
                kept[name] = [x[0] if isinstance(x, list) else x for x in read]
            elif kind:
                kept[name] = value
            else:
                flags += [f"--{name}={value}"]
        read = vars(self.parse_args(flags))
        self.set_defaults(**{name: read[name] for name in settings} | kept)

    def read_yaml(self, file: str) -> None:
        """Make the settings in a YAML file the defaults of their flags."""
        with as_user_error(f"--config {file}", UserError, yaml.YAMLError):
            if not os.path.isfile(path := os.path.expanduser(file)):
                raise UserError(f"there is no such YAML file (in {os.getcwd()})")
            settings = yaml.safe_load(Path(path).read_text())
            if not isinstance(settings, dict):
                raise UserError("it must hold lines of YAML like `beta: 0.1`")
            for key in settings:
                if key not in self.takes:
                    self.refuse("key", key)
            self.override(settings)


def read(argv: list[str], script: dict[str, object]) -> dict[str, object]:
    """Return the value of each setting: constants, overridden by YAML files, overridden by flags.

    script  the globals of grpo_demo.py: its constants, and its docstring for `--help`

    UserError names an unknown flag or YAML key, and a value that is of another type, out of range
    or no choice.
    """
    parser = Parser(script["__doc__"].split("GRPO in six lines")[0])
    constants = {name.lower(): value for name, value in script.items() if name.isupper()}
    with as_user_error("grpo_demo.py", UserError):
        parser.override({name: x for name, x in constants.items() if name in parser.takes})
    for name in (name for name in constants if name not in parser.takes):
        if near := get_close_matches(name, parser.takes, n=1, cutoff=0.8):  # not a user's own
            raise UserError(f"unknown constant {name.upper()}; did you mean {near[0].upper()}?")
    for file in parser.parse_known_args(argv)[0].config:
        parser.read_yaml(file)
    values, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        parser.refuse("flag", flag)
    values = vars(values)
    check_values(values)
    del values["config"]
    return values | {name: os.path.expanduser(values[name]) for name in PATHS.split()}


def look_first(script: dict[str, object]) -> None:
    """End the script for `--help` and wrong settings before the packages load, which takes 6 s."""
    try:
        read(sys.argv[1:], script)
    except UserError as error:
        print_error(f"error: {' '.join(str(error).split())}")
        raise SystemExit(2) from None


def check_values(values: dict[str, object]) -> None:
    """Raise UserError for a setting that is not supported or out of range; some may be missing."""
    for name, instead in NOT_SUPPORTED.items():
        if values.get(name):
            raise UserError(f"--{name} is not supported: {instead}")
    for text, (holds, names) in RANGES.items():
        for name in names.split():
            value = values.get(name)
            if value is not None and not holds(value):
                raise UserError(f"--{name} {value!r}: it must be {text}")


def check_gpu(args: GRPOConfig) -> None:
    """Raise UserError if there is no GPU, several without a launcher, or one without bf16."""
    import torch

    if not args.use_cpu and not torch.cuda.is_available():
        raise UserError("no CUDA GPU found: on a laptop add --config assets/tiny/config.yaml")
    gpus = 0 if args.use_cpu else torch.cuda.device_count()
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        n = 1 << gpus.bit_length() - 1  # the largest power of two: divides 64
        run = f"--num_processes {n} grpo_demo.py --gradient_accumulation_steps {64 // n}"
        raise UserError(f"{gpus} GPUs: accelerate launch {run}; for one, CUDA_VISIBLE_DEVICES=0")
    if gpus and args.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        flags = "--config assets/cards/16gb.yaml, or --bf16 False --fp16 True --dtype float32"
        raise UserError(f"{torch.cuda.get_device_name()} has no bf16: add {flags}")


def check_tools(args: GRPOConfig) -> None:
    """Raise UserError if optimizer, scheduler, sampling, rewards or a logger cannot be made."""
    import torch
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_available_reporting_integrations

    from rewards import REWARD_FUNCS, name_of

    if args.use_vllm and not find_spec("vllm"):
        raise UserError("--use_vllm needs vLLM: pip install vllm==0.31.0")
    with as_user_error(f"--optim {args.optim}", ImportError, RuntimeError):
        Trainer.get_optimizer_cls_and_kwargs(args)
    with as_user_error(f"--lr_scheduler_type {args.lr_scheduler_type}", TypeError):
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, args.lr_scheduler_kwargs)
    if missing := set(args.report_to) - set(get_available_reporting_integrations()):
        raise UserError(f"--report_to {' '.join(missing)}: not installed, or unknown")
    if args.accelerator_config.dispatch_batches:
        raise UserError("--accelerator_config: dispatch_batches cannot send texts")
    names, weights = [name_of(reward) for reward in REWARD_FUNCS], args.reward_weights
    if weights and (len(weights) != len(names) or not all(map(math.isfinite, weights))):
        what = f"give {len(names)} finite weights, for {', '.join(names)}"
        raise UserError(f"--reward_weights {weights}: {what}")
    check_sampling(args.generation_kwargs or {}, args.use_vllm)


def check_sampling(options: dict, use_vllm: bool) -> None:
    """Raise UserError for `--generation_kwargs` that are no options or would break the groups."""
    from transformers import GenerationConfig

    what = f"--generation_kwargs {options}"
    if not use_vllm and (unknown := options.keys() - GenerationConfig().to_dict().keys()):
        raise UserError(f"{what}: unknown: {', '.join(unknown)}")
    for instead, names in FIXED_OPTIONS.items():
        if fixed := options.keys() & set(names.split()):
            raise UserError(f"{what}: {min(fixed)} cannot be set here: {instead}")
    temperature = options.get("temperature", 1.0)
    if not isinstance(temperature, float) or not 0 < temperature < math.inf:
        raise UserError(f"{what}: write the temperature as a number above 0, with a point")


# Put before a chat template that knows no system role
MERGE_SYSTEM = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set text = messages[0]['content'] + '\\n' + messages[1]['content'] %}
    {%- set messages = [{'role': 'user', 'content': text}] + messages[2:] %}
{%- endif %}"""


def check_template(args: GRPOConfig, tokenizer: Tokenizer, prompt: list) -> None:
    """Make the chat template show a prompt's messages, each whole; UserError if it cannot.

    Without a system role, the system prompt goes in front of the first question. Warns of a tag
    that the template opens for the model.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        instead = "use its instruct version, or write chat_template.jinja in the model's folder"
        raise UserError(f"the model has no chat template, so it is a base model: {instead}")
    more = {"tokenize": False, "add_generation_prompt": True, **(args.chat_template_kwargs or {})}
    system, *others = [message["content"].strip() for message in prompt]
    try:
        shown = tokenizer.apply_chat_template(prompt, **more).count(system)
    except TemplateError:  # "System role not supported"
        shown = 0
    if system and shown != 1:
        tokenizer.chat_template = MERGE_SYSTEM + tokenizer.get_chat_template()
        where = "the system prompt is put in front of the first question"
        print_error(f"warning: the chat template has no system role: {where}")
    with as_user_error("the chat template cannot show a prompt", TemplateError):
        text = tokenizer.apply_chat_template(prompt, **more)
    if lost := [content[:50] for content in (system, *others) if content not in text]:
        print_error(f"warning: the chat template loses or changes {lost}: use another template")
    if tag := re.search(r"<\w+>\s*$", text):
        cure = "another model or template"
        if "enable_thinking" in tokenizer.get_chat_template():
            cure = """--chat_template_kwargs '{"enable_thinking": false}'"""
        why = "rewards see only what follows, so the format cannot be learned as it is"
        print_error(f"warning: the chat template opens {tag[0].strip()}: {why}; use {cure}")


def check_stops(args: GRPOConfig, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Warn if generation does not stop where the template ends a turn; UserError if nowhere."""
    turn = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, **(args.chat_template_kwargs or {}))
    rest = text.rpartition("ANSWER")[2].strip()
    ids = tokenizer.get_added_vocab()
    end = max((token for token in ids if rest.startswith(token)), key=len, default=None)
    stops = model.generation_config.eos_token_id  # TRL stops there, and at the tokenizer's
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    if tokenizer.eos_token is None:
        where = "write eos_token in tokenizer_config.json in the model's folder"
        if not (end or stops):
            raise UserError(f"no token stops generation: {where}")
        tokenizer.eos_token = tokenizer.pad_token = end or tokenizer.convert_ids_to_tokens(stops[0])
        print_error(f"warning: no eos_token, {tokenizer.eos_token} is used: {where}")
    stops = sorted({tokenizer.eos_token_id, *stops} - {None})
    if end and ids[end] not in stops:
        what = f"ends a turn with {end}, but generation stops only at {tokenizer.decode(stops)}"
        cure = f'"eos_token_id": {[ids[end], *stops]} in generation_config.json'
        print_error(f"warning: the chat template {what}: write {cure} in the model's folder")
    elif rest and not end:
        what = f"the chat template ends a turn with {rest!r}, which is no token"
        print_error(f"warning: {what}: use the model's own template")


def check_prompts(
    args: GRPOConfig, model: PreTrainedModel, tokenizer: Tokenizer, rows: Dataset
) -> None:
    """Warn of long prompts and of control tokens; UserError if a prompt leaves no room."""
    more = {"add_generation_prompt": True, **(args.chat_template_kwargs or {})}
    ids = tokenizer.apply_chat_template(rows["prompt"][:], **more)
    lengths = [len(prompt) for prompt in ids["input_ids"]]
    if long := sum(n > args.max_prompt_length for n in lengths):
        over = f"{long} of {len(lengths)} prompts have over {args.max_prompt_length} tokens"
        print_error(f"warning: {over} (up to {max(lengths)}); they are kept whole")
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    if ends := sum(any(token in q for token in special) for q in rows["question"]):
        print_error(f"warning: {ends} questions have tokens that end a turn")
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if (longest := max(lengths) + args.max_completion_length) > positions:
        room = f"a prompt and its completion may take {longest} tokens"
        raise UserError(f"{room}, the model takes {positions}: lower --max_completion_length")


def check_cast(trainer: GRPOTrainer) -> None:
    """Raise UserError if continuous batching would cast the weights that are trained."""
    args = trainer.args
    wanted = "torch.bfloat16" if args.bf16 else "torch.float16" if args.fp16 else ""
    dtypes = {str(parameter.dtype) for parameter in trainer.model.parameters()}
    if args.use_transformers_continuous_batching and wanted and dtypes != {wanted}:
        cure = "add --bf16 False --fp16 False, or train in bfloat16, without LoRA"
        raise UserError(f"continuous batching would cast the weights to {wanted}: {cure}")
