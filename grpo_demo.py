"""GRPO on GSM8K in one script: willccbb's `grpo_demo.py` on today's TRL, from one 24 GB GPU down to a laptop.

    pip install -r requirements.txt
    python grpo_demo.py --config assets/tiny/config.yaml     # a laptop: 2 CPU cores, no network, no account, 2 minutes
    python grpo_demo.py                                      # one CUDA GPU: Qwen2.5-1.5B-Instruct on GSM8K
    python grpo_demo.py --use_peft                           # the same with the gist's LoRA adapter
    python grpo_demo.py --dataset_name DIR --model_name_or_path DIR          # local train.jsonl and test.jsonl, model
    python grpo_demo.py --eval_only --model_name_or_path DIR                 # measure a saved model
    accelerate launch --num_processes 2 grpo_demo.py --gradient_accumulation_steps 32      # two GPUs, the same step

Every constant below, but for the prompt's texts, is also a flag and a YAML key (`--config FILE`), with its name in
lower case; so is every field of TRL's GRPOConfig and ModelConfig. The file reads in the order in which a run happens.

But for 7 the optimizer step is the gist's (TRL 0.14) to round-off: `tests/test_step.py` writes it out. What differs:

 1. One generate call of 64 rows a step instead of four of 16: the same completions in law, less waiting.
 2. The micro-batch counts completions (TRL 1.16), not prompts; any micro-batch x accumulation = 64 is the same step.
 3. Prompts over 256 tokens are reported and kept whole; the gist cut off their beginning. In GSM8K there are none.
 4. sdpa attention where flash-attn is not installed; the gist required it.
 5. One sample a step is printed by TRL's `log_completions`, with gold and extracted answer; the gist used print.
 6. Rows without a numeric `#### answer` are left out and counted; the gist trained on them with gold None.
 7. Weight decay spares Qwen2's norms (transformers 5). The gist took 5e-7 of them a step; bf16 rounds that away.
 8. Metrics as TRL 1.16 defines them: `kl` is a mean over tokens (was: over sequences), `rewards/<name>/mean`.
 9. Two checkpoints are kept instead of all; the same command again resumes; the final model is saved.
10. Accuracy is measured before and after, and the gain is split into format and reasoning.
"""

import os
import sys
import warnings
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, for CPU runs: an idle thread that spins for long
os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # slows a busy machine, one that never spins a quiet one

import pandas as pd
import torch
import yaml
from accelerate.utils import gather_object
from datasets import Dataset, load_dataset
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import WandbCallback
from transformers.utils import is_flash_attn_2_available
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from assets.keep import (
    UserError,
    Watch,
    check_gpu,
    explain_full_disk,
    how_to_talk,
    open_output,
    print_banner,
    report,
    say,
    say_goodbye,
    start_wandb,
    usable_rows,
    write_atomically,
)
from rewards import REWARD_FUNCS, score

# Model and data
MODEL_NAME_OR_PATH = "Qwen/Qwen2.5-1.5B-Instruct"  # a hub id or a local directory
DTYPE = "bfloat16"  # weights and Adam state, as in the gist; updates below about 0.3% of a weight are rounded away
ATTN_IMPLEMENTATION = None  # None: flash_attention_2 where flash-attn and CUDA are there, else sdpa
DATASET_NAME = "openai/gsm8k"  # a hub id, or a folder with train.jsonl and test.jsonl (question, answer with ####)
DATASET_CONFIG = "main"  # of the hub dataset
ONE_SHOT = False  # True: put the gist's example pair between system prompt and question
MAX_PROMPT_LENGTH = 256  # longer prompts are reported; GSM8K's longest has 247 Qwen tokens
OUTPUT_DIR = "outputs/Qwen-1.5B-GRPO"  # checkpoints, completions, W&B files, final model (Llama-1B-GRPO for a Llama)
RUN_NAME = "Qwen-1.5B-GRPO-gsm8k"  # in W&B

# The 64 completions of a step
NUM_GENERATIONS = 16  # G, completions a prompt: the group whose mean reward is the baseline
PER_DEVICE_TRAIN_BATCH_SIZE = 1  # completions a backward pass. 24 GB: 5 x 3.1 GB (weights, reference, gradients,
GRADIENT_ACCUMULATION_STEPS = 64  # and Adam twice, in bf16) + 3.9 GB activations of 1,042 tokens = 19.3 GB; 2: 23.2
GRADIENT_CHECKPOINTING = False  # as the gist; True: the same, far smaller activations, one more forward pass
MAX_COMPLETION_LENGTH = 786  # tokens; a longer answer is cut and loses its closing tags
TEMPERATURE = 1.0  # of the log-probabilities in the loss: TRL 0.14 scored unscaled logits...
GENERATION_KWARGS = {"temperature": 0.9}  # ...and sampled at 0.9
TOP_K = 50  # transformers' default at the time. Explicit, as Qwen's own generation config says 20
TOP_P = 1.0  # Qwen's own: 0.8
REPETITION_PENALTY = 1.0  # Qwen's own: 1.1

# The loss
BETA = 0.04  # weight of the KL to the untrained model (TRL's default is 0 now)
LOSS_TYPE = "grpo"  # mean over each sequence's tokens, then over sequences (TRL's default is dapo now)
SCALE_REWARDS = "group"  # advantage = (reward - group mean) / (group std + 1e-4)
USE_BIAS_CORRECTION_KL = False  # plain k3 estimator (TRL's default is True now: another gradient)

# The optimizer
OPTIM = "adamw_torch"
LEARNING_RATE = 5e-6
ADAM_BETA1 = 0.9
ADAM_BETA2 = 0.99
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 0.1  # a share of all steps; the very first step has learning rate 0
LR_SCHEDULER_TYPE = "cosine"
MAX_GRAD_NORM = 0.1
NUM_TRAIN_EPOCHS = 1  # 7,473 prompts, 4 a step: 1,868 steps
BF16 = True  # autocast; with bf16 weights it changes little
SEED = 42

# LoRA, with --use_peft (the gist defines it and leaves it off)
LORA_R = 16
LORA_ALPHA = 64
LORA_DROPOUT = 0.05
LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]

# Evaluation, on the test split: before (zero-shot and one-shot) and after training
EVALUATE = True
EVAL_SAMPLES = 0  # questions; 0: all of them (1,319 in GSM8K)
PER_DEVICE_EVAL_BATCH_SIZE = 128  # questions a generate call

# Logging and saving
REPORT_TO = "wandb"  # "none" to switch off; without a W&B key the run is kept offline
PROJECT = "grpo-demo"  # in W&B; the environment variable WANDB_PROJECT wins
LOGGING_STEPS = 1
LOG_ON_EACH_NODE = False
LOG_COMPLETIONS = True  # the completions of a step: a W&B table, a parquet file...
NUM_COMPLETIONS_TO_PRINT = 1  # ...and one of them in the terminal
SAVE_STEPS = 100  # steps between checkpoints, from which the same command goes on
SAVE_TOTAL_LIMIT = 2  # checkpoints kept; the gist kept all nineteen, about 9 GB each
LOGGING_NAN_INF_FILTER = False  # a loss that is not finite is shown as it is, and stops the run

SYSTEM_PROMPT = """
Respond in the following format:

<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""
XML_COT_FORMAT = """\
<reasoning>
{reasoning}
</reasoning>
<answer>
{answer}
</answer>
"""
ONE_SHOT_QUESTION = "What is the largest single-digit prime number?"
ONE_SHOT_REASONING = "9 is divisble by 3 and 8 is divisible by 2, but 7 is prime."  # spelled as in the gist


@dataclass
class DemoConfig(GRPOConfig):
    """TRL's GRPOConfig and this script's own flags. Their defaults are the constants above."""

    dataset_name: str = field(default="", metadata={"help": "Hub id, or folder with train.jsonl and test.jsonl."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    one_shot: bool = field(default=False, metadata={"help": "Put the gist's example into the prompt."})
    max_prompt_length: int = field(default=0, metadata={"help": "Report prompts with more tokens than this."})
    evaluate: bool = field(default=True, metadata={"help": "Measure the test split before and after training."})
    eval_samples: int = field(default=0, metadata={"help": "Test questions to evaluate on; 0: all."})
    overwrite_output: bool = field(default=False, metadata={"help": "Move an old output directory aside."})
    eval_only: bool = field(default=False, metadata={"help": "Evaluate the model and do not train."})

    def __post_init__(self):
        if not self.use_cpu:
            check_gpu(self)
        super().__post_init__()


def parse_args(argv: list[str] | None = None) -> tuple[DemoConfig, ModelConfig]:
    """Settings of a run: the constants, overridden by `--config FILE`, overridden by flags.

    UserError names an unknown flag or YAML key, a bad value, or a combination that TRL refuses.
    """

    def error(message: str) -> None:  # argparse would print all 200 flags first
        raise UserError(message)

    argv = [*(sys.argv[1:] if argv is None else argv)]
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if argv[-1:] == ["--config"]:
        raise UserError("--config needs the name of a YAML file")
    parser = TrlParser([DemoConfig, ModelConfig], allow_abbrev=False, description=__doc__.replace("%", "%%"))
    parser.error = error
    # The constants become the defaults of the flags with their names; the others, as SYSTEM_PROMPT, are passed over
    parser.set_defaults_with_config(**{name.lower(): value for name, value in globals().items() if name.isupper()})
    try:
        args, model_args = parser.parse_args_and_config(argv)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as problem:
        raise UserError(f"settings: {problem}") from None
    if args.trust_remote_code or args.resume_from_checkpoint:
        raise UserError("no --trust_remote_code here, and no --resume_from_checkpoint: the same command again resumes")
    if "Llama" in model_args.model_name_or_path:  # as the gist
        args.output_dir, args.run_name = (x.replace("Qwen-1.5B", "Llama-1B") for x in (args.output_dir, args.run_name))
    return args, model_args


def make_prompt(question: str, one_shot: bool = ONE_SHOT) -> list[dict[str, str]]:
    """The conversation that asks `question`: system prompt, the gist's example pair if `one_shot`, the question."""
    example = [
        {"role": "user", "content": ONE_SHOT_QUESTION},
        {"role": "assistant", "content": XML_COT_FORMAT.format(reasoning=ONE_SHOT_REASONING, answer="7")},
    ]
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        *(example if one_shot else []),
        {"role": "user", "content": question},
    ]


def get_gsm8k_questions(
    split: str = "train",
    dataset_name: str = DATASET_NAME,
    dataset_config: str | None = DATASET_CONFIG,
    one_shot: bool = ONE_SHOT,
) -> Dataset:
    """One row a question: `prompt` (messages), `question`, `answer` (the gold number as written, a string).

    Unusable rows are left out, counted in one warning line. UserError where there is no such dataset, or no usable row.
    """
    try:
        if os.path.isdir(dataset_name):
            lines = Path(dataset_name, f"{split}.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
            rows = [line for line in lines if line.strip()]
        else:
            rows = load_dataset(dataset_name, dataset_config, split=split)
    except Exception as error:  # no network, no such name, no such file: the hub libraries raise many kinds
        where = f"dataset {dataset_name!r} (a hub id, or a folder with {split}.jsonl)"
        raise UserError(f"no split {split!r} in {where}: {error}") from None
    used, why = usable_rows(rows)
    if not used:
        raise UserError(f"no usable row in the {split} split of {dataset_name!r}: {why or 'it is empty'}")
    if why:
        say(f"warning: {len(rows) - len(used)} of {len(rows)} {split} rows left out: {why}", error=True)
    return Dataset.from_list(
        [{"prompt": make_prompt(question, one_shot), "question": question, "answer": gold} for question, gold in used]
    )


def load_model(args: DemoConfig, model_args: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as an instance, as in the gist, and its tokenizer; UserError where there is no such model."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    flash = is_flash_attn_2_available() and args.device.type == "cuda"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation or ("flash_attention_2" if flash else "sdpa"),
            quantization_config=get_quantization_config(model_args),
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load model {name!r} (a hub id, or a local directory): {error}") from None
    tokenizer.pad_token = tokenizer.eos_token  # as in the gist
    return model.to(args.device), tokenizer


def build_trainer(args: DemoConfig, model_args: ModelConfig, train_dataset: Dataset) -> GRPOTrainer:
    """TRL's GRPOTrainer with the model, the five rewards and, with `--use_peft`, the LoRA adapter.

    UserError where there is no such model, or where the data does not fill one step.
    """
    if len(train_dataset) < (prompts := args.generation_batch_size // args.num_generations):
        raise UserError(f"{len(train_dataset)} training rows do not fill a step of {prompts} prompts")
    model, tokenizer = load_model(args, model_args)
    if model_args.model_revision != "main":  # TRL loads the KL's reference again, by name
        args.model_init_kwargs = {"revision": model_args.model_revision}
    try:
        ids = tokenizer.apply_chat_template(train_dataset["prompt"][:], add_generation_prompt=True)["input_ids"]
        lengths = [len(prompt) for prompt in ids]
        if long := sum(n > args.max_prompt_length for n in lengths):
            over = f"{long} of {len(ids)} prompts have more than {args.max_prompt_length} tokens (up to {max(lengths)})"
            say(f"warning: {over}: kept whole, where the gist cut off the beginning", error=True)
        return GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=REWARD_FUNCS,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
    except (ValueError, ImportError, TemplateError) as error:  # no vLLM, no chat template, wrong reward weights
        raise UserError(f"TRL refuses these settings: {error}") from None


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokenizer, rows: Dataset, args: DemoConfig, name: str) -> list[dict]:
    """Greedy completions of all `rows` and what they are worth; sharded over the processes, gathered on each.

    `name` ends in `one_shot` where the gist's example goes into the prompt. Returns one row a question: question, gold
    answer, completion, `tokens`, `truncated` and the four true-or-false columns of `rewards.score`. Kept as
    `evaluation/<name>.parquet`, where a resumed run finds them. Greedy decoding: it draws no random numbers.
    """
    path = Path(args.output_dir, "evaluation", f"{name}.parquet")
    kept = pd.read_parquet(path).to_dict("records") if path.exists() else []
    if [(row["question"], row["gold"]) for row in kept] == list(zip(rows["question"], rows["answer"], strict=True)):
        return kept
    stops = model.generation_config.eos_token_id
    stops = [tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])]
    plain = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    plain |= {"max_new_tokens": args.max_completion_length, "eos_token_id": stops, "pad_token_id": stops[0]}
    mine, size, done = range(args.process_index, len(rows), args.world_size), args.per_device_eval_batch_size, []
    model.eval()
    for i in tqdm(range(0, len(mine), size), desc=f"evaluate {name}", disable=args.process_index != 0):
        prompts = [make_prompt(rows[j]["question"], name.endswith("one_shot")) for j in mine[i : i + size]]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(args.device)
        outputs = model.generate(**inputs, generation_config=GenerationConfig(**plain))
        for j, ids in zip(mine[i : i + size], outputs[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((k for k, token in enumerate(ids) if token in stops), None)  # None: cut off at the limit
            text = tokenizer.decode(ids[:end], skip_special_tokens=True)
            row = {"index": j, "question": rows[j]["question"], "gold": rows[j]["answer"], "completion": text}
            row |= {"tokens": len(ids) if end is None else end + 1, "truncated": end is None}
            done.append(row | score(text, rows[j]["answer"]))
    done = sorted(gather_object(done), key=lambda row: row["index"])
    if args.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(done).to_parquet(path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)  # there is the whole file or none
    return done


def evaluation_rows(args: DemoConfig) -> Dataset | None:
    """The test split, or its first `eval_samples` rows; None, with a warning, where it cannot be had."""
    try:
        rows = get_gsm8k_questions("test", args.dataset_name, args.dataset_config)
        return rows.select(range(min(args.eval_samples, len(rows)))) if args.eval_samples > 0 else rows
    except UserError as error:
        say(f"warning: no evaluation: {error}", error=True)


def eval_only(args: DemoConfig, model_args: ModelConfig) -> None:
    """`--eval_only`: measure a saved model, zero-shot and one-shot, into a new folder of the output directory."""
    args.output_dir = str(Path(args.output_dir, f"eval-{datetime.now():%Y%m%d-%H%M%S}"))
    if not (tests := evaluation_rows(args)):
        raise UserError("nothing to evaluate on")
    model, tokenizer = load_model(args, model_args)
    report({k: evaluate(model, tokenizer, tests, args, k) for k in ("zero_shot", "one_shot")}, args, model_args)
    say(f"kept in {args.output_dir}")


def train(args: DemoConfig, model_args: ModelConfig) -> None:
    """Measure, train, save, measure again; or go on where the run was stopped."""
    rows = get_gsm8k_questions("train", args.dataset_name, args.dataset_config, args.one_shot)
    config = vars(model_args) | args.to_sanitized_dict() | {"system_prompt": SYSTEM_PROMPT}
    with args.main_process_first(local=False):
        run, checkpoint = open_output(args, config, rows)
    trainer = build_trainer(args, model_args, rows)
    record = Path(args.output_dir, "run.json")
    if args.process_index == 0:
        write_atomically(record, run)
    watch = Watch(trainer, config, run["wandb_id"])
    trainer.remove_callback(WandbCallback)  # `watch` is one
    trainer.add_callback(watch)
    print_banner(trainer)
    tests, measured = evaluation_rows(args) if args.evaluate else None, {}
    for name in ("before_zero_shot", "before_one_shot") if tests else ():
        measured[name] = evaluate(trainer.model, trainer.processing_class, tests, args, name)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if not watch.signal and not watch.broken:
            trainer.save_model()
    except Exception as error:
        explain_full_disk(trainer, error)
        raise
    if watch.signal or watch.broken:
        again = "start anew: lower --learning_rate, --overwrite_output" if watch.broken else "the same command goes on"
        say_goodbye(args, f"stopped at step {trainer.state.global_step}; {again}")
        raise SystemExit(128 + watch.signal if watch.signal else 1)
    start_wandb(args, config, run["wandb_id"])  # where it was killed after the last step
    if tests:
        model = trainer.accelerator.unwrap_model(trainer.model)
        after = "after_one_shot" if args.one_shot else "after_zero_shot"  # with the prompt of the training
        measured[after] = evaluate(model, trainer.processing_class, tests, args, after)
        report(measured, args, model_args)
    if args.process_index == 0:
        write_atomically(record, run | {"finished": True})
    say_goodbye(args, how_to_talk(args))


def main(argv: list[str] | None = None) -> None:
    """The command line. Exit status 0 when done, 2 with one line for what a user can mend."""
    warnings.simplefilter("ignore", FutureWarning)  # transformers, about names that it and TRL use
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "160")  # in a log file TRL's table of a completion has room
    try:
        args, model_args = parse_args(argv)
        (eval_only if args.eval_only else train)(args, model_args)
    except UserError as error:
        say("error: " + " ".join(str(error).split()), error=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
