"""Measure where the time of a step goes, beside a bare trainer and the gist's way of generating.

    python tests/benchmark.py > assets/benchmark.md          # the laptop default, on a CPU
    python tests/benchmark.py --gpu >> assets/benchmark.md   # Qwen2.5-1.5B's shape, on a CUDA GPU
    python tests/benchmark.py --gpu --shape tiny             # the same code, tiny, anywhere

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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from itertools import chain, pairwise
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import grpo_demo  # noqa: E402, I001 - before torch: it says how OpenMP's threads wait
import gist_rewards  # noqa: E402
import torch  # noqa: E402
import trl  # noqa: E402
from assets.record import collect, environment, time_split  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config  # noqa: E402

ROUNDS, STEPS = 5, 20
LAPTOP = ["--config", "assets/tiny/config.yaml"]
SHORT = ["--evaluate", "False", "--save_strategy", "no"]


def micro_batch(size: int) -> list[str]:
    """Return flags: 64 completions a step, `size` of them in a backward pass."""
    batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 64 // size}
    return [part for name, value in batch.items() for part in (f"--{name}", str(value))]


FOUR_CALLS = [*micro_batch(16), "--steps_per_generation", "1"]  # the gist's way to generate


def table(title: str, columns: list[str], rows: Iterable[list[str]]) -> None:
    """Print a Markdown table under a heading, each row as soon as it is there."""
    print(f"\n### {title}\n")
    for row in chain([columns, ["---"] * len(columns)], rows):
        print(f"| {' | '.join(row)} |", flush=True)


def script(flags: list[str]) -> None:
    """Run grpo_demo.py."""
    grpo_demo.main(flags)


def bare(flags: list[str]) -> None:
    """Run TRL's own trainer with the gist's rewards and transformers' own W&B callback."""
    args, model_args = grpo_demo.parse_args(flags)
    rows = grpo_demo.get_gsm8k_questions("train", args.dataset_name, args.dataset_config)
    model, tokenizer = grpo_demo.load_model(args, model_args)
    funcs = gist_rewards.REWARD_FUNCS
    trainer = trl.GRPOTrainer(model, funcs, args, rows, processing_class=tokenizer)
    trainer.train()


def child(what: Callable, out: str, flags: list[str]) -> None:
    """Run `what` in this process and leave its peak memory, in bytes, in `out`."""
    what([*flags, "--output_dir", out])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
    Path(out, "peak").write_text(str(peak))


def run(what: Callable, flags: list[str]) -> dict:
    """Run `script` or `bare` in a process of its own.

    Returns metrics (a dict a step), split (seconds of each part of a step), seconds (median of a
    step, without the first) and peak (bytes). RuntimeError with the end of its output if it fails.
    """
    with tempfile.TemporaryDirectory() as out:
        env = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": out, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--child", what.__name__, out, *flags]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        metrics, timers, _ = collect(Path(out))
        steps = [after["runtime"] - before["runtime"] for before, after in pairwise(metrics)]
        return {
            "metrics": metrics,
            "split": time_split(metrics, timers),
            "seconds": statistics.median(steps),
            "peak": int(Path(out, "peak").read_text()),
        }


def step_rows(pairs: list[tuple[float, float]]) -> list[list[str]]:
    """Return the rows of the first table: seconds of a bare step and of the script's, by pair."""
    ratios = [ours / plain for plain, ours in pairs]
    rows = [[f"{plain:.3f} s", f"{ours:.3f} s", f"{ours / plain:.3f}"] for plain, ours in pairs]
    bare_median, script_median = map(statistics.median, zip(*pairs, strict=True))
    middle = [f"{bare_median:.3f} s", f"{script_median:.3f} s", f"{statistics.median(ratios):.3f}"]
    names = [*map(str, range(1, len(pairs) + 1)), "median"]
    return [[name, *row] for name, row in zip(names, [*rows, middle], strict=True)]


def mean_split(splits: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean seconds of each part of a step over several runs."""
    return {part: statistics.mean(split[part] for split in splits) for part in splits[0]}


def split_rows(splits: list[dict[str, float]]) -> list[list[str]]:
    """Return the rows of the second table: seconds and share of each part of a step, by split."""
    totals = [sum(split.values()) for split in splits]
    rows = []
    for part in splits[0]:
        pairs = [(split[part], split[part] / n) for split, n in zip(splits, totals, strict=True)]
        rows.append([part, *(c for s, share in pairs for c in (f"{s:.4f}", f"{share:.2%}"))])
    rows.append(["together", *(cell for total in totals for cell in (f"{total:.4f}", ""))])
    hours = [cell for total in totals for cell in (f"{3600 / total:,.0f}", "")]
    return [*rows, ["steps an hour", *hours]]


def long_completions() -> dict[str, list]:
    """Return prompts, 64 completions of 1,000 characters in four forms, and gold answers."""
    rows = grpo_demo.get_gsm8k_questions("test", str(ROOT / "assets/tiny"))
    words, texts = "\n".join(rows["question"]), []
    for i, gold in enumerate(rows["answer"][:64]):
        reasoning = words[100 * i : 100 * i + 940]
        right = grpo_demo.XML_COT_FORMAT.format(reasoning=reasoning, answer=gold)
        prose = f"{reasoning} The answer, which follows from all that was said, is {gold}."
        texts.append([right, right.replace("\n", " "), prose, right[:-20]][i % 4])
    completions = [[{"content": text}] for text in texts]
    return {
        "prompts": rows["prompt"][:64],
        "completions": completions,
        "answer": rows["answer"][:64],
    }


def fastest(*functions: Callable, rounds: int = 200) -> list[float]:
    """Return the milliseconds of the fastest call of each function; they take turns."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, kept in zip(functions, times, strict=True):
            begun = time.perf_counter()
            function()
            kept.append(1000 * (time.perf_counter() - begun))
    return list(map(min, times))


def reward_rows() -> list[list[str]]:
    """Return the rows of the third table: the rewards, the gist's, accuracy logging."""
    batch = long_completions()
    inputs = [{"question": gold, "answer": gold} for gold in batch["answer"]]
    trainer = object.__new__(grpo_demo.GRPOTrainer)  # only its own part of the method is timed
    trainer._log_completion_extra = trainer._log_metric = lambda *a: None

    def gist() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            [reward(**batch) for reward in gist_rewards.REWARD_FUNCS]

    def ours() -> None:
        [reward(**batch) for reward in grpo_demo.rewards.REWARD_FUNCS]

    def accuracy() -> None:
        trainer._calculate_rewards(inputs, batch["prompts"], batch["completions"], None)

    with mock.patch.object(trl.GRPOTrainer, "_calculate_rewards", lambda *a: None):
        times = fastest(ours, gist, accuracy)
    names = ["the five rewards", "the gist's own functions", "the script's accuracy logging"]
    return [[name, f"{ms:.2f} ms"] for name, ms in zip(names, times, strict=True)]


def laptop() -> None:
    """Print the laptop's three tables."""
    ways = {"bare": (bare, []), "script": (script, []), "four calls": (script, FOUR_CALLS)}
    flags = [*LAPTOP, "--max_steps", str(STEPS), *SHORT]
    rounds = [{k: run(f, [*flags, *more]) for k, (f, more) in ways.items()} for _ in range(ROUNDS)]
    pairs = [(got["bare"]["seconds"], got["script"]["seconds"]) for got in rounds]
    title = f"The median step of runs of {STEPS} steps, in pairs"
    table(title, ["pair", "bare GRPOTrainer", "the script", "ratio"], step_rows(pairs))
    splits = [mean_split([got[way]["split"] for got in rounds]) for way in ("script", "four calls")]
    columns = ["part", "one call of 64, seconds", "share", "the gist's four calls of 16", "share"]
    table("Where the time of a step goes", columns, split_rows(splits))
    title = "The rewards of 64 completions of 1,000 characters"
    table(title, ["what", "fastest of 200"], reward_rows())


SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size"
SHAPES = {
    "1.5b": {
        "sizes": [1536, 8960, 28, 12, 151_936],  # Qwen2.5-1.5B's; the weights do not matter
        "tokens": 786,
        "questions": 8,  # in a prompt: as many tokens as one of GSM8K's
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


def make_model(shape: dict, folder: Path) -> int:
    """Save a model of `shape` with random weights, and 64 training rows; return its parameters."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = dict(zip(SIZES.split(), shape["sizes"], strict=True))
    config = Qwen2Config(**sizes, **ids, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = (ROOT / "assets/tiny/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for i, row in enumerate(rows[:64]):
        row["question"] = " ".join(r["question"] for r in rows[i : i + shape["questions"]])
    text = "".join(json.dumps(row) + "\n" for row in rows[:64])
    (folder / "train.jsonl").write_text(text)
    return model.num_parameters()


def gpu_row(flags: list[str]) -> list[str]:
    """Return the cells of one way: means over its steps after the first; or why it failed."""
    try:
        got = run(script, flags)
    except RuntimeError as error:  # out of memory, or a backend that does not run here
        return [str(error).strip().splitlines()[-1][:200], *[""] * 4]
    generate, total = got["split"]["generate"], sum(got["split"].values())
    lengths = [step["completions/mean_length"] for step in got["metrics"][1:]]
    return [
        f"{total:.2f}",
        f"{3600 / total:,.0f}",
        f"{64 * statistics.mean(lengths) / generate:,.0f}",
        f"{generate / total:.1%}",
        f"{got['peak'] / 1e9:.2f} GB",
    ]


def gpu(shape: dict) -> None:
    """Print one table: ways to generate and micro-batches, on a model with random weights."""
    cache = json.dumps({"max_memory_percent": shape["cache"]})
    batching = ["--use_transformers_continuous_batching", "True"]
    batching += ["--transformers_continuous_batching_config", cache]
    ways = {
        "the gist's: four calls of 16, micro-batch 16": FOUR_CALLS,
        "one call of 64, micro-batch 1": micro_batch(1),
        "one call of 64, micro-batch 16": micro_batch(16),
        "continuous batching, micro-batch 16": [*micro_batch(16), *batching],
    }
    if importlib.util.find_spec("vllm"):
        vllm = ["--use_vllm", "True", "--vllm_mode", "colocate"]
        vllm += ["--vllm_importance_sampling_correction", "False"]
        ways["vLLM, colocate, micro-batch 16"] = [*micro_batch(16), *vllm]
    on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "--bf16=False", "--dtype=float32"]
    columns = ["way", "seconds a step", "steps an hour", "tokens/s", "generation's share", "peak"]
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_model(shape, Path(folder))
        flags = ["--model_name_or_path", folder, "--dataset_name", folder, *SHORT]
        flags += ["--max_completion_length", str(shape["tokens"]), *on_cpu]
        flags += ["--max_steps", str(shape["steps"])]
        rows = ([way, *gpu_row([*flags, *more])] for way, more in ways.items())
        title = f"{parameters:,} random weights, 64 completions of {shape['tokens']} tokens"
        table(title, columns, rows)


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["--child"]:
        _, _, what, out, *flags = sys.argv
        return child(globals()[what], out, flags)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="the real shape, on one GPU")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b", help="of --gpu")
    args = parser.parse_args()
    facts = environment()
    known = ("torch", "transformers", "trl", "vllm")
    versions = [f"{name} {facts['versions'][name]}" for name in known if name in facts["versions"]]
    hardware = [f"{v} {k}" if k == "cores" else str(v) for k, v in facts["hardware"].items()]
    print(f"## {date.today()}: `python {' '.join(['tests/benchmark.py', *sys.argv[1:]])}`")
    print(f"\n{', '.join(hardware)}; {', '.join(versions)}.", flush=True)
    gpu(SHAPES[args.shape]) if args.gpu else laptop()


if __name__ == "__main__":
    main()
