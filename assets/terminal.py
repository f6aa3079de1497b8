"""What the terminal shows: a banner, progress, a sample now and then, warnings, out of memory.

A terminal has one line that is redrawn; a log file gets a short line now and then instead. Both
get the same samples, and both fit in 80 columns.
"""

import io
import math
import sys
from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction

import torch
import wandb
from accelerate.utils import gather_object
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch.nn.utils import get_total_norm
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOTrainer

from assets import wandb_run
from assets.common import print_error, print_once

LONG = 600  # characters; the middle of a longer completion is not shown
LINES = 20  # progress lines of a run in a log file
FORMATS = ["rewards/soft_format_reward_func/mean", "rewards/strict_format_reward_func/mean"]

TALK = """
talk to the model:
TRANSFORMERS_VERBOSITY=error python - <<'EOF'
from transformers import pipeline
from grpo_demo import make_prompt
chat = pipeline("text-generation", "{}", max_new_tokens=256)
q = "Mia has 14 pens and buys 23 more. How many pens does Mia have now?"
print(chat(make_prompt(q))[0]["generated_text"][-1]["content"])
EOF"""
OUT_OF_MEMORY = (
    "error: out of memory. In this order, try --gradient_checkpointing True, --use_peft, a smaller "
    "--max_completion_length; or the file of a smaller card, --config assets/cards/16gb.yaml; "
    "--estimate_memory shows what fits which card"
)


def print_banner(trainer: GRPOTrainer) -> None:
    """Print what is about to run, and on what."""
    args, model = trainer.args, trainer.model
    device = f"CPU, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        card = torch.cuda.get_device_properties(args.device)
        device = f"{card.name}, {card.total_memory / 1e9:.1f} GB"
    trained = trainer.get_num_trainable_parameters()
    print_once(f"model   {model.config.name_or_path}, {model.dtype}")
    print_once(f"        {model.num_parameters():,} parameters, {trained:,} of them trained")
    attention = model.config._attn_implementation
    print_once(f"device  {args.world_size} x {device}, {attention} attention")
    print_once(f"data    {args.dataset_name}, {len(trainer.train_dataset):,} prompts")
    print_once(f"output  {args.output_dir}")
    if not args.eval_only:
        groups = f"{args.generation_batch_size} completions in groups of {args.num_generations}"
        print_once(f"step    {groups}")
        print_once("shown   reward, format (soft, strict), right (lenient, strict), KL, tokens")


def draw_sample(trainer: GRPOTrainer, step: int) -> Panel:
    """Return the first completion of the last step as a block: question, answer and rewards."""
    logs = trainer._logs
    text = logs["extra"]["text"][0]
    if len(text) > LONG:
        text = f"{text[: LONG // 2]}\n[... {len(text) - LONG} characters ...]\n{text[-LONG // 2 :]}"
    rewards = list(logs["rewards"].items())[:-1]  # the last one has weight 0
    earned = [f"{name.removesuffix('_reward_func')} {values[0]:.2f}" for name, values in rewards]
    answer = f"gold {logs['extra']['gold'][0]}, extracted {logs['extra']['extracted'][0][:60]}"
    rows = {
        "question": logs["extra"]["question"][0],
        "completion": text.rstrip(),
        "answer": answer.replace("\n", " "),
        "rewards": f"{', '.join(earned)}; advantage {logs['advantages'][0]:+.2f}",
    }
    grid = Table.grid(padding=(0, 2))
    for label, value in rows.items():
        grid.add_row(Text(label, style="dim"), Text(value))
    return Panel(grid, title=f"step {step}", title_align="left", border_style="dim")


class Progress(TrainerCallback):
    """Shows the progress of training, in place of transformers' and TRL's own output."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer, self.bar = trainer, None
        trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.bar is None:
            self.drawn = sys.stderr.isatty() and not args.disable_tqdm and args.process_index == 0
            file = sys.stderr if self.drawn else io.StringIO()
            form = "{n_fmt}/{total_fmt} {remaining} left {desc}"
            steps = {"total": state.max_steps, "initial": state.global_step}
            self.bar = tqdm(**steps, bar_format=form, file=file, smoothing=0, dynamic_ncols=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs or not state.is_world_process_zero:
            return
        try:
            self.show(state.global_step, state.max_steps, logs)
        except Exception as error:  # must not stop the training
            print_error(f"warning: step {state.global_step} cannot be shown: {error}")

    def show(self, step: int, last: int, logs: dict[str, float]) -> None:
        """Show the progress line, and now and then a sample."""
        # 80 columns are few, of which tqdm takes 79: .49, not 0.49
        small = [f"{logs.get(name) or 0:.2f}".removeprefix("0") for name in (*FORMATS, "kl")]
        right = [f"{logs.get(f'accuracy/{kind}', 0.0):.0%}" for kind in ("lenient", "strict")]
        text = f"{logs.get('step_time') or 0:.1f}s reward {logs['reward']:.2f} "
        text += f"format {small[0]} {small[1]} right {' '.join(right)} "
        text += f"kl {small[2]} tok {logs['completions/mean_length']:.0f}"
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
        if not self.drawn and (step in (1, last) or step % max(1, last // LINES) == 0):
            print_once(str(self.bar))
        every = self.trainer.args.print_steps
        if every and (step == 1 or step % every == 0):
            with tqdm.external_write_mode(file=sys.stdout):
                Console().print(draw_sample(self.trainer, step))

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def watch_reward(function: Callable) -> Callable:
    """Return the reward function, with a warning when it first returns NaN or an infinity."""
    name, warned = getattr(function, "__name__", ""), []
    if not name or iscoroutinefunction(function):
        return function

    @wraps(function)
    def watched(*, completions: list, **kwargs) -> list[float | None]:
        values = function(completions=completions, **kwargs)
        pairs = zip(completions, values, strict=False)  # TRL checks the length
        bad = [c[0]["content"] for c, x in pairs if x is not None and not math.isfinite(x)]
        if bad and not warned:
            warned.append(name)
            what = f"{name} returned NaN, which counts as 0, or infinity, which spoils its group"
            print_error(f"warning: {what}, for {len(bad)} of {len(values)} texts: {bad[0][:200]!r}")
        return values

    return watched


class Health(TrainerCallback):
    """Warns once of each silent failure; stops the run, unsaved, when it is not finite."""

    def __init__(self):
        self.broken, self.formatted, self.warned = False, False, set()
        self.flat_steps, self.skipped = 0, 0  # in a row

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = [p for p in model.parameters() if p.requires_grad]
        self.broken = any(gather_object([not math.isfinite(get_total_norm(trained))]))
        control.should_log = control.should_log or self.broken  # `on_log` stops all processes

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:
            return
        step = state.global_step
        soft, strict = (logs.get(name) for name in FORMATS)
        self.formatted = self.formatted or soft != 0 or strict != 0  # None: other rewards
        # TRL's share misses equal rewards whose float32 mean is rounded: their std is 1e-7
        flat = logs.get("frac_reward_zero_std") == 1 or logs.get("reward_std", 1) < 1e-6
        self.flat_steps = self.flat_steps + 1 if flat else 0
        self.skipped = 0 if math.isfinite(logs.get("grad_norm", 0.0)) else self.skipped + 1
        patience = 20 if args.fp16 else 0  # GradScaler lowers its scale at each skipped step
        self.broken |= self.skipped > patience or not math.isfinite(logs.get("loss", 0.0))
        if self.flat_steps >= 20:
            self.warn(step, "no reward variance in any group for 20 steps: nothing is learned")
        if (logs.get("completions/clipped_ratio") or 0) > 0.5:
            cure = "raise --max_completion_length, unless they go on after their answer"
            if (soft or 0) > 0.25:  # most are in the format too, so some go on after </answer>
                cure = "some go on after </answer>: is the model's end token in eos_token_id, "
                cure += "in generation_config.json in its folder?"
            if (logs.get("kl") or 0) > 2:  # healthy runs stay below 0.7
                cure = "KL is above 2, the model has collapsed: lower --learning_rate"
            self.warn(step, f"most completions are cut off: {cure}")
        if step >= 50 and not self.formatted:
            self.warn(step, "format rewards are still 0: look at the completions")
        if self.broken:  # the last checkpoint is the last good one
            self.warn(step, "the loss or a weight is not finite: stopping")
            control.should_training_stop, control.should_save = True, False

    def warn(self, step: int, problem: str) -> None:
        """Print a warning and send it to W&B, once for each problem."""
        if problem not in self.warned:
            self.warned.add(problem)
            print_error(f"warning: step {step}: {problem}")
            if wandb.run:
                wandb.run.alert(title=f"step {step}", text=problem)

    def on_train_end(self, args, state, control, **kwargs):
        if self.broken:
            wandb_run.close_run()
            again = "start again with a lower --learning_rate and --overwrite_output"
            if good := get_last_checkpoint(args.output_dir):
                again += f", or go on from --model_name_or_path {good} in another --output_dir"
            print_once(f"stopped at step {state.global_step}; {again}")
            raise SystemExit(1)
