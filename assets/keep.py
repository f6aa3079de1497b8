"""Keep a run of `grpo_demo.py`: its directory, its checkpoints, its W&B files.

    with keep.run(args, config) as kept:      # new, resumable, finished or unrelated?
        trainer = ...
        kept.watch(trainer)                   # signals, W&B, warnings
        kept.train()                          # from the newest checkpoint

SIGTERM and Ctrl-C save a checkpoint and exit with status 128 + signal; the same command resumes.
Also here: how the project reports an error. Imports nothing of the project.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import wandb
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.nn.utils import get_total_norm
from transformers.integrations import WandbCallback
from transformers.trainer_utils import sort_checkpoints
from trl import GRPOConfig, GRPOTrainer
from wandb.sdk.lib.runid import generate_id

# Settings that do not change what is computed: they may differ when a run is resumed
FREE_SETTINGS = """evaluate eval_samples eval_only per_device_eval_batch_size eval_batch_size
    local_rank overwrite_output output_dir report_to project run_name logging_steps log_completions
    num_completions_to_print save_steps save_strategy save_total_limit disable_tqdm"""
DISK_FULL = re.compile("No space left|inline_container|iostream")  # the last two are torch.save's


class UserError(Exception):
    """An error the user can fix: printed as one line, exit status 2."""


class AtTheEnd(Exception):
    """The checkpoint that was loaded is that of the last step."""


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn any exception of a library into a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {error}") from error


def say(message: str = "", error: bool = False) -> None:
    """Print a line, on the first process only; an error, on the first process of each machine."""
    if os.environ.get("LOCAL_RANK" if error else "RANK", "0") == "0":
        print(message, file=sys.stderr if error else sys.stdout, flush=True)


def write_json(path: Path, value: dict) -> None:
    """Write JSON with an atomic rename: never a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(value, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def first_process(decide: Callable[[], Any]) -> Any:
    """Call `decide` on the first process; return its result, or raise its error, on all."""
    result = [None, None]
    if PartialState().is_main_process:
        try:
            result[0] = decide()
        except (UserError, SystemExit) as error:
            result[1] = error
    result, error = broadcast_object_list(result)
    if error:
        raise error
    return result


@contextmanager
def run(args: GRPOConfig, config: dict) -> Iterator["Run"]:
    """Claim `args.output_dir` and yield its `Run`; at the end mark it as finished and close W&B.

    config  all settings of the run: for W&B, and for `run.json`, which is compared on resume.

    Exits with status 0 if the run is finished, 1 if the disk is full. UserError if the directory
    holds a run with other settings, or other files.
    """
    kept = Run(args, config)
    try:
        yield kept
    except Exception as error:  # safetensors has a kind of its own
        if not DISK_FULL.search(str(error)):
            raise
        free = f"{shutil.disk_usage(kept.out).free / 1e6:,.0f} MB are free in {kept.out}"
        again = "make room, then run the same command: it resumes from the last checkpoint"
        say(f"error: disk full: {free}; {again}", error=True)
        raise SystemExit(1) from error
    if args.process_index == 0:
        write_json(kept.path, kept.record | {"finished": True})
    kept.close()


class Run(WandbCallback):
    """A claimed output directory, and the callback that watches its training.

    After a kill, training repeats the steps since the last checkpoint. They are the same steps, so
    those in the W&B files are not logged again.
    """

    def __init__(self, args: GRPOConfig, config: dict):
        super().__init__()
        self.args, self.config, self.out = args, config, Path(args.output_dir)
        self.path = self.out / "run.json"
        self.record, self.checkpoint = first_process(self.claim)
        self.signal, self.broken, self.skipped = 0, False, 0
        self.flat_steps, self.formatted, self.warned = 0, False, set()

    def claim(self) -> tuple[dict, str | None]:
        """Return the record of a new or a stopped run, and its newest complete checkpoint."""
        if self.args.overwrite_output and self.out.exists():
            aside = self.out.with_name(f"{self.out.name}.{datetime.now():%Y%m%d-%H%M%S}")
            say(f"moved the old {self.out} to {self.out.rename(aside)}")
        settings = {k: str(v) for k, v in self.config.items() if k not in FREE_SETTINGS.split()}
        record = {"settings": settings, "wandb_id": generate_id(), "finished": False}
        if self.path.exists():
            return self.resume(settings, json.loads(self.path.read_text()))
        if any(self.is_foreign(f) for f in self.out.rglob("*")):
            self.refuse("holds other files")
        return record, None

    def is_foreign(self, path: Path) -> bool:
        """Return whether a file is not from `--eval_only`, and no `run.json` cut off by a kill."""
        name = path.relative_to(self.out).parts[0]
        return path.is_file() and not name.startswith("eval-") and name != "run.part"

    def refuse(self, why: str) -> None:
        other = "choose another --output_dir, or --overwrite_output to move it aside"
        raise UserError(f"{self.out} {why}: {other}")

    def resume(self, new: dict, record: dict) -> tuple[dict, str | None]:
        """Return the record of a stopped run and its newest complete checkpoint."""
        old = record["settings"]
        if changed := [f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v]:
            self.refuse(f"is a run with other settings ({'; '.join(changed)})")
        if record["finished"]:
            say(f"{self.out} is finished, nothing to do; --overwrite_output starts again")
            raise SystemExit(0)
        for folder in reversed(sort_checkpoints(str(self.out))):
            if self.is_complete(Path(folder)):
                say(f"resuming from {folder}")
                return record, folder
            say(f"warning: {folder} is incomplete: using the one before", error=True)
        return record, None

    def is_complete(self, folder: Path) -> bool:
        """Return whether a checkpoint has its last file, and random states of every process."""
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            return False
        return len(list(folder.glob("rng_state*.pth"))) == self.args.world_size

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
            say("\nstopped; the same command resumes from the last checkpoint", error=True)
            raise SystemExit(128 + number)
        self.signal = number

    def last_logged_step(self) -> int:
        """Return the last step in the W&B files of a stopped run, 0 if there is none."""
        steps, inspect = [0], ["-m", "wandb", "leet", "inspect", "--summary", "--json"]
        for file in self.out.glob("wandb/*run-*/*.wandb"):
            read = subprocess.run([sys.executable, *inspect, str(file)], capture_output=True)
            if read.returncode == 0:
                steps.append(int(json.loads(read.stdout)["summary"].get("train/global_step", 0)))
        return max(steps)

    def setup(self, args, state, model, **kwargs):
        """Open the W&B run (transformers' hook): offline without a key or without a server."""
        if "wandb" not in args.report_to or not state.is_world_process_zero or wandb.run:
            return
        self._initialized = True
        mode = os.environ.get("WANDB_MODE")
        mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        where = {"project": os.environ.get("WANDB_PROJECT", args.project), "name": args.run_name}
        where |= {"dir": args.output_dir, "id": self.record["wandb_id"], "resume": "allow"}
        patience = {"init_timeout": 30, "finish_timeout": 60, "finish_timeout_raises": True}
        patience["x_transaction_log_flush_interval"] = 0.01  # write at once: a kill loses nothing
        where |= {"config": self.config, "settings": wandb.Settings(**patience)}
        try:
            wandb.init(**where, mode=mode)
        except wandb.Error as error:
            say(f"warning: W&B cannot be reached ({error}); the run is kept offline", error=True)
            wandb.teardown()  # it still holds the run's id
            wandb.init(**where, mode="offline")

    def on_train_begin(self, args, state, control, **kwargs):
        """Leave W&B closed until the first step that is not logged yet."""
        if state.global_step >= state.max_steps:  # transformers would train one more step
            raise AtTheEnd

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.logged:
            self.setup(args, state, model)

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
        problems = {
            "no reward variance in any group for 20 steps: nothing is learned": self.flat_steps
            >= 20,
            "most completions are cut off: raise --max_completion_length": (
                logs["completions/clipped_ratio"] > 0.5
            ),
            "format rewards are still 0: look at the completions": (
                state.global_step >= 50 and not self.formatted
            ),
            "the loss or a weight is not finite: stopping": self.broken,
        }
        for text in [text for text, failed in problems.items() if failed]:
            if text in self.warned:
                continue
            self.warned.add(text)
            say(f"\nwarning: step {state.global_step}: {text}", error=True)
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
            say(f"\nlook at the run:    wandb leet {folder}")
            waiting = {*folder.parent.glob("offline-run-*"), *([] if uploaded else [folder])}
            if waiting:
                say(f"upload the run:     wandb sync {' '.join(sorted(map(str, waiting)))}")
        if last:
            say(last)
