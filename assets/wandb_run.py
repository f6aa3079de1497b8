"""The W&B run: open it before training, add the evaluation, close it.

Training metrics are logged by transformers' WandbCallback and timers by TRL; both use the open run.
"""

import os
from pathlib import Path

import pandas as pd
import wandb
from transformers.utils import strtobool
from trl import GRPOConfig

from assets.common import as_user_error, print_error, print_once


def find_mode(args: GRPOConfig) -> str:
    """Return W&B's mode: online with a key, else offline, or "disabled".

    Takes `wandb` out of `args.report_to` if it is disabled, also by the environment variables
    WANDB_MODE and WANDB_DISABLED. UserError for a mode, project or key that W&B refuses.
    """
    with as_user_error("W&B (WANDB_DISABLED, WANDB_MODE, WANDB_PROJECT or key)", wandb.Error):
        mode = os.environ.get("WANDB_MODE")
        disabled = mode == "disabled" or strtobool(os.environ.get("WANDB_DISABLED") or "false")
        if disabled or "wandb" not in args.report_to:
            args.report_to = [name for name in args.report_to if name != "wandb"]
            return "disabled"
        project = os.environ.get("WANDB_PROJECT", args.project)
        wandb.Settings(mode=mode or "offline", project=project)
        return mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")


def open_run(args: GRPOConfig, config: dict, run_id: str, mode: str) -> None:
    """Open the W&B run on the first process; offline if the server cannot be reached.

    config  all settings of the run
    run_id  of W&B; a resumed run keeps it, in a folder of its own for each start
    mode    from `find_mode`
    """
    if mode == "disabled" or args.process_index:
        return
    if not os.access(os.path.expanduser("~"), os.W_OK):  # where W&B keeps what it works on
        for kind in ("DATA", "CACHE", "CONFIG"):
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(Path(args.output_dir, "wandb")))
    settings = wandb.Settings(
        project=os.environ.get("WANDB_PROJECT", args.project),
        run_name=os.environ.get("WANDB_NAME", args.run_name),
        root_dir=os.environ.get("WANDB_DIR", args.output_dir),
        run_id=run_id,
        resume="allow",
        silent=True,  # what to do next is said below and in `close_run`
        host=os.environ.get("WANDB_HOST", ""),  # else the machine's name is sent
        init_timeout=30,
        finish_timeout=60,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=0.01,  # write at once: a kill loses nothing
    )
    try:
        wandb.init(config=config, settings=settings, mode=mode)
    except wandb.Error as error:
        print_error(f"warning: W&B cannot be reached ({error}); the run is kept offline")
        wandb.teardown()  # it still holds the run's id
        wandb.init(config=config, settings=settings, mode="offline")
    offline = f"offline, in {Path(wandb.run.dir).parent}"
    print_once(f"W&B     {offline if wandb.run.offline else wandb.run.url}")


def log_evaluation(result: dict, answers: dict[str, list[dict]]) -> None:
    """Add an evaluation to the open run: figures and 50 answers each in its summary, a bar chart.

    result   what `evaluation.json` holds
    answers  name of the measurement -> its rows
    """
    if not wandb.run:
        return
    summary = {f"eval/{key}": result[key] for key in ("verdict", "sentences") if key in result}
    bars = wandb.Table(["measurement", "accuracy"])
    for name, columns in result["measurements"].items():
        summary |= {f"eval/{name}/{column}": cell["value"] for column, cell in columns.items()}
        for kind in ("lenient", "strict"):
            bars.add_data(f"{name}, {kind}", columns[f"{kind}_accuracy"]["value"])
    for name, kinds in result.get("pass", {}).items():
        for kind, cells in kinds.items():
            summary |= {f"eval/{name}/{kind}/pass@{k}": c["value"] for k, c in cells.items()}
    shown = [{"measurement": name} | row for name, rows in answers.items() for row in rows[:50]]
    summary["eval/answers"] = wandb.Table(dataframe=pd.DataFrame(shown))
    wandb.run.summary.update(summary)
    title = "Test accuracy: right anywhere (lenient), right inside the tags (strict)"
    wandb.log({"eval/chart": wandb.plot.bar(bars, "measurement", "accuracy", title=title)})


def close_run() -> None:
    """Close the W&B run, if one is open; say how to look at it and how to upload it."""
    if not wandb.run:
        return
    folder, offline = Path(wandb.run.dir).parent, wandb.run.offline
    try:
        wandb.finish()
    except TimeoutError:  # the server does not answer; the local files are complete
        offline = True
    print_once(f"\nlook at the run (/ filters: reward, accuracy, generate):\nwandb leet {folder}")
    waiting = {*folder.parent.glob("offline-run-*"), *([folder] if offline else [])}
    if waiting:
        folders = " ".join(sorted(map(str, waiting)))
        print_once(f"\nupload the run (after wandb login):\nwandb sync --include-online {folders}")
