"""It was stopped, what now? Claim the output directory, find the checkpoint, stop at a good moment.

SIGTERM and Ctrl-C save a checkpoint and exit with status 128 + signal; the same command resumes.
"""

import ast
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatch
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex

import torch
from accelerate.utils import gather_object, wait_for_everyone
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints
from trl import GRPOConfig, GRPOTrainer, ModelConfig

import rewards
from assets import wandb_run
from assets.common import UserError, first_process, print_error, print_once, write_json

# Settings that do not change what is computed: they may differ when a run is resumed
FREE_SETTINGS = """
    evaluate eval_only eval_samples eval_generations eval_batch_size per_device_eval_batch_size
    estimate_memory output_dir overwrite_output report_to project run_name log_* logging_*
    *_to_print print_steps save_* hub_* push_to_hub disable_tqdm local_rank
    train_batch_size gradient_accumulation_steps steps_per_generation
    dataloader_num_workers dataloader_p* torch_empty_cache_steps
    vllm_gpu_memory_utilization vllm_enable_sleep_mode vllm_server_*
"""
# These may differ too, with a warning: they change rounding, and what dropout leaves out
ROUNDING = "per_device_train_batch_size gradient_checkpointing device torch transformers trl"
DISK_FULL = re.compile("No space left|Disk quota|inline_container|iostream")  # torch.save: last two
LEFT_OVER = re.compile(r"eval-|(run\.part|\.lock|\.owner)$")  # by the script, before any run began
LOCK, OWNER, SIZES = ".lock", ".owner", "sizes.json"
HELD = []  # locks of this process; they end with it, however it ends


class AtLastStep(Exception):
    """The checkpoint that was loaded is that of the last step: nothing is left to train."""


def describe(args: GRPOConfig, model_args: ModelConfig, prompt: str, *data: Dataset) -> dict:
    """Return all settings of a run, with fingerprints of data, rewards file and local model.

    prompt  the system prompt
    data    the rows of training and, if there are, of the evaluation

    A step's completions (generation_batch_size) and the optimizer's batch are among them, so their
    factors are free, unless the loss has means over the micro-batch.
    """
    config = vars(model_args) | args.to_sanitized_dict() | {"system_prompt": prompt}
    micro_batch = args.per_device_train_batch_size
    config["optimizer batch"] = micro_batch * args.gradient_accumulation_steps * args.world_size
    entropy = args.top_entropy_quantile < 1 or args.entropy_coef or args.use_adaptive_entropy
    if args.loss_type == "bnpo" or entropy or args.router_aux_loss_coef:
        config["micro-batch"] = micro_batch
    config["world_size"] = args.world_size
    gpu = args.device.type == "cuda"
    config["device"] = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    config |= {name: version(name) for name in ("torch", "transformers", "trl")}
    if args.eval_strategy == "no":
        data = data[:1]
    else:  # it draws random numbers of training
        config["held-out batch"] = args.per_device_eval_batch_size
    texts = [repr(rows and rows.to_dict()) for rows in data]
    config["data"] = [sha256(text.encode()).hexdigest()[:12] for text in texts]
    code = ast.unparse(ast.parse(Path(rewards.__file__).read_bytes()))  # without comments
    config["rewards.py"] = sha256(code.encode()).hexdigest()[:12]
    for file in sorted(Path(model_args.model_name_or_path).glob("*.*")):
        if file.suffix in (".safetensors", ".json", ".jinja"):
            config[f"model file {file.name}"] = fingerprint(file)
    return config


def fingerprint(file: Path) -> str:
    """Return a hash of a file's size and content; of a large file, 256 blocks are read."""
    size, block = file.stat().st_size, 2**16
    digest = sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in range(0, size, max(block, size // 256)):
            stream.seek(start)
            digest.update(stream.read(block))
    return digest.hexdigest()[:12]


@contextmanager
def claim_output(args: GRPOConfig, config: dict) -> Iterator[tuple[dict, str | None]]:
    """Claim `args.output_dir`, yield what `claim` returns; then mark the run finished, close W&B.

    Exits with status 0 if the run is finished, 1 if the disk is full. UserError if the directory is
    in use, holds a run with other settings, or other files.
    """
    out = Path(args.output_dir)
    try:
        record, checkpoint = first_process(lambda: claim(args, config))
        yield record, checkpoint
        if args.process_index == 0:
            write_json(out / "run.json", record | {"finished": True})
    except Exception as error:  # safetensors and torch have kinds of their own
        free = shutil.disk_usage(out).free / 1e6 if os.path.isdir(out) else math.inf
        if isinstance(error, UserError) or (free > 1 and not DISK_FULL.search(str(error))):
            raise
        print_error(f"error: disk full: {free:,.0f} MB are free in {out}; make room, run it again")
        raise SystemExit(1) from error
    finally:
        release(out)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # nothing is left to resume
    wandb_run.close_run()


def settings_to_compare(config: dict) -> dict[str, str]:
    """Return the settings that must be equal when a run is resumed, as texts."""
    free = {name for name in config for part in FREE_SETTINGS.split() if fnmatch(name, part)}
    return {name: str(value) for name, value in config.items() if name not in free}


def claim(args: GRPOConfig, config: dict) -> tuple[dict, str | None]:
    """Lock `args.output_dir`; return a new run or a resumable one, refuse what is unrelated.

    A run is its record, which `run.json` holds, and the checkpoint to resume from, if any.
    """
    out = Path(args.output_dir)
    lock(out)
    new = {"settings": settings_to_compare(config), "wandb_id": token_hex(4), "finished": False}
    new["overwrote"] = args.overwrite_output
    old = read_record(out, args.overwrite_output)
    # The same command after a kill: its own half-done run is not moved aside
    same_command = old == {**new, "wandb_id": old.get("wandb_id")}
    if args.overwrite_output and not same_command:
        move_aside(out)
    elif old:
        return old, resume_or_refuse(out, new["settings"], old)
    elif any(f.is_file() and not LEFT_OVER.match(str(f.relative_to(out))) for f in out.rglob("*")):
        raise UserError(f"{out} holds other files than those of a run: choose another --output_dir")
    return new, None


def choose_evaluation(out: Path, config: dict) -> Path:
    """Return the folder of an evaluation of these settings that was stopped, else a new one."""
    begun = {"settings": settings_to_compare(config)}
    for file in sorted(out.glob("eval-*/evaluation.json"), reverse=True):
        if json.loads(file.read_text()) == begun:
            print_once(f"resuming {file.parent}")
            return file.parent
    folder = out / f"eval-{datetime.now():%Y%m%d-%H%M%S}"
    write_json(folder / "evaluation.json", begun)
    return folder


def lock(out: Path) -> None:
    """Hold the directory; UserError names the process that already does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {error}") from None
    held = FileLock(out / LOCK)
    try:
        held.acquire(timeout=0)
    except Timeout:
        who = (out / OWNER).read_text() if (out / OWNER).exists() else "another process"
        raise UserError(f"{out} is in use by {who}: choose another --output_dir, or wait") from None
    HELD.append(held)
    (out / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}")


def release(out: Path) -> None:
    """Unlock the directory if it is held; leave no trace of the lock, nor an empty directory."""
    if HELD:
        while HELD:
            HELD.pop().release()
        (out / OWNER).unlink(missing_ok=True)
        (out / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            out.rmdir()


def move_aside(out: Path) -> None:
    """Rename the directory, if it holds anything, and lock a new one in its place."""
    if not out.name:
        raise UserError(f"--output_dir {out}: this folder cannot be moved aside")
    if {file.name for file in out.iterdir()} > {LOCK, OWNER}:
        aside = out.rename(out.with_name(f"{out.name}.{datetime.now():%Y%m%d-%H%M%S}"))
        print_once(f"moved the old {out} to {aside}")
        for name in (LOCK, OWNER):
            (aside / name).unlink()
        lock(out)


def refuse(out: Path, why: str) -> None:
    """Raise the UserError that says why the directory cannot be used."""
    raise UserError(f"{out} {why}: choose another --output_dir; --overwrite_output moves it aside")


def read_record(out: Path, overwrite: bool) -> dict:
    """Return what `run.json` holds, empty if there is none, or if it is damaged and overwritten."""
    file = out / "run.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(file.read_text())
        if record["finished"] in (True, False) and record["wandb_id"] and {**record["settings"]}:
            return record
    return refuse(out, "has a damaged run.json") if file.exists() and not overwrite else {}


def resume_or_refuse(out: Path, new: dict, record: dict) -> str | None:
    """Return the newest complete checkpoint of the run in `record`, None if there is none.

    Exits with status 0 if the run is finished. UserError if the settings of this start, `new`,
    are others.
    """
    old, finished = record["settings"], record["finished"]
    changed = {}
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            of_file = name in ("data", "rewards.py") or name.startswith("model file ")
            how = "has changed" if of_file else f"{old.get(name)} -> {new.get(name)}"
            changed[name] = f"{name} {how}"
    rounding = [changed.pop(name) for name in ROUNDING.split() if name in changed]
    checkpoint = None
    if not finished and changed.keys() <= {"rewards.py"}:
        checkpoint = newest_checkpoint(out)
    if checkpoint and changed:
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        if state.global_step >= state.max_steps:
            changed = {}
            print_error("warning: rewards.py has changed, after training: answers are scored anew")
    if finished and changed and changed.keys() <= {"max_steps", "num_train_epochs"}:
        further = shlex.join(["--model_name_or_path", str(out), "--output_dir", f"{out}-2"])
        raise UserError(f"{out} is finished; to train it further, from step 0, add: {further}")
    if changed:
        refuse(out, f"is a run with other settings ({'; '.join(changed.values())})")
    if finished:
        print_once(f"{out} is finished, nothing to do; --overwrite_output starts again")
        raise SystemExit(0)
    if rounding:
        print_error(f"warning: {'; '.join(rounding)}: results will differ by rounding")
    if checkpoint:
        print_once(f"resuming from {checkpoint}")
    return checkpoint


def newest_checkpoint(out: Path) -> str | None:
    """Return the newest complete checkpoint, None if there is none."""
    folders = [f for f in sort_checkpoints(out) if re.search(r"checkpoint-\d+$", f)]
    for folder in reversed(folders):
        if is_complete(Path(folder)):
            return folder
        print_error(f"warning: {folder} is incomplete or damaged: passed over")
    if folders:
        print_error("warning: no checkpoint is left: training starts again at step 1")
    return None


def is_complete(folder: Path) -> bool:
    """Return whether all files of a checkpoint are there, and as long as when they were saved."""
    with suppress(OSError, ValueError):
        sizes = json.loads((folder / SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    return False


class StopAndResume(TrainerCallback):
    """Stops at a signal, saves where a run can resume, loads what transformers does not."""

    def __init__(self, trainer: GRPOTrainer, record: dict, checkpoint: str | None):
        args = trainer.args
        self.checkpoint, self.signal = checkpoint, 0
        self.training, self.save_is_due = False, False
        self.reference = trainer.ref_model if args.sync_ref_model else None  # it moves
        self.limit, args.save_total_limit = args.save_total_limit, None  # see on_save
        # TRL keeps the completions that are used several times in memory only
        self.batches = args.steps_per_generation * args.num_iterations
        if args.save_steps * args.gradient_accumulation_steps % self.batches:
            print_once("checkpoints wait until all completions of a generation are used")
        if args.logging_steps != 1 or args.logging_strategy != "steps":
            print_once("a step with a checkpoint is logged too, also that of a stop")
        if args.process_index == 0:
            write_json(Path(args.output_dir, "run.json"), record)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        """Note the signal; the second one, or one outside of training, stops at once."""
        if self.signal or not self.training:
            print_error("\nstopped; the same command resumes")
            raise SystemExit(128 + number)
        self.signal = number
        print_error("\nfinishing the step, then saving; a second signal stops at once")

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if state.global_step >= state.max_steps:  # transformers would train one more step
            raise AtLastStep
        self.training = True
        if not self.checkpoint:
            return
        state.compute_steps(args, state.max_steps)  # as set now, not as in the checkpoint
        args.eval_on_start = False
        for _ in range(int(state.epoch)):  # shuffle as often as the epochs before have done
            next(iter(train_dataloader.batch_sampler))
        if "ref" in getattr(model, "peft_config", {}):
            model.load_adapter(self.checkpoint, "default", is_trainable=True)
            model.set_adapter("default")  # transformers loads only "ref"
        if self.reference is not None:
            self.reference.load_state_dict(torch.load(Path(self.checkpoint, "reference.pt")))

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        batches = round(state.epoch * len(train_dataloader))  # used so far
        self.signal = max(gather_object([self.signal]))  # all processes stop at the same step
        self.save_is_due = self.save_is_due or control.should_save or self.signal > 0
        used_up = batches % self.batches == 0 or state.global_step >= state.max_steps
        control.should_save = self.save_is_due and used_up
        self.save_is_due = self.save_is_due and not used_up
        control.should_log |= control.should_save  # TRL has what is not logged in memory only
        control.should_training_stop |= self.signal > 0 and used_up

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if self.reference is not None and state.is_world_process_zero:
            torch.save(self.reference.state_dict(), folder / "reference.pt")
        wait_for_everyone()
        if state.is_world_process_zero:
            files = [file for file in folder.rglob("*") if file.is_file()]
            sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
            write_json(folder / SIZES, sizes)
            rotate_checkpoints(args.output_dir, self.limit)  # the new one is complete now

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False
        if self.signal:
            wandb_run.close_run()
            print_once(f"stopped at step {state.global_step}; the same command resumes")
            raise SystemExit(128 + self.signal)
