"""Claim an output directory: is it new, resumable, finished, in use, or somebody else's?"""

import json
import os
import re
import socket
import zipfile
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

from datasets import Dataset
from filelock import FileLock, Timeout
from safetensors import safe_open
from trl import GRPOConfig, ModelConfig
from wandb.sdk.lib.runid import generate_id

from assets.errors import UserError, say

# Settings that do not change what is computed: they may differ when a run is resumed
FREE_SETTINGS = """
    evaluate eval_only eval_samples eval_generations eval_batch_size per_device_eval_batch_size
    estimate_memory output_dir overwrite_output report_to project run_name log_* logging_*
    *_to_print print_steps save_* hub_* push_to_hub disable_tqdm local_rank
    per_device_train_batch_size train_batch_size gradient_accumulation_steps steps_per_generation
    gradient_checkpointing* dataloader_num_workers dataloader_p* torch_empty_cache_steps
    vllm_gpu_memory_utilization vllm_enable_sleep_mode vllm_server_*
"""
LOCK, OWNER = ".lock", ".owner"
HELD = []  # locks, until the process ends, however it ends


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


def claim(args: GRPOConfig, config: dict) -> tuple[dict, str | None]:
    """Lock `args.output_dir`; return the record for `run.json`, and the checkpoint to resume from.

    config  all settings of the run; those that change what is computed are compared on resume

    Exits with status 0 if the run is finished. UserError if the directory is in use, holds a run
    with other settings, or other files.
    """
    out = Path(args.output_dir)
    lock(out)
    free = {name for name in config for part in FREE_SETTINGS.split() if fnmatch(name, part)}
    settings = {name: str(value) for name, value in config.items() if name not in free}
    new = {"settings": settings, "wandb_id": generate_id(), "finished": False}
    new["overwrote"] = args.overwrite_output
    old = read_record(out, args.overwrite_output)
    if args.overwrite_output and old != new | {"wandb_id": old.get("wandb_id")}:
        move_aside(out)  # unless this very command was stopped before
    elif old:
        return old, resume(out, settings, old, args.world_size)
    elif any(is_foreign(path.relative_to(out)) for path in out.rglob("*") if path.is_file()):
        refuse(out, "holds other files")
    return new, None


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
    (out / OWNER).unlink(missing_ok=True)
    (out / LOCK).unlink(missing_ok=True)
    HELD.pop().release()
    with suppress(OSError):  # it holds something else
        out.rmdir()


def move_aside(out: Path) -> None:
    """Rename the directory, if it holds anything, and lock a new one in its place."""
    if not out.name:
        refuse(out, "is this folder, which cannot be moved aside")
    if {file.name for file in out.iterdir()} > {LOCK, OWNER}:
        aside = out.with_name(f"{out.name}.{datetime.now():%Y%m%d-%H%M%S}")
        say(f"moved the old {out} to {out.rename(aside)}")
        lock(out)


def is_foreign(path: Path) -> bool:
    """Return whether a file is none that this script leaves where no run has begun."""
    return not path.parts[0].startswith("eval-") and path.name not in ("run.part", LOCK, OWNER)


def refuse(out: Path, why: str) -> None:
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


def resume(out: Path, new: dict, record: dict, processes: int) -> str | None:
    """Return the newest complete checkpoint of a stopped run, None if there is none."""
    old = record["settings"]
    if changed := [f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v]:
        refuse(out, f"is a run with other settings ({'; '.join(changed)})")
    if record["finished"]:
        say(f"{out} is finished, nothing to do; --overwrite_output starts again")
        raise SystemExit(0)
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in out.iterdir()]
    steps = sorted((int(match[1]) for match in found if match), reverse=True)
    for step in steps:
        folder = out / f"checkpoint-{step}"
        if is_complete(folder, processes):
            say(f"resuming from {folder}")
            return str(folder)
        say(f"warning: {folder} is incomplete or damaged: passed over", error=True)
    if steps:
        say("warning: no checkpoint is left: training starts again at step 1", error=True)
    return None


def is_complete(folder: Path, processes: int) -> bool:
    """Return whether a checkpoint has what every process needs to resume, and each file opens."""
    ranks = [f"_{rank}" for rank in range(processes)] if processes > 1 else [""]
    names = ["trainer_state.json", "scheduler.pt", *(f"rng_state{rank}.pth" for rank in ranks)]
    try:
        for index in folder.glob("*.index.json"):  # of weights in several files
            names += json.loads(index.read_text())["weight_map"].values()
        json.loads((folder / "trainer_state.json").read_text())
        for file in (weights := list(folder.glob("*.safetensors"))):
            with safe_open(file, "pt"):  # reads the header and compares the length
                pass
        saved = [path for path in folder.rglob("*.pt*") if path.suffix in (".pt", ".pth")]
        opens = all(map(zipfile.is_zipfile, saved))  # what torch.save writes; the end is looked at
    except Exception:  # whatever a library makes of a damaged file
        return False
    shards = list(folder.glob("global_step*/*optim_states.pt"))  # DeepSpeed: one a process
    states = len(shards) == processes if shards else any(folder.glob("optimizer*"))
    weights = weights or list(folder.glob("pytorch_model_fsdp*"))
    return opens and states and bool(weights) and all((folder / name).exists() for name in names)
