"""GRPO on GSM8K in one script: willccbb's `grpo_demo.py`, updated to TRL 1.16.

    pip install -r requirements.txt
    python grpo_demo.py --config assets/tiny/config.yaml    # laptop: no GPU, network or account
    python grpo_demo.py                                     # one CUDA GPU: Qwen2.5-1.5B on GSM8K
    python grpo_demo.py --config assets/cards/16gb.yaml     # for cards of 16, 24, 48 or 80 GB
    python grpo_demo.py --eval_only --model_name_or_path DIR    # evaluate a saved model

Each constant below, but the prompt's texts, is also a flag and a YAML key (`--config FILE`), in
lower case; so is each field of TRL's GRPOConfig and ModelConfig.

The training step is the gist's (assets/notes/differences.md). README says what it computes;
TRL does so in trl.GRPOTrainer._compute_loss; tests/test_step.py writes it out without TRL.
"""

import glob
import logging
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

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
TEMPERATURE = 1.0  # divides the logits in the loss; sampling has the next line
GENERATION_KWARGS = {"temperature": 0.9}  # of sampling, as in the gist, whose loss has none
TOP_K = 50  # transformers' default at the time (Qwen's own file says 20)
TOP_P = 1.0  # off, as in the gist (Qwen's own file says 0.8)
REPETITION_PENALTY = 1.0  # off, as in the gist (Qwen's own file says 1.1)

# Loss
BETA = 0.04  # weight of the KL penalty (TRL's default is now 0)
LOSS_TYPE = "grpo"  # mean over each completion's tokens, then over completions
SCALE_REWARDS = "group"  # divide advantages by the group's standard deviation
USE_BIAS_CORRECTION_KL = False  # plain k3 estimator of the KL (TRL's default is now True)
VLLM_IMPORTANCE_SAMPLING_CORRECTION = False  # True: tokens weighted by p(loss) / p(vLLM)

# Optimizer
OPTIM = "adamw_torch"  # AdamW
LEARNING_RATE = 5e-6  # peak; the gist's, for all weights (cards with LoRA: 1e-4)
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

if __name__ == "__main__":  # --help and misspelt flags, before the packages load (6 s)
    from assets import settings

    with settings.exit_on_error():
        settings.collect(sys.argv[1:], globals())

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file, is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, ModelConfig, get_peft_config, get_quantization_config

import rewards
from assets import resume, settings, watch
from assets.evaluate import Evaluation, write_card
from assets.settings import UserError, as_user_error, exit_on_error, print_error, print_once
from assets.trainer import GRPOTrainer, check_adapter, check_model

RESERVED = """prompt prompts completion completions completion_ids image images environment
    environments messages chosen rejected trainer_state log_extra log_metric"""  # columns, by TRL


@dataclass
class DemoConfig(GRPOConfig):
    """TRL's GRPOConfig and this script's own settings; the constants above say what each does."""

    dataset_name: str = DATASET_NAME
    dataset_config: str | None = DATASET_CONFIG
    one_shot: bool = ONE_SHOT
    max_prompt_length: int = MAX_PROMPT_LENGTH
    evaluate: bool = EVALUATE
    eval_samples: int = EVAL_SAMPLES
    eval_generations: int = EVAL_GENERATIONS
    print_steps: int = PRINT_STEPS
    eval_only: bool = field(default=False, metadata={"help": "Evaluate a model, do not train."})
    overwrite_output: bool = field(default=False, metadata={"help": "Move an old run aside."})

    def __post_init__(self):
        """Refuse what TRL and transformers would refuse too late, or not at all."""
        settings.check_values(self)
        if not self.use_cpu and not torch.cuda.is_available():
            raise UserError("no CUDA GPU found: on a laptop add --config assets/tiny/config.yaml")
        if self.bf16 and not (self.use_cpu or torch.cuda.is_bf16_supported(False)):  # no emulation
            raise UserError("the GPU has no bf16: add --config assets/cards/16gb.yaml")
        super().__post_init__()
        settings.check_tools(self)

    @property
    def device(self) -> torch.device:
        """The device; "cpu", not "cpu:0", which torch.load would not know when a run resumes."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def parse_args(argv: list[str] | None = None) -> tuple[DemoConfig, ModelConfig]:
    """Return the settings; UserError names an unknown one, or a value that TRL or we refuse."""
    argv = sys.argv[1:] if argv is None else argv
    return settings.read(argv, globals(), (DemoConfig, ModelConfig))


def make_prompt(question: str, one_shot: bool = ONE_SHOT) -> list[dict[str, str]]:
    """Return the messages: system prompt, the gist's example if `one_shot`, the question."""
    answer = XML_COT_FORMAT.format(reasoning=ONE_SHOT_REASONING, answer="7")
    example = [("user", ONE_SHOT_QUESTION), ("assistant", answer)] if one_shot else []
    messages = [("system", SYSTEM_PROMPT), *example, ("user", question)]
    return [{"role": role, "content": content} for role, content in messages]


def read_split(name: str, config: str | None, split: str) -> Dataset:
    """Return the rows of a dataset on the hub or on disk.

    A folder, or its folder `config` or data, has train.jsonl and test.jsonl (or .json, .csv,
    .parquet, .gz of them) or the parts of a hub snapshot. ValueError or OSError if it has not.
    """
    if not os.path.exists(name):
        return load_dataset(name, config, split=split)
    exact = re.compile(rf"{split}(?:-\d+-of-(\d+))?\.(jsonl?|csv|parquet)(?:\.gz)?")
    folders = {Path(name), Path(name, str(config)), Path(name, "data")}
    there = sorted(file for folder in folders for file in folder.glob("*"))
    files = [file for file in there if exact.fullmatch(file.name)]
    parts, kind = exact.fullmatch(files[0].name).groups() if files else (None, "")
    if len(files) != int(parts or 1):
        found = ", ".join(file.name for file in (files or there)[:9])
        raise FileNotFoundError(f"needs one {split}.jsonl or .parquet, or all parts; found {found}")
    names = [glob.escape(str(file)) for file in files]
    with TemporaryDirectory() as cache:  # a lasting one would keep the rows of a changed file
        options = {"split": "train", "cache_dir": cache, "keep_in_memory": True}
        try:
            return load_dataset(kind.replace("jsonl", "json"), data_files=names, **options)
        except Exception as error:  # whatever a library makes of a damaged file
            text = str(error.__cause__ or error) or "it is empty"
            raise ValueError(f"{', '.join(map(str, files))}: {text[:200]}") from error


def get_gsm8k_questions(split="train", name=DATASET_NAME, config=DATASET_CONFIG, one_shot=ONE_SHOT):
    """Return a split: columns prompt (messages), question, answer (the gold number, a string).

    Other columns stay: rewards get them. Columns that would replace TRL's and rows without a number
    after `####` are left out and named in a warning. ValueError if no row is left.
    """
    raw = read_split(name, config, split)
    kinds = {name: str(kind) for name, kind in raw.features.items()}  # as in "Value('string')"
    if missing := {"question", "answer"} - {x for x, kind in kinds.items() if "string')" in kind}:
        names = ", ".join(sorted(missing))
        raise ValueError(f"no column of texts {names} in {', '.join(raw.column_names)}"[:300])
    # In a column of texts and numbers (Json), datasets turns the text "007" into the number 7
    left_out = [x for x, kind in kinds.items() if x in RESERVED.split() or "Json(" in kind]
    if left_out:
        print_error(f"warning: {split} columns left out (TRL's, or of mixed kinds): {left_out}")
    rows = []
    for row in raw.remove_columns(left_out):
        question, (_, mark, end) = row["question"], (row["answer"] or "").rpartition("####")
        number = rewards.as_number(end) if mark else None  # None for 38,5: the gist reads 385
        if question and number is not None:
            gold = rewards.extract_hash_answer(mark + end)
            gold = str(number) if number.denominator == 1 else gold  # 45.0 is 45
            rows.append(row | {"prompt": make_prompt(question, one_shot), "answer": gold})
    if not rows:
        raise ValueError(f"none of {len(raw)} rows has a question, and a number after '####'")
    if bad := len(raw) - len(rows):
        why = "no question, or no number after '####'"
        print_error(f"warning: {bad} of {len(raw)} {split} rows left out: {why}")
    return Dataset.from_list(rows)


def load_questions(args: DemoConfig, split: str) -> Dataset:
    """Return the questions of training, or of the evaluation; UserError if there are too few."""
    where = f"dataset {args.dataset_name!r} (a hub id, or a folder; in {os.getcwd()})"
    where += " (--evaluate False needs none)" if split == "test" else ""
    with as_user_error(f"cannot load split {split!r} of {where}", KeyError):
        one_shot = args.one_shot and split == "train"  # the evaluation makes its own prompts
        rows = get_gsm8k_questions(split, args.dataset_name, args.dataset_config, one_shot)
    if split == "test":
        return rows.select(range(min(args.eval_samples or len(rows), len(rows))))
    if len(rows) < (prompts := args.generation_batch_size // args.num_generations):
        raise UserError(f"{len(rows)} training rows do not fill a step of {prompts} prompts")
    return rows


def load_model(args: DemoConfig, model_args: ModelConfig) -> tuple:
    """Return the model, or the base of a LoRA adapter with it, and the tokenizer."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if os.path.isdir(name):
        name = os.path.abspath(name)  # an adapter stores where its base model is
        for file in Path(name).glob("*.safetensors"):  # transformers would say: no such file
            file.open("rb").close()
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


def build_trainer(args: DemoConfig, model_args: ModelConfig, rows: Dataset) -> GRPOTrainer:
    """Return the trainer, with `--use_peft` the gist's LoRA; UserError for what does not fit."""
    name = model_args.model_name_or_path
    where = f"cannot load model {name!r}, or an adapter's base (hub ids, or in {os.getcwd()})"
    with as_user_error(where, ImportError):
        model, tokenizer = load_model(args, model_args)
    check_model(args, model, tokenizer, make_prompt(rows["question"][0], one_shot=True), rows)
    if model_args.model_revision != "main":  # TRL loads the reference model by name
        args.model_init_kwargs = {"revision": model_args.model_revision}
    args.reward_weights = [*args.reward_weights, 0.0]  # of lenient_accuracy, which is only logged
    with as_user_error("TRL refuses these settings"):
        trainer = GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=[*rewards.REWARD_FUNCS, rewards.lenient_accuracy],
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=None if isinstance(model, PeftModel) else get_peft_config(model_args),
        )
    if isinstance(trainer.model, PeftModel):
        check_adapter(trainer.model, args.beta)
    return trainer


def eval_only(args: DemoConfig, model_args: ModelConfig) -> None:
    """Evaluate a saved model, zero-shot and one-shot, in a folder of the output directory."""
    args.beta, args.log_completions, args.report_to = 0.0, False, []  # no reference model, no W&B
    rows = load_questions(args, "test")
    evaluation = Evaluation(args, model_args.model_name_or_path, rows, make_prompt)
    trainer = build_trainer(args, model_args, rows)
    what = resume.on_first_process(lambda: str(resume.describe(args, model_args, trainer)))
    evaluation.out /= f"eval-{sha256(what.encode()).hexdigest()[:12]}"  # where it can resume
    watch.print_banner(trainer)
    evaluation.evaluate(trainer, "zero_shot", one_shot=False)
    evaluation.evaluate(trainer, "one_shot", one_shot=True)
    evaluation.report()
    print_once(f"kept in {evaluation.out}")


def train(args: DemoConfig, model_args: ModelConfig) -> None:
    """Evaluate, train, save, evaluate again; or resume where an earlier run was stopped."""
    rows = load_questions(args, "train")
    with as_user_error("rewards.py"):
        rewards.try_rewards(rewards.REWARD_FUNCS, rows[0])  # on its examples
    held_out = load_questions(args, "test") if args.evaluate else None
    evaluation = Evaluation(args, model_args.model_name_or_path, held_out, make_prompt)
    with resume.claim_output(args):
        trainer = build_trainer(args, model_args, rows)
        state, _, record, checkpoint = resume.open_output(args, model_args, trainer)
        if state == "finished":
            return
        trainer.create_model_card = lambda **_: None  # TRL's; `write_card` writes ours
        trainer.add_callback(watch.Watch(trainer))
        trainer.add_callback(resume.StopAndResume(trainer, checkpoint))
        watch.print_banner(trainer)
        config = vars(model_args) | args.to_sanitized_dict() | record["settings"]
        watch.open_run(args, config, record["wandb_id"])
        if args.evaluate:
            evaluation.evaluate(trainer, "before_zero_shot", one_shot=False)
            evaluation.evaluate(trainer, "before_one_shot", one_shot=True)
        with suppress(StopIteration):  # of StopAndResume: no step is left
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        if args.evaluate:
            after = "after_one_shot" if args.one_shot else "after_zero_shot"
            evaluation.evaluate(trainer, after, one_shot=args.one_shot)
        result = evaluation.report() if args.evaluate else None
        write_card(args, model_args.model_name_or_path, result)
        if args.process_index == 0:
            resume.write_json(Path(args.output_dir, "run.json"), record | {"finished": True})


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exit status 0 when done, 2 with one line for an error to fix."""
    tied = "lm_head.weight"  # not in a checkpoint if tied: transformers warns when a run resumes
    logging.getLogger("transformers.trainer").addFilter(lambda r: tied not in r.getMessage())
    disable_progress_bar()  # of loading weights
    disable_progress_bars()  # of loading data
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what fails is raised too
    with exit_on_error():
        args, model_args = parse_args(argv)
        (eval_only if args.eval_only else train)(args, model_args)


if __name__ == "__main__":
    main()
