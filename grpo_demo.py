"""GRPO on GSM8K in one script: willccbb's `grpo_demo.py`, updated to TRL 1.16.

    pip install -r requirements.txt
    python grpo_demo.py --config assets/tiny/config.yaml    # laptop: no GPU, network or account
    python grpo_demo.py                                     # one CUDA GPU: Qwen2.5-1.5B on GSM8K
    python grpo_demo.py --estimate_memory                   # what fits which card; needs no GPU
    python grpo_demo.py --use_peft                          # with the gist's LoRA adapter
    python grpo_demo.py --use_vllm                          # after pip install vllm==0.31.0
    python grpo_demo.py --dataset_name DIR --model_name_or_path DIR     # local data, local model
    python grpo_demo.py --eval_only --model_name_or_path DIR            # evaluate a saved model
    accelerate launch --num_processes 2 grpo_demo.py --gradient_accumulation_steps 32  # two GPUs

Every constant below, except the prompt's texts, is also a flag and a YAML key (`--config FILE`), in
lower case; so is every field of TRL's GRPOConfig and ModelConfig.

GRPO in six lines (arXiv 2402.03300; `tests/test_step.py` writes the whole step out, without TRL):

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

import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads sleep
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # after a short spin: kind to a busy machine

import torch
from datasets import Dataset, load_dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import find_adapter_config_file, is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, ModelConfig, TrlParser, get_peft_config, get_quantization_config

import rewards
from assets import check, keep, memory, terminal
from assets.claim import describe
from assets.errors import UserError, one_line_errors, say
from assets.evaluate import Evaluation, write_card

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


@dataclass
class DemoConfig(GRPOConfig):
    """TRL's GRPOConfig and this script's own flags."""

    dataset_name: str = field(default=DATASET_NAME, metadata={"help": "Hub id, or local folder."})
    dataset_config: str | None = field(default=DATASET_CONFIG, metadata={"help": "Of a hub id."})
    one_shot: bool = field(default=ONE_SHOT, metadata={"help": "Example in the prompt."})
    max_prompt_length: int = field(default=MAX_PROMPT_LENGTH, metadata={"help": "In tokens."})
    evaluate: bool = field(default=EVALUATE, metadata={"help": "Before and after training."})
    eval_samples: int = field(default=EVAL_SAMPLES, metadata={"help": "Test questions; 0: all."})
    eval_generations: int = field(default=EVAL_GENERATIONS, metadata={"help": "For pass@k."})
    eval_only: bool = field(default=False, metadata={"help": "Evaluate, do not train."})
    estimate_memory: bool = field(default=False, metadata={"help": "Print it, do not train."})
    print_steps: int = field(default=PRINT_STEPS, metadata={"help": "Between samples shown."})
    overwrite_output: bool = field(default=False, metadata={"help": "Move an old run aside."})

    def __post_init__(self):
        """Refuse what TRL and transformers would refuse less clearly, too late, or not at all."""
        self.use_cpu = self.use_cpu or self.estimate_memory
        check.values(self)
        check.gpu(self)
        super().__post_init__()
        check.tools(self)

    @property
    def device(self) -> torch.device:
        """The device; "cpu", not "cpu:0", which torch.load would not know when a run resumes."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def parse_args(argv: list[str] | None = None) -> tuple[DemoConfig, ModelConfig]:
    """Return the settings: the constants, overridden by `--config FILE`, overridden by flags.

    UserError names an unknown flag or YAML key, a bad value, or a combination that TRL refuses.
    """
    parser = check.Parser([DemoConfig, ModelConfig], __doc__.split("GRPO in six lines")[0])
    constants = {name.lower(): value for name, value in globals().items() if name.isupper()}
    TrlParser.set_defaults_with_config(parser, **constants)  # passes over those that are no flag
    with one_line_errors("settings"):
        args, model_args = parser.parse_args_and_config(sys.argv[1:] if argv is None else argv)
    check.values(model_args)
    return args, model_args


def make_prompt(question: str, one_shot: bool = ONE_SHOT) -> list[dict[str, str]]:
    """Return the messages: system prompt, the gist's example if `one_shot`, the question."""
    messages = [("system", SYSTEM_PROMPT)]
    if one_shot:
        example = XML_COT_FORMAT.format(reasoning=ONE_SHOT_REASONING, answer="7")
        messages += [("user", ONE_SHOT_QUESTION), ("assistant", example)]
    messages += [("user", question)]
    return [{"role": role, "content": content} for role, content in messages]


def get_gsm8k_questions(
    split: str = "train",
    dataset_name: str = DATASET_NAME,
    dataset_config: str | None = DATASET_CONFIG,
    one_shot: bool = ONE_SHOT,
) -> Dataset:
    """Return a split: columns prompt (messages), question and answer (the gold number, a string).

    Bad rows are left out and counted in one warning. UserError if nothing is left or found.
    """
    where = f"{dataset_name!r} (a hub id, or a folder with {split}.jsonl; in {os.getcwd()})"
    where += " (--evaluate False needs none)" if split == "test" else ""
    with one_line_errors(f"no split {split!r} in dataset {where}"):
        if check.is_local(dataset_name):
            path = Path(dataset_name, f"{split}.jsonl")
            lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
            raw = [line for line in lines if line.strip()]
        else:
            raw = load_dataset(dataset_name, dataset_config, split=split)
    rows, bad = [], Counter()
    for line in raw:
        try:
            row = check.row(line)
            rows.append({"prompt": make_prompt(row["question"], one_shot)} | row)
        except ValueError as error:
            bad[str(error)] += 1
    reasons = "; ".join(f"{n} with {reason}" for reason, n in bad.items())
    if not rows:
        raise UserError(f"no usable row in split {split!r} of {where}: {reasons or 'it is empty'}")
    if bad:
        say(f"warning: {bad.total()} of {len(raw)} {split} rows left out: {reasons}", error=True)
    return Dataset.from_list(rows)


def load_model(args: DemoConfig, model_args: ModelConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """Return the model, as an instance like in the gist, and its tokenizer.

    A directory or hub id with a LoRA adapter gives its base model with that adapter, trainable.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    flash = is_flash_attn_2_available() and args.device.type == "cuda"
    attention = model_args.attn_implementation or ("flash_attention_2" if flash else "sdpa")
    with one_line_errors(f"cannot load model {name!r} (a hub id, or a folder in {os.getcwd()})"):
        if check.is_local(name) and not os.path.isdir(name):
            raise FileNotFoundError("no such folder")
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


class GRPOTrainer(keep.ResumableTrainer):
    """TRL's trainer, which also logs accuracy. Its name stays: W&B's timers are named after it."""

    def __init__(self, args: DemoConfig, **kwargs):
        super().__init__(args=args, **kwargs)
        if self.use_vllm and self.vllm_mode == "colocate":  # it has set the seed to its own
            set_seed(args.seed + args.process_index // args.vllm_tensor_parallel_size)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write README.md of the output directory, with every checkpoint and at the end."""
        if self.is_world_process_zero():
            write_card(self.args, self.model.config._name_or_path)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        texts, golds = [c[0]["content"] for c in completions], [row["answer"] for row in inputs]
        self._log_completion_extra("question", [row["question"] for row in inputs])
        self._log_completion_extra("text", texts)  # W&B shows both better than chat messages
        self._log_completion_extra("gold", golds)
        self._log_completion_extra("extracted", [rewards.extract_xml_answer(t) for t in texts])
        kinds = {"strict": rewards.is_strict_correct, "lenient": rewards.is_lenient_correct}
        for kind, right in kinds.items():
            self._log_metric(f"accuracy/{kind}", sum(map(right, texts, golds)) / len(texts))
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


def build_trainer(
    args: DemoConfig, model_args: ModelConfig, rows: Dataset, held_out: Dataset | None = None
) -> GRPOTrainer:
    """Return the trainer with model, five rewards and, with `--use_peft`, the LoRA adapter.

    held_out  questions for `--eval_strategy steps`: accuracy on them while training

    UserError if the model does not load, or the settings do not fit together.
    """
    model, tokenizer = load_model(args, model_args)
    if model_args.model_revision != "main":  # TRL loads the reference model by name
        args.model_init_kwargs = {"revision": model_args.model_revision}
    with one_line_errors("TRL refuses these settings"):
        check.prompts(args, model, tokenizer, rows)
        trainer = GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=rewards.REWARD_FUNCS,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=None if isinstance(model, PeftModel) else get_peft_config(model_args),
        )
    check.cast(trainer)
    return trainer


def build_evaluation(args: DemoConfig, model_args: ModelConfig) -> Evaluation:
    """Return the evaluation on the test split, or on its first `eval_samples` rows."""
    rows = get_gsm8k_questions("test", args.dataset_name, args.dataset_config)
    rows = rows.select(range(min(args.eval_samples or len(rows), len(rows))))
    return Evaluation(args, model_args.model_name_or_path, rows, make_prompt)


def eval_only(args: DemoConfig, model_args: ModelConfig) -> None:
    """Evaluate a saved model, zero-shot and one-shot, in a new folder of the output directory."""
    args.output_dir = str(Path(args.output_dir, f"eval-{datetime.now():%Y%m%d-%H%M%S}"))
    args.beta, args.log_completions, args.report_to = 0.0, False, []  # no reference model, no W&B
    evaluation = build_evaluation(args, model_args)
    trainer = build_trainer(args, model_args, evaluation.questions)
    terminal.banner(trainer, model_args)
    for name, one_shot in {"zero_shot": False, "one_shot": True}.items():
        evaluation.evaluate(trainer, name, one_shot)
    evaluation.report()
    say(f"kept in {args.output_dir}")


def train(args: DemoConfig, model_args: ModelConfig) -> None:
    """Evaluate, train, save, evaluate again; or resume where an earlier run was stopped."""
    rows = get_gsm8k_questions("train", args.dataset_name, args.dataset_config, args.one_shot)
    evaluation = build_evaluation(args, model_args) if args.evaluate else None
    if len(rows) < (prompts := args.generation_batch_size // args.num_generations):
        raise UserError(f"{len(rows)} training rows do not fill a step of {prompts} prompts")
    config = describe(args, model_args, rows, SYSTEM_PROMPT, rewards.__file__)
    with keep.run(args, config) as kept:
        trainer = build_trainer(args, model_args, rows, evaluation and evaluation.questions)
        trainer.add_callback(terminal.Terminal(trainer, args.print_steps))
        kept.watch(trainer)
        terminal.banner(trainer, model_args)
        if evaluation:
            evaluation.evaluate(trainer, "before_zero_shot", one_shot=False)
            evaluation.evaluate(trainer, "before_one_shot", one_shot=True)
        kept.train()  # trainer.train(), from the newest checkpoint
        trainer.save_model()
        if evaluation:
            after = "after_one_shot" if args.one_shot else "after_zero_shot"
            evaluation.evaluate(trainer, after, one_shot=args.one_shot)
            evaluation.report()
        trainer.create_model_card()
    say(terminal.TALK.format(args.output_dir))


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exit status 0 when done, 2 with one line for an error to fix."""
    warnings.simplefilter("ignore", FutureWarning)  # transformers, about names that TRL uses
    disable_progress_bar()  # of loading weights
    try:
        args, model_args = parse_args(argv)
        task = memory.report if args.estimate_memory else eval_only if args.eval_only else train
        task(args, model_args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get("TRACEBACK") or keep.Run.begun:  # training has begun
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        known = "" if isinstance(error, UserError) else "; TRACEBACK=1 shows where"
        say(f"error: {text}{known}", error=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
