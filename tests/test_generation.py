"""Generation: the sampling settings really used, the greedy evaluation, the faster backends."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest import LAPTOP

import grpo_demo
from assets.common import UserError
from assets.evaluate import generate

torch.set_num_threads(1)  # the model is small: more threads wait longer than they compute
SMALL_CACHE = json.dumps({"max_memory_percent": 0.05})
CONTINUOUS = ("--use_transformers_continuous_batching=True",
              f"--transformers_continuous_batching_config={SMALL_CACHE}")  # fmt: skip
QWEN = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
END = 2  # the id of <|im_end|>
ZERO = 18  # the id of the digit 0, which is in a third of the answers


def build(tmp_path, *flags: str, **generation: object) -> grpo_demo.GRPOTrainer:
    """Return the trainer on 64 questions; `generation` is the model's generation_config.json."""
    model = tmp_path / "model"
    shutil.copytree("assets/tiny", model, dirs_exist_ok=True)
    (model / "generation_config.json").write_text(json.dumps(generation))
    ours = (*LAPTOP, "--report_to", "none", "--output_dir", str(tmp_path / "out"))
    args, model_args = grpo_demo.parse_args([*ours, "--model_name_or_path", str(model), *flags])
    rows = grpo_demo.get_gsm8k_questions("train", args.dataset_name).select(range(64))
    return grpo_demo.prepare_trainer(args, model_args, rows)


def make_greedy(trainer: grpo_demo.GRPOTrainer) -> grpo_demo.GRPOTrainer:
    """Let the trainer take the likeliest token, which no flag can; return it."""
    trainer.generation_config.do_sample = False
    trainer.generation_kwargs["do_sample"] = False
    return trainer


def complete(trainer: grpo_demo.GRPOTrainer, size: int) -> list[list[int]]:
    """Return the tokens that the trainer generates for its questions, `size` at a time."""
    prompts, _, _ = trainer._tokenize_prompts(trainer.train_dataset["prompt"][:])
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    return [
        ids for batch in batches for ids in trainer._generate_single_turn(batch, None, {}, 1)[0]
    ]


def test_sampling_ignores_the_models_own_settings(tmp_path, monkeypatch):
    """Temperature and top-k are all that touches the logits, though the file asks for more."""
    trainer = build(tmp_path, eos_token_id=END, **QWEN)
    calls = []
    sample = type(trainer.model)._sample

    def spy(model, ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        calls.append((logits_processor, generation_config))
        return sample(model, ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    monkeypatch.setattr(type(trainer.model), "_sample", spy)
    complete(trainer, 64)
    (processors, used), = calls  # fmt: skip
    wanted = {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 1.0}
    wanted["repetition_penalty"] = 1.0
    assert {name: getattr(used, name) for name in QWEN} == wanted
    assert {name: getattr(trainer.model.generation_config, name) for name in QWEN} == QWEN
    assert [type(p).__name__ for p in processors] == ["TemperatureLogitsWarper", "TopKLogitsWarper"]


@pytest.mark.parametrize("eos", [None, END, [END, ZERO]], ids=["no eos", "one eos", "two eos"])
def test_the_evaluation_generates_what_the_trainer_does(tmp_path, eos):
    trainer = make_greedy(build(tmp_path, "--max_completion_length", "16", eos_token_id=eos))
    tokenizer = trainer.processing_class
    stops = eos if isinstance(eos, list) else [END]
    wanted = complete(trainer, 64)
    ends = [len(ids) - (ids[-1] in stops) for ids in wanted]  # without the stop token
    assert {ids[-1] for ids in wanted} > set(stops)  # each stops some, and some are cut off
    prompts = trainer.train_dataset["prompt"][:]
    rows = generate(trainer, prompts[:24]) + generate(trainer, prompts[24:])
    assert [row["tokens"] for row in rows] == [len(ids) for ids in wanted]
    assert [row["truncated"] for row in rows] == [ids[-1] not in stops for ids in wanted]
    texts = [tokenizer.decode(ids[:end]) for ids, end in zip(wanted, ends, strict=True)]
    assert [row["completion"] for row in rows] == texts


def test_each_backend_generates_the_same(tmp_path):
    trainer = make_greedy(build(tmp_path, eos_token_id=END))
    one_call = complete(trainer, 64)
    assert len(set(map(tuple, one_call))) > 60 and max(map(len, one_call)) > 30
    assert complete(trainer, 16) == one_call
    continuous = make_greedy(build(tmp_path, *CONTINUOUS, eos_token_id=END))
    assert complete(continuous, 64) == one_call


def test_continuous_batching_evaluates_the_same_and_starts_at_loss_0(tmp_path):
    rows = []
    step = ("--max_steps", "1", "--save_strategy", "no")
    for name, flags in {"plain": (), "continuous": CONTINUOUS}.items():
        trainer = build(tmp_path / name, *flags, *step, eos_token_id=END)
        rows.append(generate(trainer, trainer.train_dataset["prompt"][:20]))
    assert rows[0] == rows[1]
    trainer.train()
    (loss,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert abs(loss) < 1e-6


def test_sampled_answers_of_the_evaluation_have_the_settings_of_training(tmp_path, monkeypatch):
    trainer = build(tmp_path, eos_token_id=END, **QWEN)
    used = []
    generate_tokens = type(trainer.model).generate

    def spy(model, *args, generation_config, **kwargs):
        used.append(generation_config)
        return generate_tokens(model, *args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(type(trainer.model), "generate", spy)
    prompts = [trainer.train_dataset["prompt"][0]] * 16
    rows = generate(trainer, prompts, greedy=False)
    assert len({row["completion"] for row in rows}) > 1
    complete(trainer, 64)
    evaluation, training = (config.to_dict() for config in used)
    assert evaluation == training and training["temperature"] == 0.9
    assert len({row["completion"] for row in generate(trainer, prompts)}) == 1


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (("--bf16", "True"), True),  # float32 weights
        (("--bf16", "True", "--dtype", "bfloat16"), False),
        (("--bf16", "True", "--dtype", "bfloat16", "--use_peft"), True),  # a float32 adapter
        (("--use_peft",), False),
    ],
)
def test_continuous_batching_does_not_cast_what_is_trained(tmp_path, flags, refused):
    with pytest.raises(UserError, match="cast") if refused else nullcontext():
        build(tmp_path, *CONTINUOUS, *flags, eos_token_id=END)
