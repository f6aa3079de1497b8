"""Evaluate a model on the test questions: generate greedily, score, tell format from reasoning.

`Evaluation` does all of it for `grpo_demo.py`; `verdict` is the rule that says what was learned.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import wandb
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig

from assets.keep import say, write_json
from rewards import score

Z = 1.96  # 95% intervals
COLUMNS = [*score("", ""), "truncated", "tokens"]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    batch_size: int,
    max_new_tokens: int,
    title: str,
) -> list[dict]:
    """Generate greedily for all prompts, sharded over the processes. Uses no random numbers.

    Returns a dict per prompt, in order and on every process: `completion` (text), `tokens` (with
    the end-of-turn token) and `truncated` (no end within `max_new_tokens`).
    """
    eos = model.generation_config.eos_token_id
    stops = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos] * (eos is not None))]
    greedy = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": stops}
    off = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    config = GenerationConfig(**greedy, **off, pad_token_id=tokenizer.eos_token_id)
    style = {"add_generation_prompt": True, "padding": True, "return_dict": True}
    model.eval()
    done = []
    with PartialState().split_between_processes(prompts) as shard:
        for i in tqdm(range(0, len(shard), batch_size), desc=title):
            batch = shard[i : i + batch_size]
            inputs = tokenizer.apply_chat_template(batch, return_tensors="pt", **style)
            outputs = model.generate(**inputs.to(model.device), generation_config=config)
            for ids in outputs[:, inputs["input_ids"].shape[1] :].tolist():
                end = next((k for k, token in enumerate(ids) if token in stops), None)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True)
                tokens = len(ids) if end is None else end + 1
                done.append({"completion": text, "tokens": tokens, "truncated": end is None})
    return gather_object(done)


class Evaluation:
    """The evaluation of one run on `questions` (columns question, answer), kept with the run."""

    def __init__(
        self, args: GRPOConfig, model_name: str, questions: Dataset, make_prompt: Callable
    ):
        self.questions, self.make_prompt, self.out = questions, make_prompt, Path(args.output_dir)
        self.batch_size = args.per_device_eval_batch_size
        self.max_new_tokens = args.max_completion_length
        names = ("dataset_name", "max_completion_length", "seed", "output_dir")
        self.settings = {"model": model_name} | {name: getattr(args, name) for name in names}
        self.measured: dict[str, list[dict]] = {}

    def evaluate(self, model, tokenizer, name: str, one_shot: bool) -> list[dict]:
        """Generate and score an answer to every question, with an example if `one_shot`.

        Returns a row per question: question, gold, completion, tokens, truncated and the four
        columns of `rewards.score`. They are kept in `evaluation/<name>.parquet`, where a resumed
        run finds them.
        """
        path = self.out / "evaluation" / f"{name}.parquet"
        rows = pd.read_parquet(path).to_dict("records") if path.exists() else []
        asked = list(zip(self.questions["question"], self.questions["answer"], strict=True))
        if [(row["question"], row["gold"]) for row in rows] != asked:
            prompts = [self.make_prompt(question, one_shot) for question, _ in asked]
            sizes = (self.batch_size, self.max_new_tokens)
            made = generate(model, tokenizer, prompts, *sizes, f"evaluate {name}")
            rows = [
                {"question": question, "gold": gold, **row, **score(row["completion"], gold)}
                for (question, gold), row in zip(asked, made, strict=True)
            ]
            if PartialState().is_main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(rows).to_parquet(path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)  # atomic: never a partial file
        self.measured[name] = rows
        return rows

    def report(self) -> dict:
        """Print the table and, after training, the verdict; keep both in `evaluation.json`, W&B."""
        measurements = {name: summarize(rows) for name, rows in self.measured.items()}
        result = {"settings": self.settings | {"decoding": "greedy"}, "measurements": measurements}
        titles = [f"{len(self.questions)} questions", *measurements]
        say("\n" + "".join(f"{title:>27}" for title in titles))
        for column in COLUMNS:
            form = "{:.1f} [{:.1f}, {:.1f}]" if column == "tokens" else "{:.1%} [{:.1%}, {:.1%}]"
            cells = [m[column] for m in measurements.values()]
            texts = [form.format(cell["value"], *cell["interval"]) for cell in cells]
            say("".join(f"{text:>27}" for text in [column, *texts]))
        if len(measurements) == 3:
            before, control, after = self.measured.values()
            if "after_one_shot" in measurements:
                before, control = control, before
            result |= verdict(before=before, control=control, after=after)
            result["sentences"] = explain(result, measurements)
            say("\n".join(["", f"verdict: {result['verdict']}", *result["sentences"]]))
        if PartialState().is_main_process:
            write_json(self.out / "evaluation.json", result)
        self.log(result)
        return result

    def log(self, result: dict) -> None:
        """Put the figures into the summary of the W&B run, and a table of 50 answers each."""
        if not wandb.run:
            return
        for name, columns in result["measurements"].items():
            values = {f"eval/{name}/{column}": cell["value"] for column, cell in columns.items()}
            wandb.run.summary.update(values)
            answers = pd.DataFrame(self.measured[name][:50])
            wandb.log({f"eval/{name}": wandb.Table(dataframe=answers)})
        words = {f"eval/{key}": result[key] for key in ("verdict", "sentences") if key in result}
        wandb.run.summary.update(words)


def share(rows: list[dict], column: str) -> float:
    """Return the share of rows in which `column` is true, from 0 to 1."""
    return sum(row[column] for row in rows) / len(rows)


def summarize(rows: list[dict]) -> dict[str, dict]:
    """Return value, n and 95% interval of each column of one measurement.

    Wilson's interval (1927) for shares; mean +- 1.96 standard errors for `tokens`.
    """
    n, result = len(rows), {}
    for column in COLUMNS[:-1]:
        p, zz = share(rows, column), Z * Z / n
        center, half = p + zz / 2, Z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
        interval = [(center - half) / (1 + zz), (center + half) / (1 + zz)]
        result[column] = {"value": p, "n": n, "interval": interval}
    mean = sum(row["tokens"] for row in rows) / n
    half = Z * math.sqrt(sum((row["tokens"] - mean) ** 2 for row in rows)) / n
    return result | {"tokens": {"value": mean, "n": n, "interval": [mean - half, mean + half]}}


def gain(column: str, before: list[dict], after: list[dict]) -> list[float]:
    """Return the difference of two shares on the same questions, and its paired 95% interval.

    Source: Agresti and Min 2005.
    """
    changes = [int(a[column]) - int(b[column]) for b, a in zip(before, after, strict=True)]
    n = len(changes)
    center = sum(changes) / (n + 2)
    half = Z * math.sqrt(((sum(map(abs, changes)) + 1) / (n + 2) - center**2) / (n + 2))
    return [sum(changes) / n, max(-1.0, center - half), min(1.0, center + half)]


def verdict(*, before: list[dict], control: list[dict], after: list[dict]) -> dict:
    """Say how much of the gain in strict accuracy is due to format and how much to reasoning.

    before   the untrained model with the prompt used in training
    control  the untrained model with the other prompt: with an example, or without one
    after    the trained model

    Reasoning is the gain in lenient accuracy over the better of the two untrained prompts. Format
    is the rest: answers that were right but not in tags. A part counts as learned if its 95%
    interval lies above zero; for the format, that of soft or strict format.
    """
    columns = ("strict_accuracy", "soft_format", "strict_format")
    gains = {column: gain(column, before, after) for column in columns}
    lenient = [share(rows, "lenient_accuracy") for rows in (before, control)]
    best = before if lenient[0] > lenient[1] else control
    gains["reasoning"] = gain("lenient_accuracy", best, after)
    gains["format"] = gains["strict_accuracy"][0] - gains["reasoning"][0]
    lows = {
        "format": max(gains["soft_format"][1], gains["strict_format"][1]),
        "reasoning": gains["reasoning"][1],
    }
    learned = " and ".join(part for part, low in lows.items() if low > 0) or "neither"
    return {"verdict": learned, "gain": gains, "best_untrained": max(lenient)}


def explain(result: dict, measurements: dict[str, dict]) -> list[str]:
    """Return the verdict in three sentences; `measurements` are those of `evaluation.json`."""
    after = list(measurements)[-1]
    before = after.replace("after", "before")

    def went(column: str, gain: str, start: float | None = None) -> str:
        shares = [measurements[name][column]["value"] for name in (before, after)]
        points = "{:+.1f} points [{:+.1f}, {:+.1f}]".format(
            *(100 * x for x in result["gain"][gain])
        )
        return f"{shares[0] if start is None else start:.1%} to {shares[1]:.1%} ({points})"

    shot = measurements["before_one_shot"]["strict_accuracy"]["value"]
    form = 100 * result["gain"]["format"]
    return [
        f"Strict accuracy: {went('strict_accuracy', 'strict_accuracy')}; "
        f"untrained, with one example in the prompt: {shot:.1%}.",
        "Due to reasoning: lenient accuracy from the better untrained prompt, "
        f"{went('lenient_accuracy', 'reasoning', result['best_untrained'])}.",
        f"Due to format: {form:+.1f} points; soft format {went('soft_format', 'soft_format')}, "
        f"strict format {went('strict_format', 'strict_format')}.",
    ]
