"""Evaluate a model on the test questions: generate, score, keep, report; and the model card."""

import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path

import pandas as pd
import torch
import trl
import wandb
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import ModelCardData
from tqdm import tqdm
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer

from assets import measure
from assets.errors import first_process, say, write_json
from rewards import score

GIST = "[gist](https://gist.github.com/willccbb/4676755236bb08cab5f4e54a0475d6fb)"


def quiet(trainer: GRPOTrainer, greedy: bool) -> GRPOTrainer:
    """Return a shallow copy that shares the model but logs no timers, and may decode greedily."""
    trainer, tokenizer = copy(trainer), trainer.processing_class
    trainer.args = copy(trainer.args)
    trainer.args.report_to = []
    if not greedy:
        return trainer
    if trainer.use_vllm:
        trainer.vllm_generation = copy(trainer.vllm_generation)
        trainer.vllm_generation.generation_kwargs = {"temperature": 0.0, "repetition_penalty": 1.0}
        return trainer
    off = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    trainer.generation_kwargs = off | {
        "do_sample": False,
        "max_new_tokens": trainer.max_completion_length,
        "eos_token_id": trainer.eos_token_ids,
        "pad_token_id": tokenizer.pad_token_id,
    }
    trainer.generation_config = GenerationConfig(**trainer.generation_kwargs, disable_compile=True)
    return trainer


def generate(
    trainer: GRPOTrainer,
    prompts: list[list[dict[str, str]]],
    batch_size: int,
    title: str,
    greedy: bool = True,
) -> list[dict]:
    """Generate for all prompts, with the trainer's own backend and precision.

    Sharded over the processes, which all make the same number of calls, as ZeRO-3 and FSDP need.
    Greedily, without random numbers; or sampled as in training. Returns a dict per prompt, in order
    and on every process: `completion` (text), `tokens` (with the end-of-turn token) and `truncated`
    (no end within the limit).
    """
    trainer, tokenizer, done = quiet(trainer, greedy), trainer.processing_class, []
    accelerator, extra = trainer.accelerator, -len(prompts) % trainer.accelerator.num_processes
    hidden = trainer.args.disable_tqdm or not (sys.stderr.isatty() and accelerator.is_main_process)
    start = time.time()
    with accelerator.split_between_processes([*prompts, *prompts[:1] * extra]) as shard:
        for i in tqdm(range(0, len(shard), batch_size), title, leave=False, disable=hidden):
            trainer.model.eval()
            ids, _, _ = trainer._tokenize_prompts(shard[i : i + batch_size])
            with accelerator.autocast():  # as in training; the model is not wrapped before it
                completions, _ = trainer._generate_single_turn(ids, None, {}, 1)
            for tokens in completions:
                cut = tokens[-1] not in trainer.eos_token_ids
                text = tokenizer.decode(tokens[: len(tokens) - (not cut)], skip_special_tokens=True)
                done.append({"completion": text, "tokens": len(tokens), "truncated": cut})
    say(f"{title}: {len(prompts)} answers in {time.time() - start:.0f} s")
    return gather_object(done)[: len(prompts)]


class Evaluation:
    """The evaluation of one run on `questions` (columns question, answer), kept with the run."""

    def __init__(
        self, args: GRPOConfig, model_name: str, questions: Dataset, make_prompt: Callable
    ):
        self.questions, self.make_prompt, self.out = questions, make_prompt, Path(args.output_dir)
        names = ("dataset_name", "max_completion_length", "seed", "output_dir", "use_vllm")
        self.settings = {"model": model_name} | {name: getattr(args, name) for name in names}
        self.samples = args.eval_generations
        self.asked = list(zip(questions["question"], questions["answer"], strict=True))
        self.measured: dict[str, list[dict]] = {}
        self.passed: dict[str, dict] = {}

    def evaluate(self, trainer: GRPOTrainer, name: str, one_shot: bool) -> list[dict]:
        """Measure greedy answers to all questions, with an example if `one_shot`; return them.

        With `eval_generations` also pass@k: is one of k sampled answers right?
        """
        self.measured[name] = self.answer(trainer, name, one_shot)
        if n := self.samples:
            rows = self.answer(trainer, name, one_shot, n)
            self.passed[name] = measure.summarize_samples(rows, n)
        return self.measured[name]

    def answer(
        self, trainer: GRPOTrainer, name: str, one_shot: bool, samples: int = 0
    ) -> list[dict]:
        """Generate and score a greedy answer to every question, or `samples` sampled ones.

        Returns a row per answer: question, gold, completion, tokens, truncated and the four columns
        of `rewards.score`. They are kept in `evaluation/<name>.parquet`, where a resumed run finds
        them. Sampling has random numbers of its own: training is the same with and without it.
        """
        path = self.out / "evaluation" / f"{name}{'_sampled' if samples else ''}.parquet"
        asked = [pair for pair in self.asked for _ in range(samples or 1)]

        def kept() -> list[dict]:
            try:
                rows = pd.read_parquet(path).to_dict("records") if path.exists() else []
                if rows:
                    measure.summarize(rows)  # all columns are there
                return rows if [(row["question"], row["gold"]) for row in rows] == asked else []
            except Exception as error:  # whatever a library makes of a damaged file
                say(f"warning: {path} is damaged, measured again: {error}", error=True)
                return []

        if not (rows := first_process(kept)):
            prompts = [self.make_prompt(question, one_shot) for question, _ in asked]
            args, title = trainer.args, f"{'sample' if samples else 'evaluate'} {name}"
            with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
                torch.manual_seed(args.seed + args.process_index)
                size = args.per_device_eval_batch_size
                made = generate(trainer, prompts, size, title, greedy=not samples)
            rows = [
                {"question": question, "gold": gold, **row, **score(row["completion"], gold)}
                for (question, gold), row in zip(asked, made, strict=True)
            ]
            if PartialState().is_main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(rows).to_parquet(path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)  # atomic: never a partial file
        return rows

    def report(self) -> dict:
        """Print the table and, after training, the verdict; keep both in `evaluation.json`, W&B."""
        measurements = {name: measure.summarize(rows) for name, rows in self.measured.items()}
        result = {"settings": self.settings | {"decoding": "greedy"}, "measurements": measurements}
        say()
        for name, *cells in measure.table(measurements, "{:.1%} [{:.0%}, {:.0%}]"):
            say(f"{name:<17}" + "".join(f"{text:>20}" for text in cells))
        if self.passed:
            result["pass"] = self.passed
            for line in measure.pass_table(self.passed):
                say(line)
        if len(measurements) == 3:
            before, control, after = self.measured.values()
            if "after_one_shot" in measurements:
                before, control = control, before
            result |= measure.verdict(before=before, control=control, after=after)
            result["sentences"] = measure.explain(result, measurements)
            if self.passed:
                result["sentences"].append(measure.sharpening(self.passed))
            for text in (f"\nlearned: {result['verdict']}", *result["sentences"]):
                say(textwrap.fill(text, 80, replace_whitespace=False))
        if PartialState().is_main_process:
            write_json(self.out / "evaluation.json", result)
        self.log(result)
        return result

    def log(self, result: dict) -> None:
        """Add to the W&B run: figures and 50 answers each in its summary, and a bar chart."""
        if not wandb.run:
            return
        summary = {f"eval/{key}": result[key] for key in ("verdict", "sentences") if key in result}
        bars = wandb.Table(["measurement", "accuracy"])
        for name, columns in result["measurements"].items():
            summary |= {f"eval/{name}/{column}": cell["value"] for column, cell in columns.items()}
            for kind, shares in self.passed.get(name, {}).items():
                summary |= {f"eval/{name}/{kind}/pass@{k}": c["value"] for k, c in shares.items()}
            for kind in ("lenient", "strict"):
                bars.add_data(f"{name}, {kind}", columns[f"{kind}_accuracy"]["value"])
        kept = self.measured.items()
        answers = pd.DataFrame([{"measurement": k} | row for k, rows in kept for row in rows[:50]])
        summary["eval/answers"] = wandb.Table(dataframe=answers)
        wandb.run.summary.update(summary)
        title = "Test accuracy: right anywhere (lenient), right inside the tags (strict)"
        wandb.log({"eval/chart": wandb.plot.bar(bars, "measurement", "accuracy", title=title)})


def write_card(args: GRPOConfig, model_name: str) -> None:
    """Write the model card, README.md: model, data, command, and the evaluation if there is one."""
    on_hub = {"base_model": model_name, "datasets": args.dataset_name}
    on_hub = {key: name for key, name in on_hub.items() if not os.path.exists(name)}
    out, command = Path(args.output_dir), shlex.join(["python", "grpo_demo.py", *sys.argv[1:]])
    library = "peft" if (out / "adapter_config.json").exists() else "transformers"
    data = ModelCardData(**on_hub, library_name=library, tags=["trl", "grpo"])
    lines = [f"---\n{data.to_yaml()}\n---", f"# {out.name}"]
    lines += [f"The model `{model_name}`, trained with GRPO on the data `{args.dataset_name}`:"]
    lines += [
        f"    {command}",
        f"The script is willccbb's {GIST}, updated to TRL {trl.__version__}.",
    ]
    if (out / "evaluation.json").exists():
        result = json.loads((out / "evaluation.json").read_text())
        header, *rows = measure.table(result["measurements"], "{:.1%} [{:.1%}, {:.1%}]")
        rows = [header, ["---"] * len(header), *rows]
        lines += ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
        lines += ["Test questions, greedy answers; in brackets 95% intervals."]
        lines += [f"Learned: {result['verdict']}.", *result["sentences"]]
    (out / "README.md").write_text("\n\n".join(lines) + "\n")
