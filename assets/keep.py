"""Keep a run of `grpo_demo.py`: its directory, its checkpoints, its W&B files.

    with keep.run(args, config) as kept:      # new, resumable, finished or unrelated?
        trainer = ...
        kept.watch(trainer)                   # signals, W&B, warnings
        kept.train()                          # from the newest checkpoint

SIGTERM and Ctrl-C save a checkpoint and exit with status 128 + signal; the same command resumes.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import wandb
from accelerate.utils import gather_object
from torch.nn.utils import get_total_norm
from transformers.integrations import WandbCallback
from trl import GRPOConfig, GRPOTrainer

from assets.claim import claim, release
from assets.errors import first_process, one_line_errors, say, write_json

DISK_FULL = re.compile("No space left|Disk quota|inline_container|iostream")  # torch.save: last two


class ResumableTrainer(GRPOTrainer):
    """TRL's trainer, which resumes with a second adapter, and without a warning of a tied head."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if "ref" in getattr(self.model, "peft_config", {}):  # transformers loads only "ref" then
            self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            self.model.set_adapter("default")

    def _issue_warnings_after_load(self, load_result):
        if not set(load_result.missing_keys) <= set(self.model._tied_weights_keys or ()):
            super()._issue_warnings_after_load(load_result)  # a tied head is never in the file


class AtTheEnd(Exception):
    """The checkpoint that was loaded is that of the last step."""


@contextmanager
def run(args: GRPOConfig, config: dict) -> Iterator["Run"]:
    """Claim `args.output_dir` and yield its `Run`; at the end mark it as finished and close W&B.

    config  all settings of the run, for W&B and for `run.json`, which is compared on resume

    Exits with status 0 if the run is finished, 1 if the disk is full. UserError as in `claim`.
    """
    kept = Run(args, config)
    try:
        yield kept
        if args.process_index == 0:
            write_json(kept.path, kept.record | {"finished": True})
            release(kept.out)
    except Exception as error:  # safetensors and torch have kinds of their own
        if args.process_index == 0 and not kept.path.exists():
            release(kept.out)
            raise
        free = shutil.disk_usage(kept.out).free / 1e6
        if free > 1 and not DISK_FULL.search(str(error)):
            raise
        again = "make room, then run the same command: it resumes from the last checkpoint"
        say(f"error: disk full: {free:,.0f} MB are free in {kept.out}; {again}", error=True)
        raise SystemExit(1) from error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # nothing is left to resume
    kept.close()


class Run(WandbCallback):
    """A claimed output directory, and the callback that watches its training.

    After a kill, training repeats the steps since the last checkpoint. They are the same steps, so
    those in the W&B files are not logged again.
    """

    begun = False  # from the first step on, an error is no longer one of the settings

    def __init__(self, args: GRPOConfig, config: dict):
        super().__init__()
        self.args, self.config, self.out = args, config, Path(args.output_dir)
        self.path = self.out / "run.json"
        self.mode = first_process(self.find_mode)
        self.record, self.checkpoint = first_process(lambda: claim(args, config))
        self.signal, self.broken, self.skipped = 0, False, 0
        self.flat_steps, self.formatted, self.warned = 0, False, set()

    def find_mode(self) -> str:
        """Return W&B's mode: online with a key, else offline. UserError for a key it refuses."""
        mode = os.environ.get("WANDB_MODE")
        if mode or "wandb" not in self.args.report_to:
            return mode or "disabled"
        with one_line_errors("W&B"):
            return "online" if wandb.login(prompt=False, verify=False) else "offline"

    def watch(self, trainer: GRPOTrainer) -> None:
        """Write `run.json`, handle signals, replace transformers' W&B callback by this one."""
        if self.args.process_index == 0:
            write_json(self.path, self.record)
        self.trainer = trainer
        self.logged = self.last_logged_step() if self.args.process_index == 0 else 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        trainer.remove_callback(WandbCallback)
        trainer.add_callback(self)

    def train(self) -> None:
        """Train from the newest checkpoint; if that is the last step, only load it."""
        try:
            self.trainer.train(resume_from_checkpoint=self.checkpoint)
        except AtTheEnd:
            self.trainer.is_in_train = False
            self.setup(self.args, self.trainer.state, self.trainer.model)

    def on_signal(self, number, frame):
        if self.signal or not self.trainer.is_in_train:  # the second one, or nothing to save
            say("\nstopped; the same command resumes", error=True)
            raise SystemExit(128 + number)
        self.signal = number
        say("\nfinishing the step, then saving; a second signal stops at once", error=True)

    def last_logged_step(self) -> int:
        """Return the last step in the W&B files of a stopped run, 0 if there is none."""
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
        files = sorted(self.out.glob("wandb/*run-*/*.wandb"), key=lambda f: f.parent.name[-24:])
        for file in reversed(files):  # newest first
            read = subprocess.run([*inspect, str(file)], capture_output=True)
            found = json.loads(read.stdout)["summary"] if read.returncode == 0 else {}
            if step := int(found.get("train/global_step", 0)):
                return step
        return 0

    def setup(self, args, state, model, **kwargs):
        """Open the W&B run (transformers' hook): offline without a key or without a server."""
        if "wandb" not in args.report_to or not state.is_world_process_zero or wandb.run:
            return
        self._initialized = True
        where = {"project": os.environ.get("WANDB_PROJECT", args.project), "name": args.run_name}
        where |= {"dir": args.output_dir, "id": self.record["wandb_id"], "resume": "allow"}
        patience = {"silent": True}  # the line below and the closing lines say it
        patience["host"] = os.environ.get("WANDB_HOST", "")  # else the machine's name is sent
        patience |= {"init_timeout": 30, "finish_timeout": 60, "finish_timeout_raises": True}
        patience["x_transaction_log_flush_interval"] = 0.01  # write at once: a kill loses nothing
        where |= {"config": self.config, "settings": wandb.Settings(**patience)}
        try:
            wandb.init(**where, mode=self.mode)
        except wandb.Error as error:
            say(f"warning: W&B cannot be reached ({error}); the run is kept offline", error=True)
            wandb.teardown()  # it still holds the run's id
            wandb.init(**where, mode="offline")
        offline = f"offline, in {Path(wandb.run.dir).parent}"
        say(f"W&B     {offline if wandb.run.offline else wandb.run.url}")

    def on_train_begin(self, args, state, control, **kwargs):
        """Leave W&B closed until the first step that is not logged yet."""
        if state.global_step >= state.max_steps:  # transformers would train one more step
            raise AtTheEnd

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.logged:
            self.setup(args, state, model)
        Run.begun = True

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = [p for p in model.parameters() if p.requires_grad]
        self.broken = not math.isfinite(get_total_norm(trained))
        both = gather_object([(self.signal, self.broken)])  # all processes stop at the same step
        self.signal, self.broken = map(max, zip(*both, strict=True))
        control.should_log = control.should_log or self.broken  # on_log stops it, unsaved
        if self.signal:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if wandb.run:
            super().on_log(args, state, control, logs=logs, **kwargs)
        if "reward" not in logs:
            return
        formats = [logs.get(f"rewards/{f}_format_reward_func/mean", 1) for f in ("soft", "strict")]
        self.formatted = self.formatted or any(formats)
        self.flat_steps = self.flat_steps + 1 if logs["frac_reward_zero_std"] == 1 else 0
        skipped = not math.isfinite(logs.get("grad_norm", 0.0))  # fp16: GradScaler lowers its scale
        self.skipped = self.skipped + 1 if skipped else 0
        finite = math.isfinite(logs["loss"]) and self.skipped <= (20 if args.fp16 else 0)
        self.broken = self.broken or not finite
        flat, cut = self.flat_steps >= 20, logs["completions/clipped_ratio"] > 0.5
        no_format = state.global_step >= 50 and not self.formatted
        problems = {
            "no reward variance in any group for 20 steps: nothing is learned": flat,
            "most completions are cut off: raise --max_completion_length": cut,
            "format rewards are still 0: look at the completions": no_format,
            "the loss or a weight is not finite: stopping": self.broken,
        }
        for text in [t for t, failed in problems.items() if failed and t not in self.warned]:
            self.warned.add(text)
            say(f"warning: step {state.global_step}: {text}", error=True)
            if wandb.run:
                wandb.run.alert(title="grpo_demo", text=f"step {state.global_step}: {text}")
        if self.broken:  # the last checkpoint is the last good one
            control.should_training_stop, control.should_save = True, False

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.setup(args, state, model)  # not open yet if all steps were logged before a kill
        if self.broken or self.signal:
            again = "start again with a lower --learning_rate and --overwrite_output"
            again = again if self.broken else "the same command resumes"
            self.close(f"stopped at step {state.global_step}; {again}")
            raise SystemExit(1 if self.broken else 128 + self.signal)

    def close(self, last: str = "") -> None:
        """Close the W&B run; say how to look at it and how to upload it."""
        if wandb.run:
            folder, uploaded = Path(wandb.run.dir).parent, not wandb.run.offline
            try:
                wandb.finish()
            except TimeoutError:  # the server does not answer; the local files are complete
                uploaded = False
            say("\nlook at the run (in it, / filters: type reward, accuracy or generate):")
            say(f"wandb leet {folder}")
            waiting = {*folder.parent.glob("offline-run-*"), *([] if uploaded else [folder])}
            if waiting:
                where = " ".join(sorted(map(str, waiting)))
                say(f"\nupload the run (after wandb login):\nwandb sync --include-online {where}")
        if last:
            say(last)
