"""Where the time of a run goes, and what makes it less.

    python tests/benchmark.py > assets/benchmark.md              # the laptop default, on the CPU: about 6 minutes
    python tests/benchmark.py --gpu >> assets/benchmark.md       # the real shape with random weights, on one CUDA GPU
    python tests/benchmark.py --gpu --only training              # one part of it: generation, training or whole
    python tests/benchmark.py --gpu --shape tiny                 # the same code on any CPU, at a tiny shape

What is compared on the CPU runs by turns, so that a machine that is slow for a minute is slow for both.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import math
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
LAPTOP = ["--config", "assets/tiny/config.yaml", "--save_strategy", "no"]
FOUR_CALLS = [
    "--per_device_train_batch_size",
    "16",
    "--gradient_accumulation_steps",
    "4",
    "--steps_per_generation",
    "1",
]
ONE_CALL = FOUR_CALLS[:4]  # the same micro-batches


def say(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(title: str, columns: str) -> None:
    print(f"\n### {title}\n")
    say(*columns.split(", "))
    say(*["---"] * len(columns.split(", ")))


def race(*functions, rounds: int = 5) -> list[float]:
    """Seconds of the fastest of `rounds` runs of each function; they take turns, and the first turn does not count."""
    times = [[] for _ in functions]
    for i in range(rounds + 1):
        turn()
        for function, kept in zip(functions, times, strict=True):
            begun = time.perf_counter()
            function()
            kept += [time.perf_counter() - begun] if i else []
    turn(last=True)
    return [min(kept) for kept in times]


def children(*jobs: tuple) -> list[dict]:
    """Measurements in processes of their own: each a function's name, flags of grpo_demo.py, and `env:NAME=VALUE`.

    They run at the same time and take turns, a step each: a machine that is slow for a minute is slow for all.
    """
    pipes, running, answers = [os.pipe() for _ in jobs], [], []
    with tempfile.TemporaryDirectory() as folder:
        for i, (what, *flags) in enumerate(jobs):
            answer, ring = Path(folder, f"{i}.json"), (pipes[i][0], pipes[(i + 1) % len(jobs)][1])
            env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
            env |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "HF_HUB_OFFLINE": "1", "STARTED": str(time.time())}
            env |= {"RING": json.dumps(ring)} if len(jobs) > 1 else {}
            env |= dict(flag[4:].split("=") for flag in flags if flag.startswith("env:"))
            command = [sys.executable, __file__, "--child", what, str(answer)]
            command += [flag for flag in flags if not flag.startswith("env:")]
            command += ["--output_dir", str(Path(folder, str(i)))]
            with answer.with_suffix(".log").open("w") as log:
                process = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=ring, stdout=log, stderr=log)
            running.append((answer, process))
        os.write(pipes[0][1], b".")
        for end in itertools.chain(*pipes):
            os.close(end)
        for job, (answer, process) in zip(jobs, running, strict=True):
            if process.wait() or not answer.exists():
                raise SystemExit(f"{job}: {answer.with_suffix('.log').read_text()[-3000:]}")
            answers.append(json.loads(answer.read_text()))
    return answers


def turn(last: bool = False) -> None:
    """Pass the turn on to the next process of a ring, and, unless it was the last one, wait for the next."""
    if ring := json.loads(os.environ.get("RING", "[]")):
        with contextlib.suppress(BrokenPipeError):  # the next one has ended
            os.write(ring[1], os.environ.pop("HAS_TURN", "").encode())
        if not last:
            os.environ["HAS_TURN"] = os.read(ring[0], 1).decode()


# --- measurements, each in a process of its own: flags of grpo_demo.py in, seconds out


def first_step(flags: list[str]) -> dict:
    """From the start of Python to the end of the first optimizer step, by part."""
    import grpo_demo

    begun = float(os.environ["STARTED"])
    parts = {"imports": time.time() - begun}

    def timed(name: str, part: str) -> None:
        function = getattr(grpo_demo, name)

        def wrapper(*args, **kwargs):
            entered = time.time()
            result = function(*args, **kwargs)
            parts[part] = parts.get(part, 0.0) + time.time() - entered
            return result

        setattr(grpo_demo, name, wrapper)

    timed("get_gsm8k_questions", "data")
    timed("build_trainer", "model, reference, trainer")
    timed("evaluate", "evaluation before training")

    class Watch(grpo_demo.Watch):
        def on_step_begin(self, args, state, control, **kwargs):
            entered = time.time()
            super().on_step_begin(args, state, control, **kwargs)
            self.entered, parts["W&B"] = time.time(), time.time() - entered

        def on_step_end(self, *args, **kwargs):
            parts["the step"] = time.time() - self.entered
            raise SystemExit

    grpo_demo.Watch = Watch
    with contextlib.suppress(SystemExit):
        grpo_demo.main(flags)
    total = time.time() - begun
    return {"total": total, "parts": parts | {"the rest": total - sum(parts.values())}}


def stamp(trainer) -> list[float]:
    """A list that gets the seconds of each step, from its beginning to the next one's."""
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Stamp(TrainerCallback):
        begun = None

        def on_step_begin(self, args, state, control, **kwargs):
            if self.begun:
                seconds.append(time.perf_counter() - self.begun)
            turn()
            self.begun = time.perf_counter()

        def on_train_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.begun)
            turn(last=True)

    trainer.add_callback(Stamp())
    return seconds


def script(flags: list[str]) -> dict:
    """Steps of grpo_demo.py: seconds of each, the split of their time, peak memory."""
    import torch
    from record import collect, time_split

    import grpo_demo

    build, steps = grpo_demo.build_trainer, []

    def build_and_stamp(*args):
        trainer = build(*args)
        steps.append(stamp(trainer))
        return trainer

    grpo_demo.build_trainer = build_and_stamp
    grpo_demo.main(flags)
    (seconds,), split = steps, {}
    if "none" not in flags:
        metrics, timers, _ = collect(Path(flags[-1]))
        kept = len(metrics) - (len(metrics) > 2)  # without the last one, in which the run ends
        timers = {name: values[: len(values) // len(metrics) * kept] for name, values in timers.items()}
        split = time_split(metrics[:kept], timers)
        split["the rest"] += statistics.mean(seconds[1:kept]) - sum(split.values())  # without waiting for others
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "split": split, "peak": peak or resident}


def bare(flags: list[str]) -> dict:
    """The same steps of TRL's GRPOTrainer with the gist's rewards and transformers' own W&B callback."""
    import grpo_demo

    args, model_args = grpo_demo.parse_args(flags)
    grpo_demo.REWARD_FUNCS = GIST
    rows = grpo_demo.get_gsm8k_questions("train", args.dataset_name, args.dataset_config)
    trainer = grpo_demo.build_trainer(args, model_args, rows)
    seconds = stamp(trainer)
    trainer.train()
    return {"seconds": seconds}


def generate_laptop(flags: list[str]) -> dict:
    """One generate call of a step's 64 rows, and four of 16: seconds."""
    import torch

    import grpo_demo

    args, model_args = grpo_demo.parse_args(flags)
    model, tokenizer = grpo_demo.load_model(args, model_args)
    prompts = [row for row in grpo_demo.get_gsm8k_questions("train", args.dataset_name)["prompt"][:8] for _ in range(8)]
    style = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    rows = tokenizer.apply_chat_template(prompts, **style)
    sampling = {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 1.0, "max_new_tokens": 64}

    def generate(size: int) -> None:
        torch.manual_seed(0)
        for i in range(0, 64, size):
            model.generate(**{k: v[i : i + size] for k, v in rows.items()}, **sampling)

    one, four = race(lambda: generate(64), lambda: generate(16))
    return {"one": one, "four": four}


# --- the gist's five functions, as its facts have them


def gist_extract(text: str) -> str:
    answer = text.split("<answer>")[-1]
    answer = answer.split("</answer>")[0]
    return answer.strip()


def gist_correctness(prompts, completions, answer, **kwargs) -> list[float]:
    responses = [completion[0]["content"] for completion in completions]
    extracted = [gist_extract(r) for r in responses]
    print("-" * 20, prompts[0][-1]["content"], answer[0], responses[0], extracted[0], sep="\n")
    return [2.0 if r == a else 0.0 for r, a in zip(extracted, answer, strict=True)]


def gist_int(completions, **kwargs) -> list[float]:
    responses = [completion[0]["content"] for completion in completions]
    return [0.5 if gist_extract(r).isdigit() else 0.0 for r in responses]


def gist_strict(completions, **kwargs) -> list[float]:
    responses = [completion[0]["content"] for completion in completions]
    pattern = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
    return [0.5 if re.match(pattern, r, flags=re.DOTALL) else 0.0 for r in responses]


def gist_soft(completions, **kwargs) -> list[float]:
    responses = [completion[0]["content"] for completion in completions]
    pattern = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    return [0.5 if re.match(pattern, r, flags=re.DOTALL) else 0.0 for r in responses]


def gist_xmlcount(completions, **kwargs) -> list[float]:
    def count(text: str) -> float:
        value = 0.0
        if text.count("<reasoning>\n") == 1:
            value += 0.125
        if text.count("\n</reasoning>\n") == 1:
            value += 0.125
        if text.count("\n<answer>\n") == 1:
            value += 0.125
            value -= len(text.split("\n</answer>\n")[-1]) * 0.001
        if text.count("\n</answer>") == 1:
            value += 0.125
            value -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
        return value

    return [count(completion[0]["content"]) for completion in completions]


GIST = [gist_xmlcount, gist_soft, gist_strict, gist_int, gist_correctness]


def long_completions() -> dict:
    """A step's 64 completions of about 1,000 characters, as a 1.5B model writes; every fourth of another form."""
    import grpo_demo
    from rewards import extract_hash_answer

    rows = [json.loads(line) for line in (ROOT / "assets/tiny/test.jsonl").read_text().splitlines()]
    texts, gold = [], []
    for i in range(64):
        reasoning = "\n".join(rows[j]["answer"].split("\n####")[0] for j in range(8 * i, 8 * i + 16) if j < len(rows))
        gold.append(extract_hash_answer(rows[8 * i]["answer"]))
        text = grpo_demo.XML_COT_FORMAT.format(reasoning=reasoning[:1000], answer=gold[-1])
        texts.append([text, text.replace("\n", " "), f"{reasoning}\nThe answer is {gold[-1]}.", text[:-20]][i % 4])
    prompts = [grpo_demo.make_prompt(row["question"]) for row in rows[:64]]
    return {"prompts": prompts, "completions": [[{"content": text}] for text in texts], "answer": gold}


# --- the laptop's table


def cpu() -> None:
    import torch

    from rewards import REWARD_FUNCS

    head("The laptop default, on a CPU", "what, measured, beside, how they compare")
    begin = min((children(("first_step", *LAPTOP))[0] for _ in range(2)), key=lambda x: x["total"])
    share = ", ".join(f"{k} {v / begin['total']:.0%}" for k, v in begin["parts"].items())
    say("start to the end of the first step", f"{begin['total']:.1f} s", share, "100%")

    short = [*LAPTOP, "--evaluate", "False", "--max_steps"]  # same seed, same completions: the same work
    pair = children(("bare", *short, "32"), ("script", *short, "32"))
    plain, ours = (run["seconds"][1:-1] for run in pair)  # not the first and the last, in which things begin and end
    ratio = statistics.median(y / x for x, y in zip(plain, ours, strict=True))
    beside = f"{statistics.median(plain):.3f} s: a bare GRPOTrainer with the gist's rewards, the same step by turns"
    say("a step of the script", f"{statistics.median(ours):.3f} s", beside, f"{ratio:.3f}, median of 30 ratios")
    ways = children(*(("script", *short, "14", *more) for more in ([], ONE_CALL, FOUR_CALLS)))

    spin, passive = children(("generate_laptop", *LAPTOP), ("generate_laptop", *LAPTOP, "env:GOMP_SPINCOUNT=0"))
    ratio = f"{spin['four'] / spin['one']:.2f} x faster"
    say("one generate call of 64 rows", f"{spin['one']:.2f} s", f"{spin['four']:.2f} s: the gist's four of 16", ratio)
    ratio = f"{passive['one'] / spin['one']:.2f} x faster"
    say("the same call, GOMP_SPINCOUNT=30000", f"{spin['one']:.2f} s", f"{passive['one']:.2f} s: without", ratio)

    texts = long_completions()
    metrics = texts | {"log_metric": lambda *a: None, "log_extra": lambda *a: None}

    def silent() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            [f(**texts) for f in GIST]

    def rewards() -> None:
        [f(**texts) for f in REWARD_FUNCS]

    mine, theirs, full = race(rewards, silent, lambda: [f(**metrics) for f in REWARD_FUNCS], rounds=200)
    beside = f"{1000 * theirs:.2f} ms: the gist's functions, transcribed"
    say(
        "five rewards, 64 completions of 1,000 characters",
        f"{1000 * mine:.2f} ms",
        beside,
        f"{mine / theirs:.2f} of it",
    )
    say(
        "the same with accuracy and equations beside them",
        f"{1000 * full:.2f} ms",
        "as above",
        f"{full / theirs:.2f} times it",
    )

    head("Where a step's time goes", "part, default, micro-batch 16, the gist's way: four calls of 16")
    for part in ways[0]["split"]:
        say(part, *(f"{w['split'][part]:.3f} s, {w['split'][part] / sum(w['split'].values()):.1%}" for w in ways))
    say("together", *(f"{sum(w['split'].values()):.3f} s, 100%" for w in ways))
    say("steps an hour", *(f"{3600 / sum(w['split'].values()):,.0f}" for w in ways))

    head("Memory against the micro-batch", "completions a backward pass, peak memory, a step")
    for size in (1, 4, 16, 64):
        flags = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(64 // size)]
        short = ["--max_steps", "3", "--evaluate", "False", "--report_to", "none"]
        (got,) = children(("script", *LAPTOP, *flags, *short))
        say(size, f"{got['peak'] / 1e6:,.0f} MB", f"{min(got['seconds']):.2f} s")
    print(
        f"\n{torch.get_num_threads()} threads; memory is the resident set of the process, torch included, without W&B."
    )


# --- the GPU's tables

SHAPES = {
    "1.5b": {  # Qwen2.5-1.5B's configuration; speed does not depend on the values of its weights
        "config": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                       num_key_value_heads=2, vocab_size=151_936, rope_theta=1e6, tie_word_embeddings=True),
        "tokens": 786, "median": 270, "questions": 4, "copy": 2**31, "matrix": 8192, "micro": [1, 2, 4, 8, 16, 32, 64],
        "memory": [0.3, 0.5, 0.8],
    },
    "tiny": {
        "config": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=1024, rope_theta=1e6, tie_word_embeddings=True),
        "tokens": 12, "median": 6, "questions": 1, "copy": 2**20, "matrix": 128, "micro": [16, 64], "memory": [0.05],
    },
}  # fmt: skip


PARTS = ["generation", "training", "whole"]


class Bench:
    """The model of a shape, saved for the script to load; prompts; the two rates that bound it."""

    def __init__(self, shape: dict, folder: Path):
        import torch
        from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

        self.torch, self.shape, self.folder = torch, shape, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny", padding_side="left")
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(0)
        with self.device:
            self.model = Qwen2ForCausalLM(Qwen2Config(**shape["config"], **ids)).to(self.dtype).eval()
        self.model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = [json.loads(line) for line in (ROOT / "assets/tiny/train.jsonl").read_text().splitlines()]
        n = shape["questions"]  # four of them are as many tokens as one of GSM8K's
        rows = [rows[i] | {"question": " ".join(r["question"] for r in rows[i : i + n])} for i in range(64)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        import grpo_demo

        prompts = [grpo_demo.make_prompt(rows[i]["question"]) for i in range(4) for _ in range(16)]
        self.prompts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
        lengths = random.Random(0)
        spread = [round(shape["median"] * math.exp(lengths.gauss(0, 0.45))) for _ in range(64)]
        self.profiles = {f"{shape['tokens']} tokens each": [shape["tokens"]] * 64}
        self.profiles[f"median {shape['median']}"] = [min(max(n, 2), shape["tokens"]) for n in spread]
        x = torch.empty(shape["copy"], dtype=torch.uint8, device=self.device)
        a = torch.randn(shape["matrix"], shape["matrix"], device=self.device, dtype=self.dtype)
        copy, multiply = race(lambda: self.sync(x.clone()), lambda: self.sync(a @ a))
        self.bandwidth, self.flops = 2 * shape["copy"] / copy, 2 * shape["matrix"] ** 3 / multiply

    def sync(self, _=None) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def peak(self) -> str:
        return (
            f"{self.torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if self.device.type == "cuda" else "not on a CPU"
        )

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def decode_floor(self, lengths: list[int]) -> float:
        """Seconds to read the weights once a token and every row's keys and values once a token of that row."""
        c = self.model.config
        kept = 2 * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads
        read = self.model.num_parameters() * max(lengths)
        read += kept * sum(len(p) + t for p, n in zip(self.prompts, lengths, strict=True) for t in range(n))
        return read * self.dtype.itemsize / self.bandwidth

    def train_floor(self, lengths: list[int], lora: str) -> float:
        """Seconds of 8 FLOPs a weight and token: 2 for the reference, 2 forward, 4 backward (2 with LoRA)."""
        return (
            (6 if lora else 8) * self.model.num_parameters() * (sum(map(len, self.prompts)) + sum(lengths)) / self.flops
        )

    def generate(self, lengths: list[int], size: int = 64, greedy: bool = False) -> list[list[int]]:
        """`generate` in calls of `size` rows; a row is done at its length, a call when its longest row is."""
        from transformers import GenerationConfig, StoppingCriteria

        torch, tokens = self.torch, []

        class Lengths(StoppingCriteria):
            def __init__(self, width: int, wanted: list[int], device):
                self.ends = torch.tensor([width + n for n in wanted], device=device)

            def __call__(self, input_ids, scores, **kwargs):
                return input_ids.shape[1] >= self.ends

        for i in range(0, 64, size):
            rows = self.prompts[i : i + size]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=self.device)
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.device)
            wanted = lengths[i : i + size]
            config = GenerationConfig(**self.sampling(greedy, max(wanted)))
            stop = [Lengths(width, wanted, self.device)]
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stop
                )
            tokens += [row[width : width + n] for row, n in zip(out.tolist(), wanted, strict=True)]
        return tokens

    @staticmethod
    def sampling(greedy: bool, tokens: int) -> dict:
        how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 1.0}
        return how | {"max_new_tokens": tokens, "pad_token_id": 0, "eos_token_id": -1}  # no EOS: it is held off

    def continuous(self, lengths: list[int], greedy: bool = False, **settings) -> list[list[int]]:
        """Continuous batching, set up anew in each call, as TRL does; a row that is done makes room."""
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        hints = WorkloadHints(
            max_prompt_length=max(map(len, self.prompts)), max_generated_length=max(lengths), num_requests=64
        )
        config, done = GenerationConfig(**self.sampling(greedy, max(lengths))), {}
        with (
            self.torch.no_grad(),
            self.model.continuous_batching_context_manager(
                generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(**settings),
                timeout=5,
                workload_hints=hints,
            ) as manager,
        ):
            order = [manager.add_request(p, max_new_tokens=n) for p, n in zip(self.prompts, lengths, strict=True)]
            while len(done) < 64:
                result = manager.get_result(timeout=1)
                if result is not None and result.error:
                    raise RuntimeError(result.error)
                if result is not None and result.is_finished():
                    done[result.request_id] = result.generated_tokens
                elif result is None and not manager.is_running():
                    raise RuntimeError("continuous batching stopped")
        return [done[name] for name in order]

    def flags(self, micro: int, *more: str) -> list[str]:
        """Flags of grpo_demo.py: three steps of 64 completions on this model."""
        place = ["--model_name_or_path", str(self.folder / "model"), "--dataset_name", str(self.folder)]
        place += ["--max_steps", "3", "--evaluate", "False", "--save_strategy", "no", "--log_completions", "False"]
        place += ["--max_completion_length", str(self.shape["tokens"]), "--disable_tqdm", "True"]
        place += ["--per_device_train_batch_size", str(micro), "--gradient_accumulation_steps", str(64 // micro)]
        return [
            *place,
            *([] if self.device.type == "cuda" else ["--use_cpu", "--bf16=False", "--dtype=float32"]),
            *more,
        ]

    def train(self, lengths: list[int], micro: int, *more: str) -> tuple[float, float]:
        """A step without its generation: seconds, and the norm of its gradient before clipping."""
        import grpo_demo

        rng = random.Random(0)
        completions = [[rng.randrange(3, 800) for _ in range(n)] for n in lengths]

        class Fixed(grpo_demo.GRPOTrainer):
            def _generate_single_turn(self, *args, **kwargs):
                return completions, None

        flags = [*self.flags(micro, *more), "--report_to", "none", "--output_dir", str(self.folder / "out")]
        args, model_args = grpo_demo.parse_args(flags)
        rows = grpo_demo.get_gsm8k_questions("train", args.dataset_name)

        def every_fourth(completions, **kwargs) -> list[float]:  # some reward: the completions are noise
            return [float(i % 4 == 0) for i in range(len(completions))]

        with mock.patch.multiple(grpo_demo, GRPOTrainer=Fixed, REWARD_FUNCS=[every_fourth]):
            trainer = grpo_demo.build_trainer(args, model_args, rows)
        seconds = stamp(trainer)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return min(seconds[1:]), trainer.state.log_history[0]["grad_norm"]

    def generation(self) -> None:
        """Backends: seconds, distance to the floor, and whether greedy decoding gives the tokens of one call."""
        head("64 completions", "backend, lengths, seconds, tokens/s, x floor, peak, greedy tokens as one call")
        backends = {"four calls of 16 (the gist)": lambda n, g: self.generate(n, 16, g)}
        backends["one call of 64"] = lambda n, g: self.generate(n, 64, g)
        for percent in self.shape["memory"]:
            for graphs in (False, True) if self.device.type == "cuda" else (False,):
                title = f"continuous batching, {percent:.0%} of memory{', CUDA graphs' if graphs else ''}"
                settings = {"max_memory_percent": percent, "use_cuda_graph": graphs}
                backends[title] = lambda n, g, s=settings: self.continuous(n, g, **s)
        for profile, lengths in self.profiles.items():
            short = [min(n, 64) for n in lengths]
            expected = self.generate(short, 64, True)
            for title, backend in backends.items():
                self.clear()
                try:
                    got = backend(short, True)  # and with it everything is warm
                    begun = time.perf_counter()
                    backend(lengths, False)
                    self.sync()
                    seconds = time.perf_counter() - begun
                    pairs = [x == y for a, b in zip(got, expected, strict=True) for x, y in zip(a, b, strict=True)]
                except Exception as error:  # out of memory, or a backend that does not run here: its row says so
                    say(title, profile, f"{type(error).__name__}: {' '.join(str(error).split())[:80]}", *[""] * 4)
                    continue
                floor, rate = f"{seconds / self.decode_floor(lengths):.1f}", f"{sum(lengths) / seconds:,.0f}"
                say(title, profile, f"{seconds:.2f}", rate, floor, self.peak(), f"{sum(pairs) / len(pairs):.1%}")
        with contextlib.suppress(ImportError):
            import vllm

            say(f"vLLM {vllm.__version__}", "is installed: compare with --use_vllm --vllm_mode colocate", *[""] * 5)

    def training(self) -> None:
        """A step on fixed completions: attention, checkpointing, micro-batch, LoRA."""
        from transformers.utils import is_flash_attn_2_available

        columns = "attention, checkpointing, micro-batch, lengths, seconds, x floor, peak, gradient norm"
        head("A step without its generation", columns)
        self.model.to("cpu")
        smallest, flash = self.shape["micro"][0], is_flash_attn_2_available()
        settings = [("sdpa", False, micro, "") for micro in self.shape["micro"]]
        settings += [(a, c, 16, "") for a in ("sdpa", *["flash_attention_2"] * flash) for c in (False, True)]
        settings += [("sdpa", checkpointing, smallest, "--use_peft") for checkpointing in (False, True)]
        jobs = [(*self.profiles.items(),)[0] + setting for setting in dict.fromkeys(settings)]
        jobs += [(*self.profiles.items(),)[1] + ("sdpa", False, micro, "") for micro in dict.fromkeys([smallest, 16])]
        for profile, lengths, attention, checkpointing, micro, lora in jobs:
            self.clear()
            title = [attention + (", LoRA" if lora else ""), "on" if checkpointing else "off", micro, profile]
            flags = ["--attn_implementation", attention, "--gradient_checkpointing", str(checkpointing)]
            try:
                seconds, norm = self.train(lengths, micro, *flags, *([lora] if lora else []))
            except Exception as error:
                say(*title, f"{type(error).__name__}: {' '.join(str(error).split())[:80]}", "", self.peak(), "")
                continue
            floor = f"{seconds / self.train_floor(lengths, lora):.1f}"
            say(*title, f"{seconds:.2f}", floor, self.peak(), f"{norm:.5g}")

    def whole(self) -> None:
        """The script's second step, generation and all: the gist's way first, the others as ratios of it."""
        head("The script, its second step", "way, seconds a step, steps an hour, generation's share, peak, x faster")
        self.model.to("cpu")
        self.clear()
        ways = {"the gist's: four calls of 16, micro-batch 16": self.flags(16, "--steps_per_generation", "1")}
        ways |= {f"one call of 64, micro-batch {m}": self.flags(m) for m in dict.fromkeys([self.shape["micro"][0], 16])}
        for percent in self.shape["memory"]:
            batching = ["--use_transformers_continuous_batching", "True", "--transformers_continuous_batching_config"]
            flags = self.flags(16, *batching, json.dumps({"max_memory_percent": percent}))
            ways[f"continuous batching, {percent:.0%} of memory, micro-batch 16"] = flags
        first = None
        for title, flags in ways.items():
            try:
                (got,) = children(("script", *flags, "--max_steps", "2"))
            except SystemExit as error:
                say(title, " ".join(str(error).split())[-120:], *[""] * 4)
                continue
            seconds, split = got["seconds"][1], got["split"]
            first = first or (seconds if title.startswith("the gist's") else float("nan"))
            share, peak = f"{split['generate'] / sum(split.values()):.0%}", f"{got['peak'] / 1e9:.1f} GB"
            say(title, f"{seconds:.2f}", f"{3600 / seconds:,.0f}", share, peak, f"{first / seconds:.2f}")


def gpu(name: str, only: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SHAPES[name], Path(folder))
        where = bench.torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
        rates = f"{bench.bandwidth / 1e9:,.0f} GB/s copying, {bench.flops / 1e12:,.1f} TFLOP/s multiplying"
        print(f"\n{where}: {rates} matrices; {bench.model.num_parameters():,} random weights.")
        for part in [only] if only else PARTS:
            getattr(bench, part)()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        what, answer, *flags = sys.argv[2:]
        if what != "first_step":
            import grpo_demo  # noqa: F401 - before torch: it says how OpenMP's threads wait
        result = globals()[what](flags)
        Path(answer).write_text(json.dumps(result))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the real shape, on one GPU")
    parser.add_argument("--only", choices=PARTS, help="one part of --gpu")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b", help="of --gpu")
    args = parser.parse_args()
    from record import environment

    facts = environment()
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "trl"))
    hardware = ", ".join(f"{v} {k}" if k == "cores" else str(v) for k, v in facts["hardware"].items())
    print(f"## {date.today()}: `python {' '.join(['tests/benchmark.py', *sys.argv[1:]])}`")
    print(f"\n{hardware}; {versions}.", flush=True)
    gpu(args.shape, args.only) if args.gpu else cpu()


if __name__ == "__main__":
    main()
