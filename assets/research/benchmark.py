"""Measure where the time of a step goes, beside a bare trainer and the gist's way of generating.

    python -m assets.research.benchmark            # the laptop default, on a CPU: benchmark.md
    python -m assets.research.benchmark --gpu      # Qwen2.5-1.5B's shape, on a CUDA GPU
    python -m assets.research.benchmark --gpu --shape tiny    # the same code, tiny, anywhere

Every run is a process of its own, read back from its W&B files. On the CPU the runs that are
compared alternate, so a machine that is slow for a minute is slow for all of them.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import timeit
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import grpo_demo  # before torch: it says how OpenMP's threads wait

# isort: split
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import rewards
from assets.research.record import collect, environment, time_split
from assets.research.tables import ROOT, table
from tests import gist_rewards

ROUNDS, STEPS = 5, 20
TINY = ROOT / "assets/tiny"
SHORT = "--evaluate False --save_strategy no"
MICRO_BATCH = {  # 64 completions a step
    1: "--per_device_train_batch_size 1 --gradient_accumulation_steps 64",
    16: "--per_device_train_batch_size 16 --gradient_accumulation_steps 4",
}
FOUR_CALLS = f"{MICRO_BATCH[16]} --steps_per_generation 1"  # the gist's way to generate
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size"
SHAPES = {
    "1.5b": {
        "sizes": [1536, 8960, 28, 12, 151_936],  # Qwen2.5-1.5B's; the weights do not matter
        "tokens": 786,
        "questions": 8,  # repeated in a prompt: as many tokens as one of GSM8K's
        "cache": 0.3,  # share of the free memory for continuous batching
        "steps": 3,  # the first one is not counted
    },
    "tiny": {
        "sizes": [64, 128, 2, 4, 1024],
        "tokens": 12,
        "questions": 1,
        "cache": 0.05,
        "steps": 2,
    },
}


def bare(flags: list[str]) -> None:
    """Run TRL's own trainer with the gist's rewards and transformers' own W&B callback."""
    args, model_args = grpo_demo.parse_args(flags)
    rows = grpo_demo.get_gsm8k_questions("train", args.dataset_name, args.dataset_config)
    model, tokenizer = grpo_demo.load_model(args, model_args)
    funcs = gist_rewards.REWARD_FUNCS
    trl.GRPOTrainer(model, funcs, args, rows, processing_class=tokenizer).train()


MAINS = {"bare": bare, "script": grpo_demo.main}


def child(name: str, out: str, *flags: str) -> None:
    """Run one of MAINS in this process and leave its peak memory, in bytes, in `out`."""
    MAINS[name]([*flags, "--output_dir", out])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    Path(out, "peak").write_text(str(peak))


def run(name: str, flags: str) -> dict:
    """Run one of MAINS in a process of its own.

    Returns metrics (a dict a step), split (seconds of each part of a step), seconds (median of a
    step, without the first) and peak (bytes). RuntimeError with the end of its output if it fails.
    """
    with tempfile.TemporaryDirectory() as out:
        env = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": out, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "assets.research.benchmark", "--child", name, out]
        command += flags.split()
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        log = collect(Path(out))
        return {
            "metrics": log.metrics,
            "split": time_split(log.metrics, log.timers),
            "seconds": median(b["runtime"] - a["runtime"] for a, b in pairwise(log.metrics)),
            "peak": int(Path(out, "peak").read_text()),
        }


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table under a heading."""
    print(f"\n### {title}\n\n{table(columns, rows)}", end="", flush=True)


def split_rows(ways: list[list[dict[str, float]]]) -> list[list[str]]:
    """Return the rows of the second table: seconds and share of each part of a step.

    ways  for each way to generate, the seconds of each part in several runs
    """
    parts = list(ways[0][0])
    rows = [[part] for part in [*parts, "together", "steps an hour"]]
    for splits in ways:
        seconds = [mean(split[part] for split in splits) for part in parts]
        total = sum(seconds)
        cells = [(f"{s:.4f}", f"{s / total:.2%}") for s in seconds]
        cells += [(f"{total:.4f}", ""), (f"{3600 / total:,.0f}", "")]
        for row, pair in zip(rows, cells, strict=True):
            row += pair
    return rows


def reward_rows() -> list[list[str]]:
    """Return the rows of the third table: the rewards, the gist's, the script's accuracies."""
    texts = [text.replace("9 ", "9 " * 470, 1) for _, text, _ in rewards.EXAMPLES]
    batch = {
        "prompts": [[{"content": ""}]] * 64,
        "completions": [[{"content": text}] for text in (texts * 10)[:64]],
        "answer": ["18"] * 64,
    }

    def ours() -> None:
        [reward(**batch) for reward in rewards.REWARD_FUNCS]

    def gist() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            [reward(**batch) for reward in gist_rewards.REWARD_FUNCS]

    def accuracies() -> None:
        for completion, gold in zip(batch["completions"], batch["answer"], strict=True):
            rewards.is_strict_correct(completion[0]["content"], gold)
            rewards.is_lenient_correct(completion[0]["content"], gold)

    functions = {
        "the five rewards": ours,
        "the gist's own functions": gist,
        "the script's two accuracies": accuracies,
    }
    fastest = {k: min(timeit.repeat(f, number=1, repeat=200)) for k, f in functions.items()}
    return [[name, f"{1000 * seconds:.2f} ms"] for name, seconds in fastest.items()]


def laptop() -> None:
    """Print the laptop's three tables."""
    flags = f"--config assets/tiny/config.yaml --max_steps {STEPS} {SHORT}"
    pairs, ours, four = {}, [], []
    for pair in range(1, ROUNDS + 1):  # alternating
        plain = run("bare", flags)["seconds"]
        ours.append(run("script", flags))
        four.append(run("script", f"{flags} {FOUR_CALLS}"))
        pairs[pair] = [plain, ours[-1]["seconds"], ours[-1]["seconds"] / plain]
    pairs["median"] = [median(column) for column in zip(*pairs.values(), strict=True)]
    rows = [[k, f"{a:.3f} s", f"{b:.3f} s", f"{ratio:.3f}"] for k, (a, b, ratio) in pairs.items()]
    title = f"The median step of runs of {STEPS} steps, in pairs"
    print_table(title, ["pair", "bare GRPOTrainer", "the script", "ratio"], rows)
    ways = [[got["split"] for got in way] for way in (ours, four)]
    columns = ["part", "one call of 64, seconds", "share", "the gist's four calls of 16", "share"]
    print_table("Where the time of a step goes", columns, split_rows(ways))
    title = "The rewards of 64 completions of about 1,000 characters"
    print_table(title, ["what", "fastest of 200"], reward_rows())


def make_model(shape: dict, folder: Path) -> int:
    """Save a model of `shape` with random weights, and 64 training rows; return its parameters."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = dict(zip(SIZES.split(), shape["sizes"], strict=True))
    config = Qwen2Config(**sizes, **ids, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with (folder / "train.jsonl").open("w") as file:
        for line in (TINY / "train.jsonl").read_text().splitlines()[:64]:
            row = json.loads(line)
            row["question"] *= shape["questions"]
            file.write(json.dumps(row) + "\n")
    return model.num_parameters()


def gpu_row(flags: str) -> list[str]:
    """Return the cells of one way: means over its steps after the first; or why it failed."""
    try:
        got = run("script", flags)
    except RuntimeError as error:  # out of memory, or a backend that does not run here
        return [str(error).strip().splitlines()[-1][:200], *[""] * 4]
    generate, total = got["split"]["generate"], sum(got["split"].values())
    tokens = 64 * mean(step["completions/mean_length"] for step in got["metrics"][1:])
    return [
        f"{total:.2f}",
        f"{3600 / total:,.0f}",
        f"{tokens / generate:,.0f}",
        f"{generate / total:.1%}",
        f"{got['peak'] / 1e9:.2f} GB",
    ]


def gpu(shape: dict) -> None:
    """Print one table: ways to generate and micro-batches, on a model with random weights."""
    batching = (
        "--use_transformers_continuous_batching True --transformers_continuous_batching_config "
        f'{{"max_memory_percent":{shape["cache"]}}}'
    )
    ways = {
        "the gist's: four calls of 16, micro-batch 16": FOUR_CALLS,
        "one call of 64, micro-batch 1": MICRO_BATCH[1],
        "one call of 64, micro-batch 16": MICRO_BATCH[16],
        "continuous batching, micro-batch 16": f"{MICRO_BATCH[16]} {batching}",
    }
    if importlib.util.find_spec("vllm"):
        vllm = "--use_vllm True --vllm_mode colocate --vllm_importance_sampling_correction False"
        ways["vLLM, colocate, micro-batch 16"] = f"{MICRO_BATCH[16]} {vllm}"
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_model(shape, Path(folder))
        flags = f"--model_name_or_path {folder} --dataset_name {folder} {SHORT}"
        flags += f" --max_completion_length {shape['tokens']} --max_steps {shape['steps']}"
        if not torch.cuda.is_available():
            flags += " --use_cpu --bf16=False --dtype=float32"
        rows = [[way, *gpu_row(f"{flags} {more}")] for way, more in ways.items()]
    columns = ["way", "seconds a step", "steps an hour", "tokens/s", "generation's share", "peak"]
    title = f"{parameters:,} random weights, 64 completions of {shape['tokens']} tokens"
    print_table(title, columns, rows)


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--gpu", action="store_true", help="the real shape, on one GPU")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b", help="of --gpu")
    args = parser.parse_args()
    facts = environment()
    known = ("torch", "transformers", "trl", "vllm")
    versions = [f"{name} {facts['versions'][name]}" for name in known if name in facts["versions"]]
    hardware = [f"{v} {k}" if k == "cores" else str(v) for k, v in facts["hardware"].items()]
    command = " ".join(["python -m assets.research.benchmark", *sys.argv[1:]])
    print(f"## {date.today()}: `{command}`\n\n{', '.join(hardware)}; {', '.join(versions)}.")
    gpu(SHAPES[args.shape]) if args.gpu else laptop()


if __name__ == "__main__":
    main()
