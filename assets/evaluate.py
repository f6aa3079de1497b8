"""Evaluate a model on the test questions: generate, score, keep, decide, report; the model card."""

import math
import os
import shlex
import sys
import textwrap
from contextlib import nullcontext
from copy import copy
from pathlib import Path

import pandas as pd
import torch
import trl
from accelerate.utils import gather_object
from huggingface_hub import ModelCardData
from tqdm import tqdm
from transformers import GenerationConfig

from assets.resume import on_first_process, write_json
from assets.settings import print_error, print_once
from assets.watch import log_evaluation
from rewards import score

MEASURES = [*score("", ""), "truncated", "tokens"]  # shares of the answers, and a mean
GAINS = ["strict_accuracy", "soft_format", "strict_format"]
Z = 1.96  # standard errors on each side of a 95% interval


def generate(trainer, prompts: list[list[dict]], greedy: bool = True) -> list[dict]:
    """Answer prompts, lists of messages, by TRL's own generation; all processes get all answers."""
    accelerator, twin = trainer.accelerator, copy(trainer)
    twin.use_transformers_continuous_batching, twin.args = False, copy(trainer.args)
    twin.args.report_to = []  # W&B has TRL's timers of training only
    engine = trainer.vllm_generation if trainer.use_vllm else twin
    sampling, ends = engine.generation_kwargs, trainer.eos_token_ids
    if greedy and trainer.use_vllm:
        plain = {"temperature": 0.0, "repetition_penalty": 1.0}
        engine.generation_kwargs = plain | {"stop_token_ids": ends}
    elif greedy:
        plain = {"do_sample": False, "max_new_tokens": trainer.max_completion_length}
        plain |= {"eos_token_id": ends, "pad_token_id": trainer.processing_class.pad_token_id}
        twin.generation_kwargs = plain
        twin.generation_config = GenerationConfig(**plain, num_beams=1, disable_compile=True)
    trainer.model.eval()
    filler = prompts[:1] * (-len(prompts) % accelerator.num_processes)  # equal shares
    precision = nullcontext() if trainer.use_vllm else accelerator.autocast()  # bf16 if --bf16
    with accelerator.split_between_processes(prompts + filler) as shard, precision:
        made = twin._generate_single_turn(trainer._tokenize_prompts(shard)[0], None, {}, 1)[0]
    engine.generation_kwargs = sampling
    return gather_object([read_tokens(trainer, tokens) for tokens in made])[: len(prompts)]


def read_tokens(trainer, tokens: list[int]) -> dict:
    """Return the text before the first stop token, the length with it, and if there is none."""
    end = next((i for i, token in enumerate(tokens) if token in trainer.eos_token_ids), None)
    text = trainer.processing_class.decode(tokens[:end], skip_special_tokens=True)
    length = len(tokens) if end is None else end + 1
    return {"completion": text, "tokens": length, "truncated": end is None}


class Evaluation:
    """Answers to `rows` (question, answer), kept with the run; make_prompt returns messages."""

    def __init__(self, args: trl.GRPOConfig, model_name: str, rows, make_prompt):
        self.args, self.model, self.rows, self.make_prompt = args, model_name, rows, make_prompt
        self.out, self.answers, self.sampled = Path(args.output_dir), {}, {}

    def evaluate(self, trainer, name: str, one_shot: bool) -> list[dict]:
        """Return greedy answers to all questions; sample some too if `eval_generations` is set."""
        answers = self.answers[name] = self.answer(trainer, name, one_shot, samples=0)
        if n := self.args.eval_generations:
            self.sampled[name] = self.answer(trainer, name, one_shot, samples=n)
        return answers

    def answer(self, trainer, name: str, one_shot: bool, samples: int) -> list[dict]:
        """Return `samples` sampled answers a question, or a greedy one; a file keeps each batch."""
        args, title = self.args, f"{'sample' if samples else 'evaluate'} {name}"
        path = self.out / "evaluation" / f"{name}{'_sampled' if samples else ''}.parquet"
        pairs = zip(self.rows["question"], self.rows["answer"], strict=True)
        pairs = [pair for pair in pairs for _ in range(samples or 1)]
        answers = on_first_process(lambda: read_answers(path, pairs))
        print_once(f"{title}: {len(pairs)} answers, of which {len(answers)} are kept")
        size = args.per_device_eval_batch_size * args.world_size
        hidden = args.disable_tqdm or args.process_index > 0 or None  # None: if in no terminal
        for done in tqdm(range(len(answers), len(pairs), size), title, leave=False, disable=hidden):
            batch = pairs[done : done + size]
            prompts = [self.make_prompt(question, one_shot) for question, _ in batch]
            # Random numbers of its own: training is the same with and without an evaluation
            with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
                torch.manual_seed(args.seed + done + args.process_index)
                made = generate(trainer, prompts, greedy=not samples)
            for (question, gold), row in zip(batch, made, strict=True):
                scores = score(row["completion"], gold)
                answers.append({"question": question, "gold": gold} | row | scores)
            if args.process_index == 0:  # renamed when it is whole: never half a file
                path.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(answers).to_parquet(path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
        return answers

    def report(self) -> dict:
        """Print the table and, after training, the verdict; keep both in `evaluation.json`, W&B."""
        names = ("dataset_name", "max_completion_length", "seed", "output_dir", "use_vllm")
        settings = {"model": self.model} | {name: getattr(self.args, name) for name in names}
        measured = {name: summarize(answers) for name, answers in self.answers.items()}
        result = {"settings": settings | {"decoding": "greedy"}, "measurements": measured}
        print_once(f"\n{table(measured)}")
        if n := self.args.eval_generations:
            from assets.tools import pass_at_k

            result["pass"], lines, sentence = pass_at_k.report(self.sampled, n)
            print_once("\n".join(lines))
        if len(measured) == 3:
            *untrained, after = self.answers.values()
            before, control = untrained[:: -1 if "after_one_shot" in measured else 1]
            result |= decide(before=before, control=control, after=after)
            result["sentences"] = explain(result, measured) + ([sentence] if n else [])
            for text in (f"\nlearned: {result['verdict']}", *result["sentences"]):
                print_once(textwrap.fill(text, 80, replace_whitespace=False))
        on_first_process(lambda: write_json(self.out / "evaluation.json", result))
        log_evaluation(result, self.answers)
        return result


def read_answers(path: Path, pairs: list[tuple[str, str]]) -> list[dict]:
    """Return the answers kept in a file, scored anew; [] if they are not the first to `pairs`."""
    try:
        answers = pd.read_parquet(path).to_dict("records") if path.exists() else []
        same = [(row["question"], row["gold"]) for row in answers] == pairs[: len(answers)]
        return [row | score(row["completion"], row["gold"]) for row in answers if same]
    except Exception as error:  # whatever a library makes of a damaged file
        print_error(f"warning: {path} is damaged, measured again: {error}")
        return []


def share_interval(answers: list[dict], measure: str) -> dict:
    """Return a share (0 to 1), n of answers, and its 95% interval: low, high (Wilson 1927)."""
    n = len(answers)
    p, zz = sum(answer[measure] for answer in answers) / n, Z * Z / n
    center, half = p + zz / 2, Z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    low, high = (center - half) / (1 + zz), (center + half) / (1 + zz)
    return {"value": p, "n": n, "low": low, "high": high}


def mean_interval(values: list[float]) -> dict:
    """Return a mean and +- 1.96 standard errors."""
    n, mean = len(values), sum(values) / len(values)
    half = Z * math.sqrt(sum((x - mean) ** 2 for x in values)) / n
    return {"value": mean, "n": n, "low": mean - half, "high": mean + half}


def paired_interval(measure: str, before: list[dict], after: list[dict]) -> dict:
    """Return the difference of two shares on the same questions (Agresti and Min 2005)."""
    changes = [int(a[measure]) - int(b[measure]) for b, a in zip(before, after, strict=True)]
    n, center = len(changes), sum(changes) / (len(changes) + 2)
    half = Z * math.sqrt(((sum(map(abs, changes)) + 1) / (n + 2) - center**2) / (n + 2))
    low, high = max(-1.0, center - half), min(1.0, center + half)
    return {"value": sum(changes) / n, "n": n, "low": low, "high": high}


def summarize(answers: list[dict]) -> dict[str, dict]:
    """Return each figure of a measurement with its interval: five shares, and the mean tokens."""
    shares = {measure: share_interval(answers, measure) for measure in MEASURES[:-1]}
    return shares | {"tokens": mean_interval([answer["tokens"] for answer in answers])}


def decide(*, before: list[dict], control: list[dict], after: list[dict]) -> dict:
    """Divide the gain in strict accuracy from `before`, untrained; `control` has the other prompt.

    Reasoning is the gain in lenient accuracy over the better of the two untrained prompts, format
    is the rest. A part counts as learned if its 95% interval lies above zero; for the format, that
    of soft or strict format.
    """
    gain = {name: paired_interval(name, before, after) for name in GAINS}
    shares = [share_interval(rows, "lenient_accuracy")["value"] for rows in (before, control)]
    best = before if shares[0] > shares[1] else control
    gain["reasoning"] = paired_interval("lenient_accuracy", best, after)
    gain["format"] = gain["strict_accuracy"]["value"] - gain["reasoning"]["value"]
    low = max(gain["soft_format"]["low"], gain["strict_format"]["low"])
    learned = ["format"] * (low > 0) + ["reasoning"] * (gain["reasoning"]["low"] > 0)
    verdict = " and ".join(learned) or "neither"
    return {"verdict": verdict, "gain": gain, "best_untrained": max(shares)}


def explain(result: dict, measured: dict[str, dict]) -> list[str]:
    """Return what `decide` found in three sentences."""
    after, gains = list(measured)[-1], result["gain"]
    before = measured[after.replace("after", "before")]

    def change(name: str, start: float, gain: dict) -> str:
        points = "{value:+.1%} points [{low:+.1%}, {high:+.1%}]".format(**gain).replace("%", "")
        return f"{start:.1%} to {measured[after][name]['value']:.1%} ({points})"

    strict, soft, form = (change(name, before[name]["value"], gains[name]) for name in GAINS)
    lenient = change("lenient_accuracy", result["best_untrained"], gains["reasoning"])
    shot, rest = measured["before_one_shot"]["strict_accuracy"]["value"], 100 * gains["format"]
    return [
        f"Strict accuracy: {strict}; untrained, with one example in the prompt: {shot:.1%}.",
        f"Due to reasoning: lenient accuracy from the better untrained prompt, {lenient}.",
        f"Due to format: the rest, {rest:+.1f} points; soft format {soft}, strict format {form}.",
    ]


def table(measured: dict[str, dict]) -> str:
    """Return a text: a row for each figure, with its interval; a column for each measurement."""
    columns = list(measured.values())
    head = f"{columns[0]['tokens']['n']} questions"
    text = f"{head:<17}" + "".join(f"{name:>20}" for name in measured)
    for name in MEASURES:
        form = "{value:.1%} [{low:.0%}, {high:.0%}]".replace("%", "f" if name == "tokens" else "%")
        cells = (form.format(**figures[name]) for figures in columns)
        text += f"\n{name:<17}" + "".join(f"{cell:>20}" for cell in cells)
    return text.replace("_", " ")


def write_card(args: trl.GRPOConfig, model_name: str, result: dict | None) -> None:
    """Write the model card, README.md: model, data, command, and `report`'s result if any."""
    used = {"base_model": model_name, "datasets": args.dataset_name}
    on_hub = {key: name for key, name in used.items() if not os.path.exists(name)}
    command = shlex.join(["python", "grpo_demo.py", *sys.argv[1:]])
    text = f"---\n{ModelCardData(**on_hub, tags=['trl', 'grpo']).to_yaml()}\n---\n\nThe model "
    text += f"`{model_name}`, trained on `{args.dataset_name}` by TRL {trl.__version__}:\n\n"
    text += f"    {command}\n"
    if result:
        lines = [f"Learned: {result['verdict']}.", *result["sentences"]]
        text += f"\n```\n{table(result['measurements'])}\n```\n" + "\n\n".join(lines) + "\n"
    if args.process_index == 0:  # surrogates: bytes of argv that the locale cannot read
        Path(args.output_dir, "README.md").write_text(text, "utf-8", "surrogateescape")
