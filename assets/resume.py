"""It was stopped, what now? Decide what an output directory is; stop and resume without a loss."""

import ast
import json
import re
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from secrets import token_hex

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, wait_for_everyone
from filelock import FileLock
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from assets.settings import UserError, as_user_error, print_error, print_once
from assets.trainer import order_matters
from assets.watch import close_run

# Settings that may differ when a run resumes: they change no number, but for rounding, or what they
# name is compared itself, in `describe`
FREE = """eval* *eval_batch_size output_dir overwrite_output report_to project run_name log_*
    logging_* *_to_print print_steps save_* hub_* disable_tqdm local_rank *train_batch_size
    gradient_accumulation_steps gradient_checkpointing steps_per_generation dataloader_num_workers
    dataloader_p* torch_empty_cache_steps vllm_gpu* vllm_enable_sleep_mode vllm_server_* model_name*
    model_revision dataset_name dataset_config chat_template_kwargs max_prompt_length"""
LEFT_OVER = re.compile(r"eval-|run\.part$")  # what the script leaves before a run begins
STOPS = "SIGTERM SIGINT SIGHUP SIGUSR1 SIGUSR2 SIGXCPU"  # Windows has the first two


def write_json(path: Path, value: dict) -> None:
    """Write JSON with an atomic rename: never a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".part").replace(path)


def on_first_process(function) -> object:
    """Return, on all processes, the result of a function called on the first."""
    return broadcast_object_list([function() if PartialState().is_main_process else None])[0]


def describe(args: GRPOConfig, model_args: ModelConfig, trainer: GRPOTrainer) -> dict[str, str]:
    """Return what must be equal when a run resumes: settings, and hashes of what it uses (10 s)."""
    config = vars(model_args) | args.to_sanitized_dict() | {"world_size": args.world_size}
    batch, rows = args.per_device_train_batch_size, trainer.train_dataset
    config["optimizer batch"] = batch * args.gradient_accumulation_steps * args.world_size
    config |= {"micro-batch": batch} if order_matters(args) else {}  # the loss has means over it
    free = {name for name in config for pattern in FREE.split() if fnmatch(name, pattern)}
    model, weights = trainer.model, sha256()
    for name, weight in model.named_parameters():
        weight = getattr(weight, "ds_tensor", weight).detach()  # ZeRO-3: the part that is here
        weights.update(f"{name} {weight.dtype} {weight.shape}".encode())
        weights.update(weight.flatten().view(torch.uint8).cpu().numpy())
    used = {
        "prompts": trainer._tokenize_prompts(rows["prompt"][:])[0],
        "other columns": rows.remove_columns("prompt").to_dict(),
        "rewards": read_code(),
        "model": model.config.to_diff_dict() | {"transformers_version": "", "use_cache": ""},
        "weights": [weights.hexdigest(), [getattr(part, "scaling", 0) for part in model.modules()]],
        "stop tokens": [trainer.eos_token_ids, trainer.processing_class.pad_token_id],
        "precision": [trainer.accelerator.mixed_precision, model.dtype],
        "launched as": trainer.accelerator.distributed_type,
    }
    texts = {name: json.dumps(value, default=str).encode() for name, value in used.items()}
    hashes = {name: sha256(text).hexdigest()[:12] for name, text in texts.items()}
    return {name: str(value) for name, value in config.items() if name not in free} | hashes


def read_code() -> list[str]:
    """Return the code, without comments, of rewards.py and what else a user has put beside it."""
    root, ours = Path(__file__).parents[1], ("assets", "tests", "grpo_demo.py")
    files = {Path(getattr(module, "__file__", None) or "") for module in [*sys.modules.values()]}
    files = [f for f in sorted(files) if f.suffix == ".py" and root in f.parents]
    files = [f for f in files if f.relative_to(root).parts[0] not in ours]
    return [ast.dump(ast.parse(f.read_bytes())) for f in files if "site-packages" not in f.parts]


def decide(args: GRPOConfig, now: dict[str, str]) -> tuple[str, str, dict, str | None]:
    """Return what `args.output_dir` is to a command that `now` describes; change nothing.

    A state (new, resumable, finished or refused), a message, the record for run.json, a checkpoint.
    """
    out, overwrite = Path(args.output_dir), args.overwrite_output
    new = {"settings": now, "wandb_id": token_hex(4), "finished": False, "overwrote": overwrite}
    files = (file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file())
    if all(map(LEFT_OVER.match, files)):
        return "new", "", new, None
    try:
        old = json.loads((out / "run.json").read_text(encoding="utf-8"))
        old = {name: old[name] for name in new}
        names = [x for x in old["settings"] | now if old["settings"].get(x) != now.get(x)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{out} holds files, but no run.json of this version that can be read ({error})"
        return "new" if overwrite and (out / "run.json").exists() else "refused", why, new, None
    if overwrite and (names or old["finished"] or not old["overwrote"]):
        return "new", "", new, None  # else it was killed: the same command does not start again
    if names:
        changes = "; ".join(f"{x} {old['settings'].get(x)} -> {now.get(x)}" for x in names)
        why = f"{out} is a run with other settings ({changes}); --overwrite_output moves it aside"
        return "refused", why, old, None
    if old["finished"]:
        return "finished", f"{out} is finished; --overwrite_output starts again", old, None
    checkpoint = newest_checkpoint(out)
    return "resumable", f"resuming from {checkpoint or 'step 0'}", old, checkpoint


def find_steps(out: Path) -> list[int]:
    """Return the steps that have a checkpoint, the last one first; no checkpoint-9-copy."""
    names = [folder.name.removeprefix("checkpoint-") for folder in out.glob("checkpoint-*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest_checkpoint(out: Path) -> str | None:
    """Return the newest checkpoint whose files are all there, and as long as when it was saved."""
    for folder in (out / f"checkpoint-{step}" for step in find_steps(out)):
        with suppress(OSError, ValueError):
            sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
            if all((folder / name).stat().st_size == size for name, size in sizes.items()):
                return str(folder)
        print_error(f"warning: {folder} is incomplete or damaged: passed over")


def open_output(args: GRPOConfig, model_args: ModelConfig, trainer: GRPOTrainer) -> tuple:
    """Return what `decide` says, on all processes; begin a new run, with an old one moved aside."""
    found = on_first_process(lambda: decide(args, describe(args, model_args, trainer)))
    state, message, record, _ = found
    out = Path(args.output_dir).resolve()
    if state == "refused":
        raise UserError(f"{message}; or choose another --output_dir")
    if state != "new":
        print_once(message)
    elif args.process_index == 0:
        if (out / "run.json").exists():
            aside = out.with_name(f"{out.name}.{datetime.now():%Y%m%d-%H%M%S}")
            out.rename(aside)
            print_once(f"moved the old {out} to {aside}")
        write_json(out / "run.json", record)
    return found


@contextmanager
def claim_output(args: GRPOConfig):
    """Hold `args.output_dir` for this run, by a file beside it; at its end, close W&B."""
    lock = FileLock(f"{Path(args.output_dir).resolve()}.lock")
    with as_user_error("--output_dir cannot be written, or another run is using it"):
        on_first_process(lambda: lock.acquire(timeout=0) and None)
    try:
        yield
    finally:
        with suppress(OSError):  # the disk may be full for W&B too
            close_run()
        lock.release()
        if args.process_index == 0:
            Path(lock.lock_file).unlink(missing_ok=True)


class StopAndResume(TrainerCallback):
    """Stops at a signal, saves where a run can resume, loads what transformers does not."""

    def __init__(self, trainer: GRPOTrainer, checkpoint: str | None):
        args, self.checkpoint = trainer.args, checkpoint
        self.signal, self.due, self.handlers = 0, False, {}
        self.keep, args.save_total_limit = args.save_total_limit, None  # see on_save
        self.batches = args.steps_per_generation * args.num_iterations  # of one generation

    def on_signal(self, number, frame):
        """Note the signal: the run ends after the step. SIGTERM or Ctrl-C after it end it now."""
        if self.signal and number in (signal.SIGTERM, signal.SIGINT):
            raise SystemExit(128 + number)
        self.signal = self.signal or number  # SIGHUP and SIGXCPU come more than once
        print_error("\nfinishing the step, then saving; Ctrl-C again stops at once")

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if state.global_step >= state.max_steps:  # transformers would train one more step
            raise StopIteration
        for number in [number for number in signal.Signals if number.name in STOPS]:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self.handlers[number] = signal.signal(number, self.on_signal)
        state.compute_steps(args, state.max_steps)  # as set now, not as in the checkpoint
        for _ in range(int(state.epoch or 0)):  # shuffle as often as the epochs before have done
            next(iter(train_dataloader.batch_sampler))
        if self.checkpoint and "ref" in getattr(model, "peft_config", {}):
            model.load_adapter(self.checkpoint, "default", is_trainable=True)
            model.set_adapter("default")  # transformers loads only "ref"

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        batches = round(state.epoch * len(train_dataloader))  # used so far
        # No checkpoint has the completions that will be used again: they are in memory only
        used_up = batches % self.batches == 0 or state.global_step >= state.max_steps
        self.signal = max(gather_object([self.signal]))  # all processes stop at the same step
        self.due |= control.should_save or self.signal > 0
        control.should_save = self.due and used_up
        self.due &= not used_up
        control.should_log |= control.should_save  # TRL has what is not logged in memory only
        control.should_training_stop |= self.signal > 0 and used_up

    def on_save(self, args, state, control, **kwargs):
        wait_for_everyone()
        if state.is_world_process_zero:
            out, step = Path(args.output_dir), state.global_step
            folder = out / f"checkpoint-{step}"
            files = (f for f in folder.rglob("*") if f.is_file() and f.stem != "sizes")
            sizes = {f.relative_to(folder).as_posix(): f.stat().st_size for f in files}
            write_json(folder / "sizes.json", sizes)
            older = [old for old in find_steps(out) if old <= step]  # a later one is damaged
            for old in older[self.keep or len(older) :]:
                shutil.rmtree(out / f"checkpoint-{old}")

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.signal:
            print_once(f"stopped at step {state.global_step}; the same command resumes")
            raise SystemExit(128 + self.signal)
