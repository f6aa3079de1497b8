"""What the terminal shows: a banner, progress, a sample now and then, the result.

A terminal has one line that is redrawn; a log file gets a short line now and then instead. Both
get the same samples, and both fit in 80 columns.
"""

import sys
import time

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOTrainer, ModelConfig

from assets import memory
from assets.errors import say

LONG = 600  # characters; the middle of a longer completion is not shown
LINES = 20  # progress lines of a run in a log file

TALK = """
talk to the model:
python - <<'EOF'
from transformers import logging, pipeline
from grpo_demo import make_prompt
logging.set_verbosity_error()
chat = pipeline("text-generation", "{}", max_new_tokens=256)
q = "Mia has 14 pens and buys 23 more. How many pens does Mia have now?"
print(chat(make_prompt(q))[0]["generated_text"][-1]["content"])
EOF"""


def banner(trainer: GRPOTrainer, model_args: ModelConfig) -> None:
    """Print what is about to run, and what it takes of the GPU."""
    args, model, gpu = trainer.args, trainer.model, trainer.args.device.type == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    prompts, trained = len(trainer.train_dataset), trainer.get_num_trainable_parameters()
    say(f"model   {model.config._name_or_path}, {model.dtype}")
    say(f"        {model.num_parameters():,} parameters, {trained:,} of them trained")
    say(f"device  {args.world_size} x {device}, {model.config._attn_implementation} attention")
    if gpu:
        card = torch.cuda.get_device_properties(args.device).total_memory
        say(f"memory  {memory.advice(model.config, args, model_args, card)}")
    say(f"data    {args.dataset_name}, {prompts:,} prompts")
    say(f"output  {args.output_dir}")
    if args.eval_only:
        return
    say(f"step    {args.generation_batch_size} completions in groups of {args.num_generations}")
    say("shown   reward, format (soft, strict), right (lenient, strict), tokens")


def sample(trainer: GRPOTrainer, step: int) -> Panel:
    """Return the first completion of the last step as a block: question, answer and rewards."""
    logs, names = trainer._logs, {"simple_correctness": "correct"}
    text = logs["extra"]["text"][0]
    if len(text) > LONG:
        text = f"{text[: LONG // 2]}\n[... {len(text) - LONG} characters ...]\n{text[-LONG // 2 :]}"
    rewards = {name.removesuffix("_reward_func"): v[0] for name, v in logs["rewards"].items()}
    earned = [f"{names.get(name, name)} {value:.2f}" for name, value in rewards.items()]
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


class Terminal(TrainerCallback):
    """Shows the progress of training, in place of transformers' and TRL's own output."""

    def __init__(self, trainer: GRPOTrainer, print_steps: int):
        self.trainer, self.print_steps, self.bar = trainer, print_steps, None
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.bar is not None:
            return
        self.start, self.first = time.time(), state.global_step
        quiet = args.disable_tqdm or not sys.stderr.isatty() or not state.is_world_process_zero
        form = "{n_fmt}/{total_fmt} {remaining} left {desc}"
        steps = {"total": state.max_steps, "initial": state.global_step}
        self.bar = tqdm(**steps, bar_format=form, disable=quiet, dynamic_ncols=True, leave=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs or not state.is_world_process_zero:
            return
        step, last, mean = state.global_step, state.max_steps, "rewards/{}_format_reward_func/mean"
        soft, strict = (logs.get(mean.format(kind), 0.0) for kind in ("soft", "strict"))
        right = [f"{logs[f'accuracy/{kind}']:.0%}" for kind in ("lenient", "strict")]
        text = f"{logs.get('step_time', 0):.1f}s reward {logs['reward']:.2f} format {soft:.2f}"
        text += (
            f" {strict:.2f} right {' '.join(right)} tokens {logs['completions/mean_length']:.0f}"
        )
        if not self.bar.disable:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step in (1, last) or step % max(1, last // LINES) == 0:
            each = (time.time() - self.start) / max(1, step - self.first)
            left = tqdm.format_interval((last - step) * each)
            say(f"{step}/{last} {left} left {text}")
        if self.print_steps and (step == 1 or step % self.print_steps == 0):
            with tqdm.external_write_mode(file=sys.stdout):
                Console().print(sample(self.trainer, step))

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
