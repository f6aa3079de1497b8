"""What a run shows: banner, a line a step, a sample now and then, warnings, the W&B run."""

import math
import shlex
from collections import Counter, defaultdict
from os import getenv
from pathlib import Path
from statistics import fmean, mode
from textwrap import fill

import torch
import wandb
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK as PROGRESS_BAR
from trl import GRPOConfig, GRPOTrainer

from assets.settings import as_user_error, print_error, print_once

SOFT, STRICT = (f"rewards/{kind}_format_reward_func/mean" for kind in ("soft", "strict"))
CUT_OFF = """most completions are cut off. If KL is above 2, lower --learning_rate. If they go on \
after </answer>, see eos_token_id in generation_config.json. Else raise --max_completion_length"""
NO_FORMAT = "no format reward: most completions begin with {begin!r} and end with {end!r}"
WARNINGS = {  # text: how often in a row, condition on their metrics (0 if not logged)
    "the loss or a gradient is not finite: lower --learning_rate": (1, lambda m: not m["finite"]),
    "rewards are None, NaN or infinite for some completions: {odd}": (1, lambda m: m["odd"]),
    CUT_OFF: (1, lambda m: m["completions/clipped_ratio"] > 0.5),
    "all groups have equal rewards": (20, lambda m: m["frac_reward_zero_std"] == 1),
    NO_FORMAT: (20, lambda m: SOFT in m and m[SOFT] == m[STRICT] == 0),
    "the gradients overflow fp16": (20, lambda m: not math.isfinite(m["grad_norm"])),
}


def print_banner(trainer: GRPOTrainer) -> None:
    """Print what is about to run, and on what."""
    args, model, cast = trainer.args, trainer.model, trainer.accelerator.mixed_precision
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    step = f"{args.generation_batch_size} completions in groups of {args.num_generations}"
    print_once(f"""\
model   {model.config.name_or_path}, {model.dtype}, autocast {cast}
        {model.num_parameters():,} parameters, {trainer.get_num_trainable_parameters():,} trained
device  {args.world_size} x {device}, {model.config._attn_implementation} attention
data    {args.dataset_name}, {len(trainer.train_dataset):,} prompts
step    {"none: evaluation only" if args.eval_only else step}
output  {args.output_dir}""")


class Watch(TrainerCallback):
    """Prints a line a step and samples; warns once of a silent failure; stops, unsaved, at NaN."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer, self.failures = trainer, Counter()
        trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else PROGRESS_BAR)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:
            return
        metrics = defaultdict(float, {k: v for k, v in logs.items() if v is not None})
        norm = 0.0 if args.fp16 else metrics["grad_norm"]  # fp16 skips a step that overflows
        metrics["finite"] = math.isfinite(metrics["loss"] + norm)
        if state.is_world_process_zero:
            self.show(metrics, state)
        if not metrics["finite"]:  # the last checkpoint is the last good one
            raise SystemExit(1)

    def show(self, m: dict[str, float], state: TrainerState) -> None:
        """Print the line of a step, of 80 characters at most; if due, a sample and warnings."""
        step, last = state.global_step, state.max_steps
        left = (last - step) * fmean(x["step_time"] for x in state.log_history if "step_time" in x)
        soft, strict, kl = (f"{m[name]:.2f}".removeprefix("0") for name in (SOFT, STRICT, "kl"))
        print_once(
            f"{step}/{last} {tqdm.format_interval(left)} left {m['step_time']:.1f}s "
            f"reward {m['reward']:.2f} format {soft} {strict} "
            f"right {m['accuracy/lenient']:.0%} {m['accuracy/strict']:.0%} "
            f"kl {kl} tok {m['completions/mean_length']:.0f}"
        )
        logs, every = self.trainer._logs, self.trainer.args.print_steps
        texts, rewards = logs["extra"]["text"], logs["rewards"].items()
        if every and (step == 1 or step % every == 0):
            first = {name: values[0] for name, values in logs["extra"].items()}
            given = [f"{n.removesuffix('_reward_func')} {values[0]:.2f}" for n, values in rewards]
            lines = [f" step {step} ".center(80, "-"), first["question"], ""]
            lines += [*first["text"].strip().splitlines(), ""]
            lines += [f"gold {first['gold']}, extracted {first['extracted'][:60]!r}"]
            lines += [f"{', '.join(given)}; advantage {logs['advantages'][0]:+.2f}", "-" * 80]
            print_once("\n".join(fill(line, 80) for line in lines))
        odd = [name for name, values in rewards if not all(map(math.isfinite, values))]
        ends = {"begin": mode(text[:12] for text in texts), "end": mode(t[-12:] for t in texts)}
        m["odd"] = len(odd)
        for text, (times, failed) in WARNINGS.items():
            if self.failures[text] < times:  # else this warning has been printed
                self.failures[text] = self.failures[text] + 1 if failed(m) else 0
                if self.failures[text] == times:
                    print_error(f"warning: step {step}: {text.format(odd=odd, **ends)}")


def open_run(args: GRPOConfig, config: dict, run_id: str) -> None:
    """Open the W&B run on the first process; offline without a key or a server."""
    if "wandb" not in args.report_to or args.process_index:
        return
    off = getenv("WANDB_DISABLED") in ("1", "true", "True")  # transformers no longer reads it
    mode = "disabled" if off else wandb.setup().settings.mode  # `wandb offline` counts too
    ready = mode != "online" or wandb.login(prompt=False, verify=False)  # there is a key
    settings = wandb.Settings(run_id=run_id, resume="allow", silent=True)
    with as_user_error("WANDB_PROJECT or --project"):
        settings.project = getenv("WANDB_PROJECT", args.project)
    settings.run_name = getenv("WANDB_NAME", args.run_name)
    settings.root_dir = getenv("WANDB_DIR", args.output_dir)
    settings.host = getenv("WANDB_HOST", "")  # else the machine's name is sent
    settings.init_timeout, settings.finish_timeout = 30, 60  # seconds
    settings.x_transaction_log_flush_interval = 0.01  # write at once: a kill loses nothing
    try:
        wandb.init(config=config, settings=settings, mode=mode if ready else "offline")
    except wandb.Error as error:
        print_error(f"warning: W&B cannot be reached ({error}); the run is kept offline")
        wandb.teardown()  # it still holds the run's id
        wandb.init(config=config, settings=settings, mode="offline")
    print_once(f"W&B     {Path(wandb.run.dir).parent if wandb.run.offline else wandb.run.url}")


def close_run() -> None:
    """Close the W&B run, if one is open; print how to look at it and how to upload it."""
    if wandb.run and not wandb.run.disabled:
        folder = Path(wandb.run.dir).parent
        wandb.finish()
        run, runs = (shlex.quote(str(path)) for path in (folder, folder.parent))
        print_once(f"\nlook at the run:\nwandb leet {run}")
        print_once(f"upload what is offline:\nwandb sync --include-online {runs}/*run-*")
