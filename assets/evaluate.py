"""Evaluate a model on the test questions: generate, score, keep, report; and the model card."""

import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import ModelCardData
from tqdm import tqdm
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from assets import verdict, wandb_run
from assets.common import first_process, print_error, print_once, write_json
from assets.verdict import Answer
from rewards import score


def generate(trainer: GRPOTrainer, prompts: list[list[dict]], greedy: bool = True) -> list[dict]:
    """Generate for a batch of prompts, with the trainer's own backend and precision.

    The prompts are split over the processes, which all make the same calls, as ZeRO-3 and FSDP
    need. Greedy decoding takes no random numbers; else answers are sampled as in training.

    Returns a dict per prompt, in order and on every process: `completion` (text), `tokens` (with
    the token that ends the text), `truncated` (no end within the limit), `stray` (`cut_at_end`).
    """
    tokenizer, accelerator, answers = trainer.processing_class, trainer.accelerator, []
    backend = run_vllm if trainer.use_vllm else run_transformers
    extra = -len(prompts) % accelerator.num_processes
    trainer.model.eval()
    with accelerator.split_between_processes([*prompts, *prompts[:1] * extra]) as shard:
        ids = tokenizer.apply_chat_template(
            shard,
            chat_template=trainer.chat_template,
            add_generation_prompt=True,
            return_dict=True,
            **trainer.chat_template_kwargs,
        )["input_ids"]
        for tokens in backend(trainer, ids, greedy):
            inner, ended, stray = cut_at_end(trainer, tokens)
            text = tokenizer.decode(inner, skip_special_tokens=True)
            end = {"tokens": len(inner) + ended, "truncated": not ended, "stray": stray}
            answers.append({"completion": text, **end})
    return gather_object(answers)[: len(prompts)]


def cut_at_end(trainer: GRPOTrainer, tokens: list[int]) -> tuple[list[int], bool, str]:
    """Return a completion's tokens before its end, whether it has one, its first stray or ''.

    A stray is a special token before the end: generation should have stopped there.
    """
    ends = [i for i, token in enumerate(tokens) if token in trainer.eos_token_ids]
    inner = tokens[: ends[0]] if ends else tokens
    known = trainer.processing_class.added_tokens_decoder
    strays = (known[token].content for token in inner if token in known and known[token].special)
    return inner, bool(ends), next(strays, "")


def warn_of_strays(strays: list[str]) -> None:
    """Warn if completions go on after a stray; `strays` has that of each, or ''."""
    if found := [stray for stray in strays if stray]:
        what = f"{len(found)} of {len(strays)} completions go on after {found[0]}"
        print_error(f"warning: {what}: add its id to eos_token_id in generation_config.json")


def watch_ends(trainer: GRPOTrainer) -> None:
    """Let the trainer's last reward look at the completions of the first step for strays."""
    reward = trainer.reward_funcs[-1]

    def watched(completion_ids: list[list[int]], **kwargs) -> list[float]:
        trainer.reward_funcs[-1] = reward  # not again
        warn_of_strays([cut_at_end(trainer, ids)[2] for ids in completion_ids])
        return reward(**kwargs)

    trainer.reward_funcs[-1] = watched


def run_transformers(trainer: GRPOTrainer, ids: list[list[int]], greedy: bool) -> list[list[int]]:
    """Return the new tokens of each prompt; after the end there may be padding."""
    tokenizer, config = trainer.processing_class, trainer.generation_config
    if greedy:  # without a user's generation_kwargs, which may sample
        ends = {"eos_token_id": trainer.eos_token_ids, "pad_token_id": tokenizer.pad_token_id}
        ends["max_new_tokens"] = trainer.max_completion_length
        plain = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
        config = GenerationConfig(do_sample=False, disable_compile=True, **ends, **plain)
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    args, model, accelerator = trainer.args, trainer.model_wrapped, trainer.accelerator
    more = {"gradient_checkpointing_kwargs": args.gradient_checkpointing_kwargs}
    whole = unwrap_model_for_generation(model, accelerator, args.ds3_gather_for_generation, **more)
    shards = DistributedBackend(accelerator).summon_full_params(model, recurse=False)
    # Autocast as in training: before it, the model is not wrapped
    with whole as unwrapped, accelerator.autocast(), shards:
        made = unwrapped.generate(**batch.to(accelerator.device), generation_config=config)
    return made[:, batch["input_ids"].shape[1] :].tolist()


def run_vllm(trainer: GRPOTrainer, ids: list[list[int]], greedy: bool) -> list[list[int]]:
    """Return the new tokens of each prompt, from the trainer's engine with the present weights."""
    engine = trainer.vllm_generation
    options = engine.generation_kwargs
    if greedy:
        engine.generation_kwargs = {"temperature": 0.0, "repetition_penalty": 1.0}
    try:
        engine.sync_weights()
        _, made, _, _ = engine.generate(prompts=ids, images=None, num_generations=1)
    finally:
        engine.generation_kwargs = options
    return [list(tokens) for tokens in made]


class Evaluation:
    """The evaluation of one run on `rows` (columns question, answer), kept with the run."""

    def __init__(self, args: GRPOConfig, model_name: str, rows: Dataset, make_prompt: Callable):
        self.args, self.rows, self.make_prompt = args, rows, make_prompt
        self.out = Path(args.output_dir)
        names = ("dataset_name", "max_completion_length", "seed", "output_dir", "use_vllm")
        self.settings = {"model": model_name} | {name: getattr(args, name) for name in names}
        self.answers: dict[str, list[Answer]] = {}
        self.passed: dict[str, dict] = {}

    def evaluate(self, trainer: GRPOTrainer, name: str, one_shot: bool) -> list[Answer]:
        """Measure greedy answers to all questions, with an example if `one_shot`; return them.

        With `eval_generations` also pass@k: is one of k sampled answers right?
        """
        answers = self.answers[name] = self.answer(trainer, name, one_shot, samples=0)
        if len(self.answers) == 1:
            warn_of_strays([answer.get("stray", "") for answer in answers])
        if n := self.args.eval_generations:
            from assets import pass_at_k  # which no other run needs

            sampled = self.answer(trainer, name, one_shot, n)
            self.passed[name] = pass_at_k.summarize_samples(sampled, n)
        return answers

    def answer(self, trainer: GRPOTrainer, name: str, one_shot: bool, samples: int) -> list[Answer]:
        """Generate and score `samples` sampled answers to every question; with 0, a greedy one.

        They are kept in `evaluation/<name>.parquet` after each batch, so a resumed run goes on from
        there. Sampling has random numbers of its own: training is the same with and without it.
        """
        args, title = self.args, f"{'sample' if samples else 'evaluate'} {name}"
        path = self.out / "evaluation" / f"{name}{'_sampled' if samples else ''}.parquet"
        pairs = zip(self.rows["question"], self.rows["answer"], strict=True)
        pairs = [pair for pair in pairs for _ in range(samples or 1)]
        answers = first_process(lambda: read_answers(path, pairs))
        kept, start = len(answers), time.time()
        hidden = args.disable_tqdm or args.process_index > 0 or not sys.stderr.isatty()
        bar = tqdm(desc=title, total=len(pairs), initial=kept, leave=False, disable=hidden)
        while len(answers) < len(pairs):
            done = len(answers)
            batch = pairs[done : done + args.per_device_eval_batch_size * args.world_size]
            prompts = [self.make_prompt(question, one_shot) for question, _ in batch]
            with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
                torch.manual_seed(args.seed + done + args.process_index)
                made = generate(trainer, prompts, greedy=not samples)
            for (question, gold), row in zip(batch, made, strict=True):
                scores = score(row["completion"], gold)
                answers.append({"question": question, "gold": gold, **row, **scores})
            if args.process_index == 0:  # with an atomic rename: never a partial file
                path.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(answers).to_parquet(path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
            bar.update(len(batch))
        bar.close()
        if len(answers) > kept:
            print_once(f"{title}: {len(answers) - kept} answers in {time.time() - start:.0f} s")
        return answers

    def report(self) -> dict:
        """Print the table and, after training, the verdict; keep both in `evaluation.json`, W&B."""
        measured = {name: verdict.summarize(answers) for name, answers in self.answers.items()}
        result = {"settings": self.settings | {"decoding": "greedy"}, "measurements": measured}
        print_once()
        for name, *cells in verdict.table(measured, "{value:.1%} [{low:.0%}, {high:.0%}]"):
            print_once(f"{name:<17}" + "".join(f"{text:>20}" for text in cells))
        if self.passed:
            from assets import pass_at_k

            result["pass"] = self.passed
            print_once("\n".join(pass_at_k.table(self.passed)))
        if len(measured) == 3:
            before, control, after = self.answers.values()
            if "after_one_shot" in measured:
                before, control = control, before
            result |= verdict.decide(before=before, control=control, after=after)
            result["sentences"] = verdict.explain(result, measured)
            if self.passed:
                result["sentences"].append(pass_at_k.explain(self.passed))
            for text in (f"\nlearned: {result['verdict']}", *result["sentences"]):
                print_once(textwrap.fill(text, 80, replace_whitespace=False))
        if self.args.process_index == 0:
            write_json(self.out / "evaluation.json", result)
        wandb_run.log_evaluation(result, self.answers)
        return result


def read_answers(path: Path, pairs: list[tuple[str, str]]) -> list[Answer]:
    """Return the answers kept in a file, scored by the present rewards.py.

    An empty list if they are not to the first of these questions.
    """
    try:
        answers = pd.read_parquet(path).to_dict("records") if path.exists() else []
        answers = [answer | score(answer["completion"], answer["gold"]) for answer in answers]
        if answers:
            verdict.summarize(answers)  # all columns are there
    except Exception as error:  # whatever a library makes of a damaged file
        print_error(f"warning: {path} is damaged, measured again: {error}")
        return []
    kept = [(answer["question"], answer["gold"]) for answer in answers]
    return answers if kept == pairs[: len(kept)] else []


def write_card(args: GRPOConfig, model_name: str, result: dict | None) -> None:
    """Write the model card, README.md: model, data, command, and `report`'s result if any."""
    if args.process_index:
        return
    on_hub = {"base_model": model_name, "datasets": args.dataset_name}
    on_hub = {key: name for key, name in on_hub.items() if not os.path.exists(name)}
    out, command = Path(args.output_dir), shlex.join(["python", "grpo_demo.py", *sys.argv[1:]])
    library = "peft" if (out / "adapter_config.json").exists() else "transformers"
    data = ModelCardData(**on_hub, library_name=library, tags=["trl", "grpo"])
    gist = "[gist](https://gist.github.com/willccbb/4676755236bb08cab5f4e54a0475d6fb)"
    text = f"The model `{model_name}`, trained with GRPO on the data `{args.dataset_name}`:"
    lines = [f"---\n{data.to_yaml()}\n---", f"# {out.name}", text, f"    {command}"]
    lines += [f"The script is willccbb's {gist}, updated to TRL {trl.__version__}."]
    if result:
        header, *rows = verdict.table(result["measurements"], "{value:.1%} [{low:.1%}, {high:.1%}]")
        rows = [header, ["---"] * len(header), *rows]
        lines += ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
        lines += ["Test questions, greedy answers; in brackets 95% intervals."]
        lines += [f"Learned: {result['verdict']}.", *result["sentences"]]
    (out / "README.md").write_text("\n\n".join(lines) + "\n")
