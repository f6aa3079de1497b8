"""GRPO on GSM8K in one script: willccbb's `grpo_demo.py`, updated to TRL 1.16.

    pip install -r requirements.txt
    python grpo_demo.py --config assets/tiny/config.yaml    # laptop: no GPU, network or account
    python grpo_demo.py                                     # one CUDA GPU: Qwen2.5-1.5B on GSM8K
    python grpo_demo.py --config assets/cards/16gb.yaml     # for cards of 16, 24, 48 or 80 GB
    python grpo_demo.py --estimate_memory                   # what fits which card; needs no GPU
    python grpo_demo.py --use_peft                          # with the gist's LoRA adapter
    python grpo_demo.py --use_vllm                          # after pip install vllm==0.31.0
    python grpo_demo.py --dataset_name DIR --model_name_or_path DIR     # local data, local model
    python grpo_demo.py --eval_only --model_name_or_path DIR            # evaluate a saved model
    accelerate launch --num_processes 2 grpo_demo.py --gradient_accumulation_steps 32  # two GPUs

Every constant below, except the prompt's texts, is also a flag and a YAML key (`--config FILE`), in
lower case; so is every field of TRL's GRPOConfig and ModelConfig.

GRPO in six lines (arXiv 2402.03300; `tests/test_step.py` writes the whole step out, without TRL,
which computes it in GRPOTrainer._compute_loss):

    For each prompt, the model samples a group of G completions; each gets a reward r.
    Its advantage is A = (r - mean of the group) / (std of the group + 1e-4).
    For each token, ratio = p / p.detach(), which is 1, but has the gradient of log p;
    kl = p_ref / p - log(p_ref / p) - 1, where p_ref is the untrained model's probability.
    loss = -mean over completions of (mean over tokens of (ratio * A - beta * kl)).
    Then the gradient is clipped to norm 0.1 and AdamW takes one step.

The training step matches the gist's on TRL 0.14. These differences change what is computed:

 1. Norm layers get no weight decay (transformers 5). In bf16 that decay rounded to nothing anyway.
 2. Prompts over 256 tokens are kept whole; the gist cut them. GSM8K has none.
 3. Rows without a numeric `#### answer` are left out; the gist trained on them. GSM8K has none.
 4. sdpa attention if flash-attn is not installed; the gist required flash-attn.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.17.0", "trl==1.16.0", "datasets==5.2.0",
#     "peft==0.21.2", "accelerate==1.15.0", "wandb==0.31.0"]
# ///

import json
import logging
import os
import signal
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

# Model and data
MODEL_NAME_OR_PATH = "Qwen/Qwen2.5-1.5B-Instruct"  # a hub id or a local directory
DTYPE = "bfloat16"  # of the weights and of Adam's state, as in the gist
ATTN_IMPLEMENTATION = None  # None: flash_attention_2 if installed, else sdpa
DATASET_NAME = "openai/gsm8k"  # a hub id, or a folder with train.jsonl and test.jsonl
DATASET_CONFIG = "main"  # of the hub dataset
ONE_SHOT = False  # True: put the gist's example between system prompt and question
MAX_PROMPT_LENGTH = 256  # tokens; longer prompts are reported (GSM8K's longest: 247)
OUTPUT_DIR = "outputs/Qwen-1.5B-GRPO"  # checkpoints, completions, W&B files, the trained model
RUN_NAME = "Qwen-1.5B-GRPO-gsm8k"  # in W&B

# Generation: 64 completions a step, in one call
NUM_GENERATIONS = 16  # G, completions per prompt: the group
PER_DEVICE_TRAIN_BATCH_SIZE = 1  # completions per backward pass; 1 fits 24 GB, more is faster
GRADIENT_ACCUMULATION_STEPS = 64  # batch size x this = 64 completions a step; keep the product
GRADIENT_CHECKPOINTING = False  # True: same numbers, less memory, slower
MAX_COMPLETION_LENGTH = 786  # tokens; a longer answer is cut and loses its closing tags
TEMPERATURE = 1.0  # divides the logits in the loss; does not change sampling
GENERATION_KWARGS = {"temperature": 0.9}  # of sampling
TOP_K = 50  # transformers' default at the time (Qwen's own file says 20)
TOP_P = 1.0  # off, as in the gist (Qwen's own file says 0.8)
REPETITION_PENALTY = 1.0  # off, as in the gist (Qwen's own file says 1.1)

# Loss
BETA = 0.04  # weight of the KL penalty (TRL's default is now 0)
LOSS_TYPE = "grpo"  # mean over each completion's tokens, then over completions
SCALE_REWARDS = "group"  # divide advantages by the group's standard deviation
USE_BIAS_CORRECTION_KL = False  # plain k3 estimator of the KL (TRL's default is now True)
VLLM_IMPORTANCE_SAMPLING_CORRECTION = False  # True would weight by p(1.0) / p(0.9, top 50)

# Optimizer
OPTIM = "adamw_torch"  # AdamW
LEARNING_RATE = 5e-6  # peak
ADAM_BETA1 = 0.9  # decay of the mean of gradients
ADAM_BETA2 = 0.99  # decay of the mean of squared gradients
WEIGHT_DECAY = 0.1  # on matrices, not on norms and biases
WARMUP_STEPS = 0.1  # share of all steps; the first step has learning rate 0
LR_SCHEDULER_TYPE = "cosine"  # down to 0
MAX_GRAD_NORM = 0.1  # gradients are clipped to this norm
NUM_TRAIN_EPOCHS = 1  # 7,473 prompts, 4 a step: 1,868 steps
BF16 = True  # autocast; changes little if the weights are bf16
SEED = 42  # of sampling and of the data's order

# LoRA, with --use_peft (defined and switched off in the gist)
LORA_R = 16  # rank
LORA_ALPHA = 64  # scale: alpha / rank
LORA_DROPOUT = 0.05  # on the adapter's input
LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]

# Evaluation on the test split, before training (zero-shot and one-shot) and after
EVALUATE = True  # False: train only
EVAL_SAMPLES = 0  # questions; 0: all (1,319 in GSM8K)
PER_DEVICE_EVAL_BATCH_SIZE = 128  # questions per generate call
EVAL_GENERATIONS = 0  # answers sampled per question too, for pass@k; 0: none

# Logging and saving
REPORT_TO = "wandb"  # "none": off. Without a W&B key the run is kept offline
PROJECT = "grpo-demo"  # in W&B; the environment variable WANDB_PROJECT wins
LOGGING_STEPS = 1  # steps between log lines
LOG_ON_EACH_NODE = False  # with several machines, only the first one logs
LOG_COMPLETIONS = True  # all completions of a step, to W&B and to a parquet file
NUM_COMPLETIONS_TO_PRINT = 0  # of them in TRL's own table in the terminal, every step
PRINT_STEPS = 10  # steps between samples in the terminal; 0: none
SAVE_STEPS = 100  # steps between checkpoints; the same command resumes from the last one
SAVE_TOTAL_LIMIT = 2  # checkpoints kept (the gist kept all 19, about 9 GB each)
LOGGING_NAN_INF_FILTER = False  # a loss that is not finite is shown, and stops the run

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
ONE_SHOT_REASONING = "9 is divisble by 3 and 8 is divisible by 2, but 7 is prime."  # as in the gist

if __name__ == "__main__":  # --help and what is missing or wrong: before the packages load
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while they load: no traceback
    packages = ["torch", "transformers", "trl", "datasets", "peft", "accelerate", "wandb"]
    if missing := [name for name in packages if not find_spec(name)]:  # all, not one by one
        print(f"error: no {', '.join(missing)}: pip install -r requirements.txt", file=sys.stderr)
        sys.exit(2)
    from assets.settings import look_first

    look_first(globals())
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads sleep
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # after a short spin: kind to a busy machine

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, load_dataset, load_from_disk
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.hf_argparser import HfArgumentParser
from transformers.utils import find_adapter_config_file, is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config

import rewards
from assets import resume, settings, terminal, wandb_run
from assets.common import UserError, as_user_error, first_process, print_error, print_once
from assets.evaluate import Evaluation, watch_ends, write_card


def setting(constant: object, text: str) -> object:
    """Return a field of DemoConfig: its default, and what `--help` says of it."""
    return field(default=constant, metadata={"help": text})


@dataclass
class DemoConfig(GRPOConfig):
    """TRL's GRPOConfig and this script's own flags."""

    dataset_name: str = setting(DATASET_NAME, "Dataset: a hub id, or a local folder.")
    dataset_config: str | None = setting(DATASET_CONFIG, "Configuration of a dataset on the hub.")
    one_shot: bool = setting(ONE_SHOT, "Put the gist's example into every prompt.")
    max_prompt_length: int = setting(MAX_PROMPT_LENGTH, "Report prompts with more tokens.")
    evaluate: bool = setting(EVALUATE, "Measure test accuracy before and after training.")
    eval_samples: int = setting(EVAL_SAMPLES, "Number of test questions; 0: all.")
    eval_generations: int = setting(EVAL_GENERATIONS, "Samples per question for pass@k; 0: none.")
    eval_only: bool = setting(False, "Only measure the test accuracy of a model; do not train.")
    estimate_memory: bool = setting(False, "Only print how much GPU memory a step takes.")
    print_steps: int = setting(PRINT_STEPS, "Show a sample every so many steps; 0: never.")
    overwrite_output: bool = setting(False, "Move an old run in the output directory aside.")

    def __post_init__(self):
        """Refuse what TRL and transformers would refuse less clearly, too late, or not at all."""
        self.use_cpu = self.use_cpu or self.estimate_memory
        settings.check_values(vars(self))
        settings.check_gpu(self)
        try:
            super().__post_init__()
        except ValueError as error:
            if "divisible by num_generations" not in str(error):
                raise
            factors = "per_device_train_batch_size x gradient_accumulation_steps x processes"
            raise ValueError(f"{error} Unless set, generation_batch_size is {factors}") from error
        settings.check_tools(self)

    @property
    def device(self) -> torch.device:
        """The device; "cpu", not "cpu:0", which torch.load would not know when a run resumes."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def parse_args(argv: list[str] | None = None) -> tuple[DemoConfig, ModelConfig]:
    """Return the settings: the constants, overridden by `--config FILE`, overridden by flags.

    UserError names an unknown flag or YAML key, a bad value, or a combination that TRL refuses.
    """
    values = settings.read(sys.argv[1:] if argv is None else argv, globals())
    with as_user_error("settings", TypeError, ImportError):  # such as deepspeed, not installed
        return HfArgumentParser((DemoConfig, ModelConfig)).parse_dict(values)


def make_prompt(question: str, one_shot: bool = ONE_SHOT) -> list[dict[str, str]]:
    """Return the messages: system prompt, the gist's example if `one_shot`, the question."""
    answer = XML_COT_FORMAT.format(reasoning=ONE_SHOT_REASONING, answer="7")
    example = [("user", ONE_SHOT_QUESTION), ("assistant", answer)] if one_shot else []
    messages = [("system", SYSTEM_PROMPT), *example, ("user", question)]
    return [{"role": role, "content": content} for role, content in messages]


def is_local(name: str) -> bool:
    """Return whether a model or dataset can only be a local path; openai/gsm8k is a hub id."""
    parent = os.path.dirname(name)
    here = os.path.join(os.path.dirname(__file__), name)  # the script may be started elsewhere
    return any(map(os.path.exists, (name, here, parent))) or "/" in parent or ".json" in name


def parse_row(line: str | dict) -> dict[str, str]:
    """Return question and gold answer of a JSON line or row; ValueError says what is missing."""
    try:
        row = json.loads(line) if isinstance(line, str) else line
    except (ValueError, RecursionError):
        raise ValueError("no JSON, or deeply nested") from None
    texts = [row.get(name) for name in ("question", "answer")] if isinstance(row, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("no text in 'question' and 'answer'")
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise ValueError("half a character")  # a lone surrogate, which is no Unicode text
    gold = rewards.extract_hash_answer(row["answer"])
    if gold is None or rewards.as_number(gold) is None:
        raise ValueError("no number after '####'")
    return {"question": row["question"], "answer": gold}


def read_split(name: str, config: str | None, split: str) -> Dataset | list[str]:
    """Return the rows of a dataset on the hub or on disk; of a jsonl file its lines, as texts.

    A folder holds jsonl, json, gz or parquet files, `config` too (as on the hub), or what
    `save_to_disk` wrote. A single file is the train split.
    """
    path = Path(name)
    if not is_local(name):
        return load_dataset(name, config, split=split)
    if (path / "dataset_dict.json").exists():
        return load_from_disk(path)[split]
    found = [file for place in (path, path / str(config)) for file in place.glob(f"{split}[.-]*")]
    files = [path] if path.is_file() and split == "train" else sorted(found)
    if not files:
        there = ", ".join(sorted(file.name for file in path.glob("*"))[:9]) or "no such files"
        raise FileNotFoundError(f"looked for {split}.jsonl, {split}*.parquet; found {there}")
    if len(files) == 1 and files[0].suffix not in (".gz", ".parquet", ".json"):
        lines = files[0].read_text("utf-8-sig", errors="replace").split("\n")
        return [line for line in lines if line.strip()]
    kind = "parquet" if files[0].suffix == ".parquet" else "json"
    return load_dataset(kind, data_files=[str(file) for file in files], split="train")


def get_gsm8k_questions(
    split: str = "train",
    dataset_name: str = DATASET_NAME,
    dataset_config: str | None = DATASET_CONFIG,
    one_shot: bool = ONE_SHOT,
) -> Dataset:
    """Return a split: columns prompt (messages), question and answer (the gold number, a string).

    Bad rows are left out and counted in one warning. ValueError if no row is left.
    """
    raw = read_split(dataset_name, dataset_config, split)
    rows, bad = [], Counter()
    for line in raw:
        try:
            row = parse_row(line)
            rows.append({"prompt": make_prompt(row["question"], one_shot)} | row)
        except ValueError as error:
            bad[str(error)] += 1
    reasons = "; ".join(f"{n} with {reason}" for reason, n in bad.items())
    if not rows:
        raise ValueError(f"no usable row: {reasons or 'it is empty'}")
    if bad:
        print_error(f"warning: {bad.total()} of {len(raw)} {split} rows left out: {reasons}")
    return Dataset.from_list(rows)


def load_model(args: DemoConfig, model_args: ModelConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """Return the model, as an instance like in the gist, and its tokenizer.

    A directory or hub id with a LoRA adapter gives its base model with that adapter, trainable.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if is_local(name) and not os.path.isdir(name):
        raise FileNotFoundError("no such folder")
    flash = is_flash_attn_2_available() and args.device.type == "cuda"
    attention = model_args.attn_implementation or ("flash_attention_2" if flash else "sdpa")
    adapter = find_adapter_config_file(name, revision=revision)
    auto = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = auto.from_pretrained(
        name,
        revision=revision,
        dtype=model_args.dtype,
        attn_implementation=attention,
        quantization_config=get_quantization_config(model_args),
        use_safetensors=True,
        **({"is_trainable": True} if adapter else {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token  # as in the gist
    return model.to(args.device), tokenizer


def build_trainer(
    args: DemoConfig,
    model_args: ModelConfig,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: Dataset,
    held_out: Dataset | None = None,
) -> GRPOTrainer:
    """Return the trainer with the five rewards and, with `--use_peft`, the LoRA adapter.

    held_out  questions for `--eval_strategy steps`: accuracy on them while training
    """
    if model_args.model_revision != "main":  # TRL loads the reference model by name
        args.model_init_kwargs = {"revision": model_args.model_revision}
    functions = [terminal.watch_reward(function) for function in rewards.REWARD_FUNCS]
    weights = args.reward_weights or [1.0] * len(functions)
    args.reward_weights = [*weights[: len(functions)], 0.0]
    trainer = GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=[*functions, rewards.lenient_accuracy],  # the last one only logs
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else get_peft_config(model_args),
    )
    if args.use_vllm and args.vllm_mode == "colocate":  # vLLM has set the seed to its own
        set_seed(args.seed + args.process_index // args.vllm_tensor_parallel_size)
    return trainer


def load_questions(args: DemoConfig, split: str, one_shot: bool = False) -> Dataset:
    """Return a split of the dataset; UserError says where it was looked for."""
    where = f"{args.dataset_name!r} (a hub id, or a folder; in {os.getcwd()})"
    where += " (--evaluate False needs none)" if split == "test" else ""
    with as_user_error(f"no split {split!r} in dataset {where}", KeyError):
        return get_gsm8k_questions(split, args.dataset_name, args.dataset_config, one_shot)


def prepare_trainer(
    args: DemoConfig, model_args: ModelConfig, rows: Dataset, held_out: Dataset | None = None
) -> GRPOTrainer:
    """Load the model and build the trainer; UserError for what does not load or fit together."""
    name = model_args.model_name_or_path
    where = f"{name!r} (a hub id, or a folder in {os.getcwd()})"
    if (file := Path(name, "adapter_config.json")).exists():
        where += f", an adapter of {json.loads(file.read_text())['base_model_name_or_path']!r}"
    with as_user_error(f"cannot load model {where}", ImportError):  # a package is missing
        model, tokenizer = load_model(args, model_args)
    rank = model.peft_config["default"].r if isinstance(model, PeftModel) else LORA_R
    if model_args.lora_r not in (LORA_R, rank):
        print_error(f"warning: --lora_r is ignored: the loaded adapter has rank {rank}")
    settings.check_template(args, tokenizer, make_prompt(rows["question"][0], one_shot=True))
    settings.check_stops(args, model, tokenizer)
    with as_user_error("TRL refuses these settings"):
        settings.check_prompts(args, model, tokenizer, rows)
        trainer = build_trainer(args, model_args, model, tokenizer, rows, held_out)
    settings.check_cast(trainer)
    return trainer


def build_evaluation(args: DemoConfig, model_args: ModelConfig) -> Evaluation:
    """Return the evaluation on the test split, or on its first `eval_samples` rows."""
    rows = load_questions(args, "test")
    rows = rows.select(range(min(args.eval_samples or len(rows), len(rows))))
    return Evaluation(args, model_args.model_name_or_path, rows, make_prompt)


def eval_only(args: DemoConfig, model_args: ModelConfig) -> None:
    """Evaluate a saved model, zero-shot and one-shot, in a folder of the output directory."""
    args.beta, args.log_completions, args.report_to = 0.0, False, []  # no reference model, no W&B
    evaluation = build_evaluation(args, model_args)
    trainer = prepare_trainer(args, model_args, evaluation.rows)
    config = resume.describe(args, model_args, SYSTEM_PROMPT, evaluation.rows)
    evaluation.out = first_process(lambda: resume.choose_evaluation(evaluation.out, config))
    terminal.print_banner(trainer)
    evaluation.evaluate(trainer, "zero_shot", one_shot=False)
    evaluation.evaluate(trainer, "one_shot", one_shot=True)
    evaluation.report()
    print_once(f"kept in {evaluation.out}")


def train(args: DemoConfig, model_args: ModelConfig) -> None:
    """Evaluate, train, save, evaluate again; or resume where an earlier run was stopped."""
    wandb_mode = wandb_run.find_mode(args)
    with as_user_error("rewards.py"):
        rewards.try_rewards(rewards.REWARD_FUNCS)  # on its examples
    rows = load_questions(args, "train", args.one_shot)
    evaluation = build_evaluation(args, model_args) if args.evaluate else None
    if len(rows) < (prompts := args.generation_batch_size // args.num_generations):
        raise UserError(f"{len(rows)} training rows do not fill a step of {prompts} prompts")
    held_out = evaluation and evaluation.rows
    config = resume.describe(args, model_args, SYSTEM_PROMPT, rows, held_out)
    with resume.claim_output(args, config) as (record, checkpoint):
        trainer = prepare_trainer(args, model_args, rows, held_out)
        trainer.create_model_card = lambda **_: None  # TRL's; `write_card` writes ours
        trainer.add_callback(terminal.Progress(trainer))
        trainer.add_callback(terminal.Health())
        trainer.add_callback(resume.StopAndResume(trainer, record, checkpoint))
        terminal.print_banner(trainer)
        wandb_run.open_run(args, config, record["wandb_id"], wandb_mode)
        if evaluation:
            evaluation.evaluate(trainer, "before_zero_shot", one_shot=False)
            evaluation.evaluate(trainer, "before_one_shot", one_shot=True)
        else:
            watch_ends(trainer)
        with suppress(resume.AtLastStep):  # it was stopped after its last step
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        if evaluation:
            after = "after_one_shot" if args.one_shot else "after_zero_shot"
            evaluation.evaluate(trainer, after, one_shot=args.one_shot)
        result = evaluation.report() if evaluation else None
        write_card(args, model_args.model_name_or_path, result)
    print_once(terminal.TALK.format(args.output_dir))


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exit status 0 when done, 2 with one line for an error to fix."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tied = "lm_head.weight"  # not in a checkpoint if tied: transformers warns when a run resumes
    logging.getLogger("transformers.trainer").addFilter(lambda r: tied not in r.getMessage())
    disable_progress_bar()  # of loading weights
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may lack a character of a completion
    try:
        args, model_args = parse_args(argv)
        if args.estimate_memory:
            from assets import memory  # which no training run needs

            memory.report(args, model_args)
        elif args.eval_only:
            eval_only(args, model_args)
        else:
            train(args, model_args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        out_of_memory = should_reduce_batch_size(error)
        if os.environ.get("TRACEBACK") or not (out_of_memory or isinstance(error, UserError)):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print_error(terminal.OUT_OF_MEMORY if out_of_memory else f"error: {text}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
