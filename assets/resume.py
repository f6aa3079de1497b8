"""It was stopped, what now? Claim the output directory, find the checkpoint, stop at a good moment.

SIGTERM and Ctrl-C save a checkpoint and exit with status 128 + signal; the same command resumes.
"""

import json
import os
import re
import shutil
import signal
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from secrets import token_hex

from accelerate.utils import gather_object
from datasets import Dataset
from filelock import FileLock, Timeout
from safetensors import safe_open
from transformers import TrainerCallback
from trl import GRPOConfig, ModelConfig

from assets import wandb_run
from assets.common import UserError, first_process, print_error, print_once, write_json

# Settings that do not change what is computed: they may differ when a run is resumed
FREE_SETTINGS = """
    evaluate eval_only eval_samples eval_generations eval_batch_size per_device_eval_batch_size
    estimate_memory output_dir overwrite_output report_to project run_name log_* logging_*
    *_to_print print_steps save_* hub_* push_to_hub disable_tqdm local_rank
    per_device_train_batch_size train_batch_size gradient_accumulation_steps steps_per_generation
    gradient_checkpointing* dataloader_num_workers dataloader_p* torch_empty_cache_steps
    vllm_gpu_memory_utilization vllm_enable_sleep_mode vllm_server_*
"""
DISK_FULL = re.compile("No space left|Disk quota|inline_container|iostream")  # torch.save: last two
LOCK, OWNER = ".lock", ".owner"
HELD = []  # locks, until the process ends, however it ends


@dataclass
class Run:
    """A claimed output directory.

    record      what `run.json` holds: settings, W&B's id, whether the run is finished
    checkpoint  the folder to resume from; None: train from the first step
    """

    record: dict
    checkpoint: str | None = None


class AtLastStep(Exception):
    """The checkpoint that was loaded is that of the last step: nothing is left to train."""


def describe(
    args: GRPOConfig, model_args: ModelConfig, rows: Dataset, system_prompt: str, rewards: str
) -> dict:
    """Return all settings of a run, with fingerprints of data, rewards file and local model."""

    def fingerprint(value: object) -> str:
        return sha256(repr(value).encode()).hexdigest()[:12]

    folder, config = Path(model_args.model_name_or_path), vars(model_args).copy()
    files = [f for end in ("safetensors", "json", "jinja") for f in folder.glob(f"*.{end}")]
    config |= args.to_sanitized_dict() | {"system_prompt": system_prompt}
    return config | {
        "world_size": args.world_size,
        "data": fingerprint(rows.to_dict()),
        "rewards.py": fingerprint(Path(rewards).read_bytes()),
        "model": fingerprint(sorted((f.name, f.stat().st_size, f.stat().st_mtime) for f in files)),
    }


@contextmanager
def claim_output(args: GRPOConfig, config: dict) -> Iterator[Run]:
    """Claim `args.output_dir` and yield its `Run`; at the end mark it as finished and close W&B.

    config  all settings of the run; those that change what is computed are compared on resume

    Exits with status 0 if the run is finished, 1 if the disk is full. UserError if the directory is
    in use, holds a run with other settings, or other files.
    """
    out = Path(args.output_dir)
    run = first_process(lambda: claim(args, config))
    try:
        yield run
        if args.process_index == 0:
            write_json(out / "run.json", run.record | {"finished": True})
            release(out)
    except Exception as error:  # safetensors and torch have kinds of their own
        if args.process_index == 0 and not (out / "run.json").exists():
            release(out)  # nothing was begun
            raise
        free = shutil.disk_usage(out).free / 1e6
        if free > 1 and not DISK_FULL.search(str(error)):
            raise
        again = "make room, then run the same command: it resumes from the last checkpoint"
        print_error(f"error: disk full: {free:,.0f} MB are free in {out}; {again}")
        raise SystemExit(1) from error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # nothing is left to resume
    wandb_run.close_run()


def claim(args: GRPOConfig, config: dict) -> Run:
    """Lock `args.output_dir`; is it new, resumable, finished, or unrelated?"""
    out = Path(args.output_dir)
    lock(out)
    free = {name for name in config for part in FREE_SETTINGS.split() if fnmatch(name, part)}
    settings = {name: str(value) for name, value in config.items() if name not in free}
    new = {"settings": settings, "wandb_id": token_hex(4), "finished": False}
    new["overwrote"] = args.overwrite_output
    old = read_record(out, args.overwrite_output)
    same_command = old == {**new, "wandb_id": old.get("wandb_id")}
    if args.overwrite_output and not same_command:
        move_aside(out)
    elif old:
        return Run(old, find_checkpoint(out, settings, old, args.world_size))
    elif any(not is_left_over(file.relative_to(out)) for file in out.rglob("*") if file.is_file()):
        refuse(out, "holds other files")
    return Run(new)


def lock(out: Path) -> None:
    """Hold the directory; UserError names the process that already does."""
    out.mkdir(parents=True, exist_ok=True)
    HELD.append(FileLock(out / LOCK))
    try:
        HELD[-1].acquire(timeout=0)
    except Timeout:
        who = (out / OWNER).read_text() if (out / OWNER).exists() else "another process"
        other = "wait until it ends, or choose another --output_dir"
        raise UserError(f"{out} is in use by {who}: {other}") from None
    (out / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}")


def release(out: Path) -> None:
    """Unlock the directory and leave no trace of the lock, nor an empty directory."""
    HELD.pop().release()
    (out / OWNER).unlink(missing_ok=True)
    (out / LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else
        out.rmdir()


def move_aside(out: Path) -> None:
    """Rename the directory, if it holds anything, and lock a new one in its place."""
    if not out.name:
        refuse(out, "is this folder, which cannot be moved aside")
    if {file.name for file in out.iterdir()} > {LOCK, OWNER}:
        aside = out.with_name(f"{out.name}.{datetime.now():%Y%m%d-%H%M%S}")
        print_once(f"moved the old {out} to {out.rename(aside)}")
        lock(out)


def is_left_over(file: Path) -> bool:
    """Return whether the script itself may have left this file before any run began there."""
    return file.parts[0].startswith("eval-") or file.name in ("run.part", LOCK, OWNER)


def refuse(out: Path, why: str) -> None:
    """Unlock the directory and raise the UserError that says why it cannot be used."""
    release(out)
    other = "choose another --output_dir, or --overwrite_output to move it aside"
    raise UserError(f"{out} {why}: {other}")


def read_record(out: Path, overwrite: bool) -> dict:
    """Return what `run.json` holds, empty if there is none."""
    if not (out / "run.json").exists():
        return {}
    try:
        record = json.loads((out / "run.json").read_text())
        if record["finished"] in (True, False) and record["wandb_id"] and {**record["settings"]}:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {} if overwrite else refuse(out, "has a damaged run.json")


def find_checkpoint(out: Path, new: dict, record: dict, processes: int) -> str | None:
    """Return the newest complete checkpoint of a stopped run, None if there is none.

    new     settings of this start, compared with those of `record`
    record  what `run.json` holds

    Exits with status 0 if the run is finished. UserError if its settings are others.
    """
    old = record["settings"]
    if changed := [f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v]:
        refuse(out, f"is a run with other settings ({'; '.join(changed)})")
    if record["finished"]:
        print_once(f"{out} is finished, nothing to do; --overwrite_output starts again")
        raise SystemExit(0)
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in out.iterdir()]
    steps = sorted((int(match[1]) for match in found if match), reverse=True)
    for step in steps:
        folder = out / f"checkpoint-{step}"
        if is_complete(folder, processes):
            print_once(f"resuming from {folder}")
            return str(folder)
        print_error(f"warning: {folder} is incomplete or damaged: passed over")
    if steps:
        print_error("warning: no checkpoint is left: training starts again at step 1")
    return None


def is_complete(folder: Path, processes: int) -> bool:
    """Return whether all files of a checkpoint are there and whole.

    transformers writes trainer_state.json last, after the other files of the first process. So this
    looks for files of the other processes, and for files cut off or lost after they were written.
    """
    saved = [file for file in folder.rglob("*.pt*") if file.suffix in (".pt", ".pth")]
    weights = [*folder.glob("*.safetensors")]
    try:
        json.loads((folder / "trainer_state.json").read_text())
        for file in weights:
            with safe_open(file, "pt"):  # reads the header and compares the length
                pass
        whole = all(map(zipfile.is_zipfile, saved))  # what torch.save writes; the end is looked at
    except Exception:  # whatever a library makes of a damaged file
        return False
    shards = [*folder.glob("global_step*/*optim_states.pt")]  # DeepSpeed: one a process
    optimizer = len(shards) == processes if shards else any(folder.glob("optimizer*"))
    model = bool(weights) or any(folder.glob("pytorch_model_fsdp*"))
    random_states = len([*folder.glob("rng_state*.pth")]) == processes
    return whole and optimizer and model and random_states and (folder / "scheduler.pt").exists()


class StopAndResume(TrainerCallback):
    """Saves a checkpoint when a signal arrives; loads what transformers does not load on resume."""

    def __init__(self, args: GRPOConfig, run: Run):
        self.checkpoint, self.signal, self.training = run.checkpoint, 0, False
        if args.process_index == 0:
            write_json(Path(args.output_dir, "run.json"), run.record)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        """Note the signal; the second one, or one outside of training, stops at once."""
        if self.signal or not self.training:
            print_error("\nstopped; the same command resumes")
            raise SystemExit(128 + number)
        self.signal = number
        print_error("\nfinishing the step, then saving; a second signal stops at once")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step >= state.max_steps:  # transformers would train one more step
            raise AtLastStep
        self.training = True
        if self.checkpoint and "ref" in getattr(model, "peft_config", {}):
            model.load_adapter(self.checkpoint, "default", is_trainable=True)
            model.set_adapter("default")  # transformers loads only "ref"

    def on_step_end(self, args, state, control, **kwargs):
        self.signal = max(gather_object([self.signal]))  # all processes stop at the same step
        if self.signal:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False
        if self.signal:
            wandb_run.close_run()
            print_once(f"stopped at step {state.global_step}; the same command resumes")
            raise SystemExit(128 + self.signal)
