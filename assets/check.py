"""Refuse settings that would fail late, or never: before anything is loaded, in one line.

What libraries refuse when the command line is read is left to them.
"""

import argparse
import json
import math
import os
from importlib.util import find_spec

import torch
import trl
import wandb
from datasets import Dataset
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    get_scheduler,
)
from transformers.integrations import get_reporting_integration_callbacks
from trl import TrlParser

import rewards
from assets.errors import UserError, one_line_errors, say

REFUSED = {
    "trust_remote_code": "the script runs no code from a model's repository",
    "resume_from_checkpoint": "run the same command again, it resumes",
    "push_to_hub": "it would upload W&B files and completions. After training: hf upload YOU/NAME "
    "OUTPUT_DIR . --exclude 'wandb/*' --exclude 'completions/*' --exclude 'checkpoint-*/*' "
    "--exclude run.json",
    "hub_token": "it would be logged. Set the environment variable HF_TOKEN",
    "save_only_model": "such a checkpoint cannot be resumed",
}
ABOVE_0 = """adam_epsilon gradient_accumulation_steps logging_steps lora_alpha lora_r
    num_generations max_completion_length max_prompt_length num_iterations num_train_epochs
    temperature top_p
    per_device_eval_batch_size per_device_train_batch_size repetition_penalty save_steps
    save_total_limit steps_per_generation generation_batch_size
    vllm_gpu_memory_utilization vllm_tensor_parallel_size"""
FROM_0 = """beta epsilon eval_generations eval_samples learning_rate lora_dropout max_grad_norm
    min_p num_completions_to_print print_steps seed top_k warmup_steps weight_decay"""
UP_TO_1 = "adam_beta1 adam_beta2 lora_dropout min_p top_p vllm_gpu_memory_utilization"
CHOICES = {
    "loss_type": "grpo bnpo dr_grpo dapo luspo cispo sapo vespo",  # TRL 1.16
    "scale_rewards": "group batch none True False",
    "importance_sampling_level": "token sequence",
    "logging_strategy": "steps epoch",
    "vllm_mode": "colocate server",
    "dtype": "auto bfloat16 float16 float32",
}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults of all flags, and the description as it is."""


class Parser(TrlParser):
    """TRL's parser, with one-line errors; a misspelt flag is named before a missing GPU."""

    def __init__(self, configs: list[type], description: str):
        usage = "python grpo_demo.py [--config FILE] [--flag value ...]"
        texts = {"usage": usage, "description": description, "formatter_class": Help}
        super().__init__(configs, allow_abbrev=False, **texts)

    def parse_args_and_config(self, args: list[str]) -> tuple:
        args = [part for a in args for part in (a.split("=", 1) if a[:9] == "--config=" else [a])]
        if args[-1:] == ["--config"]:
            raise UserError("--config needs the name of a YAML file")
        return super().parse_args_and_config(args)

    def error(self, message: str):  # argparse's would print all 200 flags first
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown flag {unknown[0]}; --help lists all")
        return known, unknown

    def set_defaults_with_config(self, **settings):
        unknown = super().set_defaults_with_config(**settings)
        return self.error(f"unknown key {unknown[0][2:]} in the YAML file") if unknown else []


def gpu(args: trl.GRPOConfig) -> None:
    """Raise UserError if there is no GPU, several without a launcher, or one without bf16."""
    if not args.use_cpu and not torch.cuda.is_available():
        laptop = "python grpo_demo.py --config assets/tiny/config.yaml [your flags]"
        raise UserError(f"no CUDA GPU found. On a laptop: {laptop}")
    gpus = 0 if args.use_cpu else torch.cuda.device_count()
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        n = 1 << gpus.bit_length() - 1  # the largest power of two: divides 64
        run = f"--num_processes {n} grpo_demo.py --gradient_accumulation_steps {64 // n}"
        one = "CUDA_VISIBLE_DEVICES=0 python grpo_demo.py"
        raise UserError(f"{gpus} GPUs, 1 process. Use {n}: accelerate launch {run}; or 1: {one}")
    if gpus and args.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        flags = "--bf16 False --fp16 True --dtype float32"
        flags += ", and --use_peft if the memory is too small (--estimate_memory tells)"
        raise UserError(f"{torch.cuda.get_device_name()} has no bf16: add {flags}")


def values(args: object) -> None:
    """Raise UserError for a number out of range, or an unknown choice; `args` may lack some."""
    for flag, instead in REFUSED.items():
        if getattr(args, flag, None):
            raise UserError(f"--{flag} is not supported: {instead}")
    rules = {
        "above 0": (ABOVE_0.split(), lambda x: x > 0),
        "0 or above": (FROM_0.split(), lambda x: x >= 0),
        "at most 1": (UP_TO_1.split(), lambda x: x <= 1),
        "-1 (all), or above 0": (["max_steps"], lambda x: x == -1 or x > 0),
    }
    for text, (names, holds) in rules.items():
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise UserError(f"--{name} {value}: it must be {text}")
    for name, choices in CHOICES.items():
        value = getattr(args, name, None)
        if value is not None and str(value) not in choices.split():
            raise UserError(f"--{name} {value}: choose one of {choices}")


def tools(args: trl.GRPOConfig) -> None:
    """Raise UserError if optimizer, scheduler, sampling or a logger cannot be made."""
    if args.use_vllm and not find_spec("vllm"):
        raise UserError("--use_vllm needs vLLM: pip install vllm==0.31.0")
    with one_line_errors(f"--optim {args.optim}"):
        Trainer.get_optimizer_cls_and_kwargs(args)
    with one_line_errors(f"--lr_scheduler_type {args.lr_scheduler_type}"):
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
        more = {"scheduler_specific_kwargs": args.lr_scheduler_kwargs}
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, **more)
    with one_line_errors(f"--report_to {' '.join(args.report_to)}"):
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    if "wandb" in args.report_to:
        with one_line_errors("W&B"):
            project = os.environ.get("WANDB_PROJECT", args.project)
            wandb.Settings(mode=os.environ.get("WANDB_MODE") or "offline", project=project)
    sampling = args.generation_kwargs or {}
    with one_line_errors(f"--generation_kwargs {json.dumps(sampling)}"):
        if not args.use_vllm and (bad := sampling.keys() - GenerationConfig().to_dict().keys()):
            raise ValueError(f"unknown: {', '.join(bad)}")
        if not 0 < sampling.get("temperature", 1.0) < math.inf:
            raise ValueError("the temperature must be above 0")


def is_local(name: str) -> bool:
    """Return whether a model or dataset can only be a local path; openai/gsm8k is a hub id."""
    parent = os.path.dirname(name)
    return os.path.exists(name) or "/" in parent or os.path.isdir(parent) or ".json" in name


def row(line: str | dict) -> dict[str, str]:
    """Return question and gold answer of a JSON line or row; ValueError says what is missing."""
    try:
        line = json.loads(line) if isinstance(line, str) else line
    except (ValueError, RecursionError):
        raise ValueError("no JSON, or deeply nested") from None
    columns = ("question", "answer")
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in columns):
        raise ValueError("no text in 'question' and 'answer'")
    if any("\ud800" <= character <= "\udfff" for name in columns for character in line[name]):
        raise ValueError("half a character")  # a lone surrogate, which is no Unicode text
    gold = rewards.extract_hash_answer(line["answer"])
    if gold is None or rewards.as_number(gold) is None:
        raise ValueError("no number after '####'")
    return {"question": line["question"], "answer": gold}


def prompts(
    args: trl.GRPOConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> None:
    """Warn of long prompts and of control tokens; UserError if a prompt leaves no room."""
    ids = tokenizer.apply_chat_template(rows["prompt"][:], add_generation_prompt=True)
    lengths = [len(prompt) for prompt in ids["input_ids"]]
    if long := sum(n > args.max_prompt_length for n in lengths):
        over = f"{long} of {len(lengths)} prompts have over {args.max_prompt_length} tokens"
        say(f"warning: {over} (up to {max(lengths)}); they are kept whole", error=True)
    special = tokenizer.all_special_tokens
    if ends := sum(any(token in q for token in special) for q in rows["question"]):
        say(f"warning: {ends} questions have tokens that end a turn", error=True)
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if (longest := max(lengths) + args.max_completion_length) > positions:
        room = f"a prompt and its completion may take {longest} tokens"
        raise UserError(f"{room}, the model takes {positions}: lower --max_completion_length")


def cast(trainer: trl.GRPOTrainer) -> None:
    """Raise UserError if continuous batching would cast the weights that are trained."""
    args = trainer.args
    wanted = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    dtypes = {p.dtype for p in trainer.model.parameters()}
    if args.use_transformers_continuous_batching and wanted and dtypes != {wanted}:
        raise UserError(
            f"continuous batching would cast weights in training to {wanted}: add --bf16 False "
            "--fp16 False, or train in bfloat16, without LoRA"
        )
