"""What a run shows: banner, a line a step, a sample now and then, warnings, the W&B run."""

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from os import getenv
from pathlib import Path
from statistics import fmean
from statistics import mode as most_common
from textwrap import fill

import pandas as pd
import torch
import wandb
from accelerate.utils import gather_object
from torch.nn.utils import get_total_norm
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # in a notebook it is another one
from transformers.utils import strtobool
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from assets.settings import as_user_error, print_error, print_once

OUT_OF_MEMORY = """error: out of memory. In this order, try --gradient_checkpointing True, \
--use_peft, a smaller --max_completion_length; or the file of a smaller card, \
--config assets/cards/16gb.yaml; --estimate_memory shows what fits which card"""
SOFT, STRICT = (f"rewards/{kind}_format_reward_func/mean" for kind in ("soft", "strict"))
CUT_OFF = """most completions are cut off. If KL is above 2, the model has collapsed: lower \
--learning_rate. If they go on after </answer>: is the model's end token in eos_token_id, in \
generation_config.json in its folder? Else raise --max_completion_length"""
NOT_FINITE = """the loss, a gradient or a weight is not finite: stopped. Start again with a lower \
--learning_rate and --overwrite_output, or from a checkpoint in another --output_dir"""
NO_FORMAT = "no format reward: most completions begin with {!r} and end with {!r}"
WARNINGS = {  # text: how often in a row, condition on their metrics (0 if not logged)
    NOT_FINITE: (1, lambda m: not m["finite"]),
    CUT_OFF: (1, lambda m: m["completions/clipped_ratio"] > 0.5),
    "all groups have equal rewards": (20, lambda m: m["frac_reward_zero_std"] == 1),
    NO_FORMAT: (20, lambda m: SOFT in m and m[SOFT] == m[STRICT] == 0),
    "the gradients overflow fp16": (20, lambda m: not math.isfinite(m["grad_norm"])),
}


def print_banner(trainer: GRPOTrainer) -> None:
    """Print what is about to run, and on what."""
    args, model, cast = trainer.args, trainer.model, trainer.accelerator.mixed_precision
    cuda, trained = args.device.type == "cuda", trainer.get_num_trainable_parameters()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    attention = model.config._attn_implementation
    print_once(f"""\
model   {model.config.name_or_path}, {model.dtype}, autocast {cast}
        {model.num_parameters():,} parameters, {trained:,} of them trained
device  {args.world_size} x {device}, {attention} attention
data    {args.dataset_name}, {len(trainer.train_dataset):,} prompts
output  {args.output_dir}""")
    if not args.eval_only:
        print_once(f"""\
step    {args.generation_batch_size} completions in groups of {args.num_generations}
lines   format: soft, strict; right: lenient, strict; tok: mean length""")


def draw_sample(logs: dict, step: int) -> str:
    """Return the first of TRL's logged completions with its question, answers and rewards."""
    extra = {name: values[0] for name, values in logs["extra"].items()}
    rewards = [f"{n.removesuffix('_reward_func')} {v[0]:.2f}" for n, v in logs["rewards"].items()]
    lines = [extra["question"], "", *extra["text"].strip().splitlines(), ""]
    lines += [f"gold {extra['gold']}, extracted {extra['extracted'][:60]!r}"]
    lines += [f"{', '.join(rewards)}; advantage {logs['advantages'][0]:+.2f}", "-" * 80]
    return "\n".join([f" step {step} ".center(80, "-"), *(fill(line, 80) for line in lines)])


def watch_reward(function: Callable) -> Callable:
    """Return the reward function for TRL: it may edit its texts, and NaN gets a warning, once."""
    name, warned = get_callable_name(function), []

    def call(kwargs: dict):
        texts = {k: v for k, v in kwargs.items() if isinstance(v, list) and k != "completion_ids"}
        return function(**kwargs | deepcopy(texts))

    def checked(values: list, completions: list) -> list[float | None]:
        values = [None if x is None else float(x) for x in values]
        odd = [i for i, x in enumerate(values) if not math.isfinite(x or 0)]
        if odd and not warned:
            warned.append(completions[odd[0]][0]["content"][:200])
            print_error(f"warning: {name} returned NaN or infinity for {warned[0]!r}")
        return values

    async def awaited(**kwargs) -> list[float | None]:
        return checked(await call(kwargs), kwargs["completions"])

    def watched(**kwargs) -> list[float | None]:
        return checked(call(kwargs), kwargs["completions"])

    wrapper = wraps(function)(awaited if is_async_callable(function) else watched)
    wrapper.__name__ = name  # a functools.partial or an object has none
    return wrapper


class Watch(TrainerCallback):
    """Prints a line a step and samples; warns once of a silent failure; stops, unsaved, at NaN."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer, self.finite, self.failures = trainer, True, Counter()
        trainer.remove_callback(PrinterCallback)  # one of these two is there
        trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = [p for p in model.parameters() if p.requires_grad]
        self.finite = all(gather_object([math.isfinite(get_total_norm(trained))]))
        control.should_log |= not self.finite  # `on_log` stops all processes

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:
            return
        metrics = defaultdict(float, {k: v for k, v in logs.items() if v is not None})
        norm = 0.0 if args.fp16 else metrics["grad_norm"]  # fp16 skips a step that overflows
        metrics["finite"] = self.finite and math.isfinite(metrics["loss"] + norm)
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
        every, logs = self.trainer.args.print_steps, self.trainer._logs
        if every and (step == 1 or step % every == 0):
            print_once(draw_sample(logs, step))
        texts = logs["extra"]["text"]
        ends = most_common(text[:12] for text in texts), most_common(text[-12:] for text in texts)
        for text, (times, failed) in WARNINGS.items():
            if failed(m):
                self.failures[text] += 1
            elif self.failures[text] < times:
                self.failures[text] = 0
            if failed(m) and self.failures[text] == times:  # later it is more: once is enough
                print_error(f"warning: step {step}: {text.format(*ends)}")
                if wandb.run:
                    wandb.run.alert(title=f"step {step}", text=text.format(*ends))


def find_mode(args: GRPOConfig) -> str:
    """Return W&B's mode: "disabled" (then out of `report_to`), or offline if there is no key."""
    with as_user_error("W&B (WANDB_DISABLED, WANDB_MODE, WANDB_PROJECT or key)", wandb.Error):
        wanted = "wandb" in args.report_to and not strtobool(getenv("WANDB_DISABLED") or "false")
        mode = getenv("WANDB_MODE") if wanted else "disabled"
        wandb.Settings(mode=mode or "offline", project=getenv("WANDB_PROJECT", args.project))
        if mode == "disabled":
            args.report_to = [name for name in args.report_to if name != "wandb"]
        return mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")


def open_run(args: GRPOConfig, config: dict, run_id: str, mode: str) -> None:
    """Open the W&B run on the first process; offline if the server cannot be reached."""
    close_run()  # of an earlier training in this Python process, which failed
    if mode == "disabled" or args.process_index:
        return
    settings = wandb.Settings(run_id=run_id, resume="allow", silent=True)
    settings.project = getenv("WANDB_PROJECT", args.project)
    settings.run_name = getenv("WANDB_NAME", args.run_name)
    settings.root_dir = getenv("WANDB_DIR", args.output_dir)
    settings.host = getenv("WANDB_HOST", "")  # else the machine's name is sent
    settings.init_timeout, settings.finish_timeout = 30, 60  # seconds
    settings.x_transaction_log_flush_interval = 0.01  # write at once: a kill loses nothing
    try:
        wandb.init(config=config, settings=settings, mode=mode)
    except wandb.Error as error:
        print_error(f"warning: W&B cannot be reached ({error}); the run is kept offline")
        wandb.teardown()  # it still holds the run's id
        wandb.init(config=config, settings=settings, mode="offline")
    where = f"offline, in {Path(wandb.run.dir).parent}" if wandb.run.offline else wandb.run.url
    print_once(f"W&B     {where}")


def log_evaluation(result: dict, answers: dict[str, list[dict]]) -> None:
    """Add an evaluation to the summary of the open run: its figures, and 50 answers of each."""
    if wandb.run:
        figures = pd.json_normalize({"eval": result}, sep="/").iloc[0].items()
        figures = {k.replace("/measurements", "").removesuffix("/value"): v for k, v in figures}
        shown = [{"measurement": name} | row for name, rows in answers.items() for row in rows[:50]]
        figures["eval/answers"] = wandb.Table(dataframe=pd.DataFrame(shown))
        wandb.run.summary.update(figures)


def close_run() -> None:
    """Close the W&B run, if one is open; print how to look at it and how to upload it."""
    if wandb.run:
        folder = Path(wandb.run.dir).parent
        wandb.finish()
        look = f"wandb leet {shlex.quote(str(folder))}"
        print_once(f"\nlook at the run (/ filters: reward, accuracy, generate):\n{look}")
        if [*folder.parent.glob("offline-run-*")]:
            upload = f"wandb sync --include-online {shlex.quote(str(folder.parent))}/*run-*"
            print_once(f"\nupload the run (after wandb login):\n{upload}")
