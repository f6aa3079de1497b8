"""Measure where the time of a laptop step goes, beside a bare trainer and the gist's generating.

    python -m assets.research.benchmark > assets/research/benchmark.md
    python -m assets.research.benchmark padding    # the table of notes/speed.md

Every run is a process of its own, read back from its W&B files. The runs that are compared
alternate, so a machine that is slow for a minute is slow for all of them.
"""

import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, median

import grpo_demo  # before torch: it says how OpenMP's threads wait

# isort: split
import torch
import trl
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from assets.research.record import collect, environment, time_split
from assets.research.tables import ROOT, table
from assets.trainer import GRPOTrainer
from tests import gist_rewards

ROUNDS, STEPS = 5, 20
LAPTOP = "--config assets/tiny/config.yaml --evaluate False --save_strategy no --max_steps"
FOUR_CALLS = "--per_device_train_batch_size 16 --gradient_accumulation_steps 4"
FOUR_CALLS += " --steps_per_generation 1"  # the gist's way to generate


def bare(flags: list[str]) -> None:
    """Run TRL's own trainer with the gist's rewards and transformers' own W&B callback."""
    args, model_args = grpo_demo.parse_args(flags)
    rows = grpo_demo.get_gsm8k_questions("train", args.dataset_name, args.dataset_config)
    model, tokenizer = grpo_demo.load_model(args, model_args)
    funcs = gist_rewards.REWARD_FUNCS
    trl.GRPOTrainer(model, funcs, args, rows, processing_class=tokenizer).train()


MAINS = {"bare": bare, "script": grpo_demo.main}


def run(name: str, flags: str) -> tuple[float, dict[str, float]]:
    """Run one of MAINS in a process of its own.

    Returns the median seconds of a step, without the first, and those of each part of a step.
    RuntimeError with the end of its output if it fails.
    """
    with tempfile.TemporaryDirectory() as out:
        env = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": out, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "assets.research.benchmark", name, *flags.split()]
        command += ["--output_dir", out]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        metrics, timers, _ = collect(Path(out))
        seconds = median(b["runtime"] - a["runtime"] for a, b in pairwise(metrics))
        return seconds, time_split(metrics, timers)


def split_rows(ways: list[list[dict[str, float]]]) -> list[list[str]]:
    """Return the rows of the second table: seconds and share of each part of a step.

    ways  for each way to generate, the seconds of each part in several runs
    """
    rows = {part: [part] for part in [*ways[0][0], "together"]}
    for splits in ways:
        total = mean(sum(split.values()) for split in splits)
        for part in splits[0]:
            seconds = mean(split[part] for split in splits)
            rows[part] += [f"{seconds:.4f}", f"{seconds / total:.2%}"]
        rows["together"] += [f"{total:.4f}", ""]
    return list(rows.values())


LENGTHS = {  # tokens of 64 completions: shortest, mean, longest
    "the recorded 1.5B run": (68, 126, 189),
    "a third of 256": (5, 85, 256),
    "a third of 786": (5, 262, 786),
}


def spread(low: int, mean: int, high: int, n: int = 64) -> list[int]:
    """Return n lengths from low to high with that mean: many short ones, few long ones."""
    power = (high - low) / (mean - low) - 1
    return [round(low + (high - low) * ((i + 0.5) / n) ** power) for i in range(n)]


def step_seconds(kind: type, model: str, lengths: list[int], size: int) -> float:
    """Return the CPU seconds of a step of a trainer on completions of these lengths."""

    class Fixed(kind):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            made = [[5 + (7 * i + j) % 300 for j in range(n)] for i, n in enumerate(lengths)]
            mixed = torch.randperm(len(made), generator=torch.Generator().manual_seed(1))
            return [made[i] for i in mixed], None

    flags = f"--model_name_or_path {model} --output_dir {model}/out --per_device_train_batch_size "
    flags += f"{size} --gradient_accumulation_steps {64 // size} --log_completions False "
    flags += f"--max_completion_length {max(lengths)} --max_steps 2 --report_to none"
    args, model_args = grpo_demo.parse_args([*LAPTOP.split()[:-1], *flags.split()])
    grpo_demo.GRPOTrainer = Fixed
    trainer = grpo_demo.build_trainer(args, model_args, grpo_demo.load_questions(args, "train"))
    start = time.process_time()
    trainer.train()
    return (time.process_time() - start) / 2


def padding() -> None:
    """Print CPU seconds of a step without generation: TRL's trainer and ours, alternating."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as model:
        tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
        tokenizer.save_pretrained(model)
        shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
        shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
        Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).save_pretrained(model)
        for (name, ends), size in product(LENGTHS.items(), (1, 4, 16)):
            lengths, kinds = spread(*ends), (trl.GRPOTrainer, GRPOTrainer)
            pairs = [[step_seconds(k, model, lengths, size) for k in kinds] for _ in range(3)]
            trls, ours = (median(column) for column in zip(*pairs, strict=True))
            ratio, share = median(b / a for a, b in pairs), mean(lengths) / max(lengths)
            rows.append([name, f"{share:.2f}", size, *(f"{x:.2f}" for x in (trls, ours, ratio))])
    head = ["lengths", "mean / longest", "micro-batch", "TRL, CPU s", "script, CPU s", "ratio"]
    print(table(head, rows), end="")


def main() -> None:
    """Print two tables of the laptop run; with a name of MAINS and flags, be one of the runs."""
    if sys.argv[1:] == ["padding"]:
        return padding()
    if sys.argv[1:]:
        return MAINS[sys.argv[1]](sys.argv[2:])
    facts, known = environment(), ("torch", "transformers", "trl")
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in known)
    hardware = f"{facts['hardware']['cpu']}, {facts['hardware']['cores']} cores"
    print(f"## {date.today()}: `python -m assets.research.benchmark`\n\n{hardware}; {versions}.")
    pairs, ours, four, flags = {}, [], [], f"{LAPTOP} {STEPS}"
    for pair in range(1, ROUNDS + 1):  # alternating
        plain, _ = run("bare", flags)
        seconds, split = run("script", flags)
        ours.append(split)
        four.append(run("script", f"{flags} {FOUR_CALLS}")[1])
        pairs[pair] = [plain, seconds, seconds / plain]
    pairs["median"] = [median(column) for column in zip(*pairs.values(), strict=True)]
    rows = [[k, f"{a:.3f} s", f"{b:.3f} s", f"{ratio:.3f}"] for k, (a, b, ratio) in pairs.items()]
    title = f"The median step of runs of {STEPS} steps, in pairs"
    print(f"\n### {title}\n\n" + table(["pair", "bare GRPOTrainer", "the script", "ratio"], rows))
    columns = ["part", "one call of 64, seconds", "share", "the gist's four calls of 16", "share"]
    split = table(columns, split_rows([ours, four]))
    print(f"### Where the time of a step goes\n\n{split}", end="")


if __name__ == "__main__":
    main()
