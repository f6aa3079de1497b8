"""Evaluate a model on the test questions: generate, score, keep, decide, report; the model card."""

import math
import shlex
import sys
from contextlib import nullcontext
from copy import copy
from pathlib import Path

import pandas as pd
import torch
import trl
import wandb
from accelerate.utils import gather_object
from huggingface_hub import ModelCardData
from transformers import GenerationConfig

from assets.resume import on_first_process, write_json
from assets.settings import print_error, print_once
from rewards import score

MEASURES = [*score("", ""), "truncated", "tokens"]  # shares of the answers, and a mean
GAINS = ["strict_accuracy", "soft_format", "strict_format"]
Z = 1.96  # standard errors on each side of a 95% interval


def generate(trainer, prompts: list[list[dict]], greedy: bool = True) -> list[dict]:
    """Answer prompts, lists of messages, by TRL's own generation; all processes get all answers."""
    accelerator, twin, ends = trainer.accelerator, copy(trainer), trainer.eos_token_ids
    twin.use_transformers_continuous_batching, twin.args = False, copy(trainer.args)
    twin.args.report_to = []  # W&B has TRL's timers of training only
    if greedy and trainer.use_vllm:
        plain = {"temperature": 0.0, "repetition_penalty": 1.0, "stop_token_ids": ends}
        twin.vllm_generation = copy(trainer.vllm_generation)
        twin.vllm_generation.generation_kwargs = plain
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
        self.answers[name] = self.answer(trainer, name, one_shot, samples=0)
        if n := self.args.eval_generations:
            self.sampled[name] = self.answer(trainer, f"{name}_sampled", one_shot, samples=n)
        return self.answers[name]

    def answer(self, trainer, name: str, one_shot: bool, samples: int) -> list[dict]:
        """Return `samples` sampled answers a question, or a greedy one; a file keeps each batch."""
        args, path = self.args, self.out / "evaluation" / f"{name}.parquet"
        rows = zip(self.rows["question"], self.rows["answer"], strict=True)
        pairs = [pair for pair in rows for _ in range(samples or 1)]
        answers = on_first_process(lambda: read_answers(path, pairs))
        size = args.per_device_eval_batch_size * args.world_size
        for done in range(len(answers), len(pairs), size):
            print_once(f"{name}: {len(pairs) - done} answers to generate, {done} kept")
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
        measured = {
            name: {x: mean_interval([row[x] for row in rows], x != "tokens") for x in MEASURES}
            for name, rows in self.answers.items()
        }
        result = {"settings": settings | {"decoding": "greedy"}, "measurements": measured}
        if len(measured) == 3:
            *untrained, after = self.answers.values()
            before, control = untrained[:: -1 if "after_one_shot" in measured else 1]
            result |= decide_verdict(before=before, control=control, after=after)
        print_once(f"\n{show(result)}")
        if n := self.args.eval_generations:
            from assets.tools import pass_at_k

            result["pass"], text = pass_at_k.report(self.sampled, n)
            print_once(text)
        on_first_process(lambda: write_json(self.out / "evaluation.json", result))
        if wandb.run:
            names = pd.json_normalize({"eval": result}, sep="/").iloc[0].items()
            named = {k.replace("/measurements", "").removesuffix("/value"): v for k, v in names}
            wandb.run.summary.update(named)
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


def mean_interval(values: list[float], share: bool = False) -> dict:
    """Return the mean, n and the 95% interval, of a `share` of yes/no values Wilson's (1927)."""
    n, mean = len(values), sum(values) / len(values)
    variance, zz = sum((x - mean) ** 2 for x in values) / n, Z * Z / n if share else 0
    center, half = mean + zz / 2, Z * math.sqrt(variance / n + zz / (4 * n))
    low, high = (center - half) / (1 + zz), (center + half) / (1 + zz)
    return {"value": mean, "n": n, "low": low, "high": high}


def paired_interval(measure: str, before: list[dict], after: list[dict]) -> dict:
    """Return the difference of two shares on the same questions (Agresti and Min 2005)."""
    changes = [int(a[measure]) - int(b[measure]) for b, a in zip(before, after, strict=True)]
    n, center = len(changes), sum(changes) / (len(changes) + 2)
    half = Z * math.sqrt(((sum(map(abs, changes)) + 1) / (n + 2) - center**2) / (n + 2))
    low, high = max(-1.0, center - half), min(1.0, center + half)
    return {"value": sum(changes) / n, "n": n, "low": low, "high": high}


def decide_verdict(*, before: list[dict], control: list[dict], after: list[dict]) -> dict:
    """Divide the gain in strict accuracy from `before`, untrained; `control` has the other prompt.

    Reasoning is the gain in lenient accuracy over the better untrained prompt, format is the rest.
    A part is learned if its 95% interval lies above zero; for the format, soft's or strict's.
    """
    gain = {name: paired_interval(name, before, after) for name in GAINS}
    best = max(control, before, key=lambda rows: sum(row["lenient_accuracy"] for row in rows))
    gain["reasoning"] = paired_interval("lenient_accuracy", best, after)
    gain["format"] = gain["strict_accuracy"]["value"] - gain["reasoning"]["value"]
    low = max(gain["soft_format"]["low"], gain["strict_format"]["low"])
    learned = ["format"] * (low > 0) + ["reasoning"] * (gain["reasoning"]["low"] > 0)
    return {"verdict": " and ".join(learned) or "neither", "gain": gain}


def show(result: dict) -> str:
    """Return a table of all figures with their intervals; after training, the verdict and gains."""
    share, columns = "{value:.1%} [{low:.0%}, {high:.0%}]", {}
    forms = dict.fromkeys(MEASURES, share) | {"tokens": share.replace("%", "f")}
    for name, figures in result["measurements"].items():
        columns[name] = {x: form.format(**figures[x]) for x, form in forms.items()}
    frame = pd.DataFrame(columns).rename_axis(columns=f"{figures['tokens']['n']} questions")
    lines = [frame.to_string().replace("_", " ")]
    if "verdict" in result:
        lines += ["", f"learned: {result['verdict']}"]
        form = "gain in {name}: {value:+.1%} [{low:+.1%}, {high:+.1%}] points"
        gains = (form.format(name=x, **result["gain"][x]) for x in [*GAINS, "reasoning"])
        lines += [line.replace("%", "").replace("_", " ") for line in gains]
    return "\n".join(lines)


def write_card(args: trl.GRPOConfig, model_name: str, result: dict | None) -> None:
    """Write the model card, README.md: model, data, command, and `report`'s result if any."""
    used = {"base_model": model_name, "datasets": args.dataset_name}
    on_hub = {key: name for key, name in used.items() if not Path(name).exists()}
    text = f"---\n{ModelCardData(**on_hub, tags=['trl', 'grpo']).to_yaml()}\n---\n\nThe model "
    text += f"`{model_name}`, trained on `{args.dataset_name}` by TRL {trl.__version__}:\n\n"
    text += f"    {shlex.join(['python', 'grpo_demo.py', *sys.argv[1:]])}\n"
    text += f"\n```\n{show(result)}\n```\n" if result else ""
    if args.process_index == 0:  # surrogates: bytes of argv that the locale cannot read
        Path(args.output_dir, "README.md").write_text(text, "utf-8", "surrogateescape")
