"""Nothing lost: what keeps a run of `grpo_demo.py` when it is killed, cut off or starved. No learning happens here.

`open_output` decides what the output directory is: new, to be gone on with, finished, or somebody else's. `Watch` is
the callback that saves on SIGTERM and Ctrl-C, opens W&B where new steps begin, and warns of silent failure.
`usable_rows` leaves out rows without question or gold answer. `report` prints and keeps the evaluation.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import pandas as pd
import torch
import wandb
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.integrations import WandbCallback
from trl import GRPOConfig, GRPOTrainer, ModelConfig
from trl.extras.profiling import profiling_context

from assets.measures import as_number
from assets.verdict import figures, verdict
from rewards import extract_hash_answer

FREE_SETTINGS = [
    "evaluate",
    "eval_samples",
    "eval_only",
    "per_device_eval_batch_size",
    "overwrite_output",
    "output_dir",
]
FREE_SETTINGS += ["report_to", "project", "run_name", "logging_steps", "log_completions", "num_completions_to_print"]
FREE_SETTINGS += ["save_steps", "save_strategy", "save_total_limit", "disable_tqdm"]  # may differ when a run goes on


def say(message: str, error: bool = False, end: str = "\n") -> None:
    """Print, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr if error else sys.stdout, end=end, flush=True)


class UserError(Exception):
    """What a user can cause and mend: `main` prints it as one line and exits with status 2."""


def check_gpu(args: GRPOConfig) -> None:
    """UserError where there is no GPU that can do what `args` asks for; TRL would say so less clearly."""
    if not torch.cuda.is_available():
        raise UserError(
            "no CUDA GPU here. On a laptop: python grpo_demo.py --config assets/tiny/config.yaml [your flags]"
        )
    if (n := torch.cuda.device_count()) > 1 and "LOCAL_RANK" not in os.environ:
        n = 1 << n.bit_length() - 1  # as many as share 64 completions evenly
        launch = f"accelerate launch --num_processes {n} grpo_demo.py --gradient_accumulation_steps {64 // n}"
        raise UserError(
            f"several GPUs for one process. Use {n}: {launch}; or one: CUDA_VISIBLE_DEVICES=0 python grpo_demo.py"
        )
    if args.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name()} has no bf16: add --bf16 False --fp16 True --dtype float32")


def read_row(row: str | dict) -> tuple[str, str]:
    """Question and gold answer of a JSON line or a dataset row; ValueError says what is missing."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
    except ValueError:
        raise ValueError("no JSON") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in ("question", "answer")):
        raise ValueError("no text in 'question' and 'answer'")
    gold = extract_hash_answer(row["answer"])
    if gold is None or as_number(gold) is None:
        raise ValueError("no number after '####'")
    return row["question"], gold


def usable_rows(rows: Iterable[str | dict]) -> tuple[list[tuple[str, str]], str]:
    """Question and gold answer of each row that has both, and why the others have not: '' where all have."""
    used, bad = [], Counter()
    for row in rows:
        try:
            used.append(read_row(row))
        except ValueError as error:
            bad[str(error)] += 1
    return used, "; ".join(f"{n} with {reason}" for reason, n in bad.items())


def print_banner(trainer: GRPOTrainer) -> None:
    """What is about to run, before it runs."""
    args, model, rows = trainer.args, trainer.model, len(trainer.train_dataset)
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    prompts = completions // args.num_generations
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * (rows // prompts))
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    say(f"model   {model.config._name_or_path}: {model.num_parameters():,} parameters", end="")
    say(f", {trainer.get_num_trainable_parameters():,} of them trained, {model.dtype}")
    say(f"device  {args.world_size} x {device}, {model.config._attn_implementation} attention")
    say(f"data    {args.dataset_name}: {rows:,} rows")
    say(f"run     {steps:,} steps of {completions} completions = {prompts} prompts x {args.num_generations}")
    say(f"output  {args.output_dir}")


def open_output(args: GRPOConfig, config: dict, rows: Dataset) -> tuple[dict, str | None]:
    """Makes the output directory this run's: its `run.json` (settings, W&B id) and a checkpoint to go on from.

    A finished run is left as it is (exit 0). UserError where the directory holds a run with other settings, or anything
    else; `--overwrite_output` moves it aside.
    """
    out, now = Path(args.output_dir), datetime.now()
    if args.overwrite_output and out.exists():
        say(f"moved the old {out} to {out.rename(out.with_name(f'{out.name}.{now:%Y%m%d-%H%M%S}'))}")
    settings = {k: str(v) for k, v in config.items() if k not in FREE_SETTINGS}
    rewards = hashlib.sha256(Path(__file__).parents[1].joinpath("rewards.py").read_bytes()).hexdigest()[:12]
    data = hashlib.sha256(repr(rows.to_dict()).encode()).hexdigest()[:12]
    settings |= {"data": data, "rewards.py": rewards, "world_size": str(args.world_size)}
    if not Path(out, "run.json").exists():
        if any(f.is_file() and not f.relative_to(out).parts[0].startswith("eval-") for f in out.rglob("*")):
            raise UserError(f"{out} holds something else: another --output_dir, or --overwrite_output to move it aside")
        return {"settings": settings, "wandb_id": f"{now:%m%d%H%M%S}-{os.getpid()}", "finished": False}, None
    run = json.loads(Path(out, "run.json").read_text())
    if changed := [f"{k} {run['settings'].get(k)} -> {v}" for k, v in settings.items() if run["settings"].get(k) != v]:
        raise UserError(
            f"{out} is a run with other settings ({'; '.join(changed)}): another --output_dir, or --overwrite_output"
        )
    if run["finished"]:
        say(f"{out} is finished, nothing to do; --overwrite_output moves it aside and starts anew")
        raise SystemExit(0)
    for folder in sorted(out.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        if is_complete(folder, args.world_size):
            say(f"going on from {folder}")
            return run, str(folder)
        say(f"warning: {folder} is half written: passed over", error=True)
    return run, None


def is_complete(folder: Path, world_size: int) -> bool:
    """Whether a checkpoint was written to its end: `trainer_state.json` comes last, random states one per process."""
    try:
        json.loads(Path(folder, "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return len(list(folder.glob("rng_state*.pth"))) == world_size


def write_atomically(path: Path, value: dict) -> None:
    """Write JSON in one go: a reader finds the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(value, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def start_wandb(args: GRPOConfig, config: dict, run_id: str) -> None:
    """Open the W&B run in the output directory, offline where no key is configured, with the full configuration."""
    if "wandb" not in args.report_to or args.process_index != 0 or wandb.run:
        return
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    where = {"project": os.environ.get("WANDB_PROJECT", args.project), "name": args.run_name, "dir": args.output_dir}
    where |= {"config": config, "id": run_id, "resume": "allow"}
    quick = wandb.Settings(  # to the file at once, so that a kill loses nothing; no waiting for a server that is gone
        x_transaction_log_flush_interval=0.01, init_timeout=30, finish_timeout=60, finish_timeout_raises=True
    )
    try:
        wandb.init(**where, mode=mode, settings=quick)
    except wandb.Error as error:
        say(f"warning: W&B cannot be reached ({error}); the run is kept offline", error=True)
        wandb.teardown()  # it still holds the run's id
        wandb.init(**where, mode="offline", settings=quick)


def last_logged_step(out: Path) -> int:
    """The last step whose metrics are in the W&B files of a run that was stopped, 0 where there are none."""
    last = 0
    for file in out.glob("wandb/*run-*/*.wandb"):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
        read = subprocess.run(command, capture_output=True, text=True)
        summary = json.loads(read.stdout)["summary"] if read.returncode == 0 else {}
        last = max(last, int(summary.get("train/global_step", 0)))
    return last


def report(measured: dict[str, list[dict]], args: GRPOConfig, model_args: ModelConfig) -> None:
    """Print the table and, of three measurements, the verdict; keep them as `evaluation.json` and in W&B."""
    settings = {k: getattr(args, k) for k in ("dataset_name", "max_completion_length", "seed", "output_dir")}
    result = {"settings": {"model": model_args.model_name_or_path, **settings, "decoding": "greedy"}}
    result["measurements"] = {name: figures(rows) for name, rows in measured.items()}
    say("\n" + "".join(f"{title:>27}" for title in [f"{len(next(iter(measured.values())))} questions", *measured]))
    for column in ["strict_format", "soft_format", "strict_accuracy", "lenient_accuracy", "truncated", "tokens"]:
        cells = [result["measurements"][name][column] for name in measured]
        cell = "{:.1f} [{:.1f}, {:.1f}]" if column == "tokens" else "{:.1%} [{:.1%}, {:.1%}]"
        say(f"{column:>27}" + "".join(f"{cell.format(c['value'], *c['interval']):>27}" for c in cells))
    if len(measured) == 3:
        result |= verdict(*measured.values(), one_shot=args.one_shot)
        say("\n".join(["", f"verdict: {result['verdict']}", *result["sentences"]]))
    if args.process_index == 0:
        write_atomically(Path(args.output_dir, "evaluation.json"), result)
    if wandb.run:
        for name, rows in measured.items():
            wandb.run.summary.update({f"eval/{name}/{k}": v["value"] for k, v in result["measurements"][name].items()})
            wandb.log({f"eval/{name}": wandb.Table(dataframe=pd.DataFrame(rows[:50]))})
        wandb.run.summary.update({f"eval/{k}": result[k] for k in ("verdict", "sentences") if k in result})


class Watch(WandbCallback):
    """Logs to W&B the steps it does not have, saves and stops on SIGTERM and Ctrl-C, speaks up where failure is silent.

    After a kill some steps are done again, from the last checkpoint. They are the same steps, and W&B has them.
    """

    def __init__(self, trainer: GRPOTrainer, config: dict, run_id: str):
        super().__init__()
        self.trainer, self.config, self.run_id = trainer, config, run_id
        self.signal, self.broken, self.formatted, self.flat, self.said = 0, False, False, 0, set()
        self.logged = last_logged_step(Path(trainer.args.output_dir))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if self.signal or not self.trainer.is_in_train:  # asked twice, or nothing to save
            say("\nstopped; the same command goes on from the last checkpoint", error=True)
            raise SystemExit(128 + number)
        self.signal = number

    def on_train_begin(self, args, state, control, **kwargs):
        pass  # the W&B run is opened below

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.logged:
            start_wandb(args, self.config, self.run_id)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.timer = profiling_context(self.trainer, "optimizer").__enter__()  # the timer that TRL does not have

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.timer.__exit__(None, None, None)

    def on_step_end(self, args, state, control, **kwargs):
        norms = torch._foreach_norm([p for p in kwargs["model"].parameters() if p.requires_grad])
        self.broken = not torch.stack([norm.float() for norm in norms]).isfinite().all()
        self.signal = max(gather_object([self.signal]))  # all processes stop at the same step
        if self.signal:
            control.should_save = control.should_training_stop = True
        if self.broken:
            control.should_log = True  # and there it stops, before anything is saved

    def on_log(self, args, state, control, logs, **kwargs):
        if wandb.run:
            super().on_log(args, state, control, logs=logs, **kwargs)
        if "reward" not in logs:
            return
        self.flat = self.flat + 1 if logs["frac_reward_zero_std"] == 1 else 0
        formats = [logs.get(f"rewards/{name}_format_reward_func/mean", 1.0) for name in ("soft", "strict")]
        self.formatted = self.formatted or any(formats)
        self.broken = self.broken or not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0))
        for problem, text in (
            (self.flat >= 20, "no group had any reward variance for 20 steps: nothing is learned; see its completions"),
            (logs["completions/clipped_ratio"] > 0.5, "most completions are cut off: raise --max_completion_length"),
            (state.global_step >= 50 and not self.formatted, "format rewards are still 0: look at the completions"),
            (self.broken, "the loss or a weight is not finite: stopping"),
        ):
            if problem and text not in self.said:
                self.said.add(text)
                say(f"\nwarning: step {state.global_step}: {text}", error=True)
                if wandb.run:
                    wandb.run.alert(title="grpo_demo", text=f"step {state.global_step}: {text}")
        if self.broken:  # do not save: the last checkpoint is the last good one
            control.should_training_stop, control.should_save = True, False


def explain_full_disk(trainer: GRPOTrainer, error: Exception) -> None:
    """Where a save failed for want of space: say how much it takes, drop the half of it, exit 1. Else nothing."""
    out, size = Path(trainer.args.output_dir), trainer.get_num_trainable_parameters() * trainer.model.dtype.itemsize
    need, free = 3 * size, shutil.disk_usage(out).free  # weights and Adam's two moments
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    hidden = any(word in str(error) for word in ("inline_container", "iostream"))  # torch.save does not say why
    if not full and not (hidden and free < need):
        return
    for folder in out.glob("checkpoint-*"):
        if not is_complete(folder, trainer.args.world_size):
            shutil.rmtree(folder, ignore_errors=True)
    room = f"a checkpoint takes about {need / 1e6:,.0f} MB, {free / 1e6:,.0f} MB were free in {out}"
    say(f"error: disk full: {room}. Make room: the same command goes on from the last checkpoint", error=True)
    raise SystemExit(1)


def how_to_talk(args: GRPOConfig) -> str:
    """A command that asks the trained model one question."""
    ask = "make_prompt('Mia has 14 pens and buys 23 more. How many pens does Mia have now?')"
    ask = f"pipeline('text-generation', '{args.output_dir}')({ask}, max_new_tokens={args.max_completion_length})"
    code = "from transformers import pipeline; from grpo_demo import make_prompt; "
    return f"""talk to the model:  python -c "{code}print({ask}[0]['generated_text'][-1])\""""


def say_goodbye(args: GRPOConfig, last: str) -> None:
    """Close the W&B run; say how to look at it and how to upload it; then the last line."""
    if wandb.run:
        folder, uploaded = Path(wandb.run.dir).parent, not wandb.run.offline
        try:
            wandb.finish()
        except TimeoutError:  # the server does not answer: everything is in the local files
            uploaded = False
        say(f"\nlook at the run:    wandb leet {folder}")
        waiting = {*folder.parent.glob("offline-run-*"), *([] if uploaded else [folder])}
        if waiting:
            say(f"upload the run:     wandb sync {' '.join(sorted(map(str, waiting)))}")
    say(last)
