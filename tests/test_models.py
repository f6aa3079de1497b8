"""Other models: their stop tokens, padding and chat templates, on copies of the laptop model."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import LAPTOP, run
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState
from trl import GRPOConfig

import grpo_demo
from assets.common import UserError
from assets.evaluate import Evaluation, generate
from assets.terminal import Health

torch.set_num_threads(1)  # the model is small: more threads wait longer than they compute
END, TEXT_END, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"  # ids 2, 0 and 1
CHATML = Path("assets/tiny/chat_template.jinja").read_text()
QWEN = CHATML.replace("{% for", "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are "
                      "Qwen.<|im_end|>\n{% endif %}{% for", 1)  # fmt: skip
QWEN_3 = CHATML[: -len("{% endif %}")] + (
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
QWEN_THINKING = QWEN_3.replace(
    "{% endif %}{% endif %}", "{% else %}<think>\n{% endif %}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'system' %}Today Date: {{ strftime_now('%d %b %Y') }}\n\n{% endif %}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<User>' + m.content }}{% else %}{{ '<Assistant>' + m.content.split('</think>')[-1] + "
    "'<|endoftext|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)
OURS = R1.replace("think>", "reasoning>")  # it drops the reasoning of an example
DEAF = CHATML.replace("{{ '", "{% if m.role != 'system' %}{{ '", 1).replace(
    "}}{% endfor", "}}{% endif %}{% endfor"
)
TOKENS = {  # that a template needs
    LLAMA: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    GEMMA: ["<start_of_turn>", "<end_of_turn>"],
}


def make_model(
    folder: Path, template: str | None = CHATML, stops: object = (), **tokens: str | None
) -> Path:
    """Return a copy of the laptop model with another template, stop tokens and special tokens.

    stops   tokens in generation_config.json: one, or a list
    tokens  eos_token and pad_token of the tokenizer; None: it has none
    """
    shutil.copytree("assets/tiny", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | tokens
    known = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(known))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if more := TOKENS.get(template):
        tokenizer.add_tokens(more, special_tokens=True)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(known))
    ids = tokenizer.convert_tokens_to_ids(stops if isinstance(stops, str) else list(stops))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids or None}))
    return folder


def prepare(folder: Path, *flags: str, rows: int = 16) -> grpo_demo.GRPOTrainer:
    """Return the trainer that the script would make of a model; two steps of 16 completions."""
    step = ("--max_steps", "2", "--per_device_train_batch_size", "16", "--save_strategy", "no")
    ours = (*LAPTOP, "--report_to", "none", "--output_dir", str(folder / "out"), *step)
    model = ("--model_name_or_path", str(folder))
    args, model_args = grpo_demo.parse_args([*ours, *model, *flags])
    data = grpo_demo.get_gsm8k_questions("train", args.dataset_name, one_shot=args.one_shot)
    return grpo_demo.prepare_trainer(args, model_args, data.select(range(rows)))


def warnings(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


ENDS = {  # the same stop token, said in different ways: tokenizer, generation config
    "pad differs": ({"eos_token": END, "pad_token": TEXT_END}, END),
    "pad is start": ({"eos_token": END, "pad_token": START}, END),
    "no pad": ({"eos_token": END, "pad_token": None}, END),
    "no file": ({"eos_token": END}, ()),
    "a list": ({"eos_token": END}, [END, TEXT_END]),
    "Qwen's GGUF": ({"eos_token": TEXT_END, "pad_token": TEXT_END}, [END, TEXT_END]),
    "no eos": ({"eos_token": None, "pad_token": None}, END),
    "template only": ({"eos_token": None, "pad_token": None}, ()),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return outcome(make_model(tmp_path_factory.mktemp("plain"), eos_token=END, stops=END))


def outcome(folder: Path) -> dict:
    """Return answers of the evaluation, then completions, lengths, losses and weights of a run."""
    trainer = prepare(folder, "--logging_steps", "1")
    answers = generate(trainer, trainer.train_dataset["prompt"][:])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    names = ("loss", "kl", "completions/mean_length", "completions/clipped_ratio", "grad_norm")
    files = sorted((folder / "out" / "completions").glob("*.parquet"))
    return {
        "answers": answers,
        "completions": [text for file in files for text in pd.read_parquet(file)["completion"]],
        "logs": [[log[name] for name in names] for log in logs],
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
    }


@pytest.mark.parametrize("case", ENDS)
def test_a_run_does_not_depend_on_how_the_end_is_declared(tmp_path, plain, case):
    tokens, stops = ENDS[case]
    got = outcome(make_model(tmp_path, stops=stops, **tokens))
    assert len(plain["completions"]) == 32 and len(plain["logs"]) == 2
    assert 5 < plain["logs"][0][2] < 64 and not all(row["truncated"] for row in got["answers"])
    for name in ("answers", "completions", "logs"):
        assert got[name] == plain[name], name
    assert all(torch.equal(p, plain["weights"][name]) for name, p in got["weights"].items())


OFF = "enable_thinking"
TEMPLATES = {  # template, flags, eos, stop tokens of the file, parts of the expected lines
    "Qwen2.5": (QWEN, (), END, [END, TEXT_END], []),
    "Qwen3": (QWEN_3, (), END, [END, TEXT_END], []),
    "Qwen3 off": (QWEN_3, (f'{{"{OFF}": false}}',), END, [END, TEXT_END], []),
    "Qwen3 thinking": (QWEN_THINKING, (), END, [END], [("<think>", OFF)]),
    "Qwen3 thinking off": (QWEN_THINKING, (f'{{"{OFF}": false}}',), END, [END], []),
    "Llama 3.2": (LLAMA, (), "<|eot_id|>", ["<|end_of_text|>", "<|eot_id|>"], []),
    "Llama base": (LLAMA, (), "<|end_of_text|>", ["<|end_of_text|>"],
                   [("<|eot_id|>", "<|end_of_text|>", "[1003, 1000]")]),
    "Gemma": (GEMMA, (), TEXT_END, [TEXT_END, "<end_of_turn>"], [("system", "first question")]),
    "Gemma old": (GEMMA, (), TEXT_END, TEXT_END,
                  [("system", "first question"), ("<end_of_turn>", TEXT_END, "[1001, 0]")]),
    "R1": (R1, (), TEXT_END, TEXT_END, [("<think>", "another model")]),
    "R1 with our tag": (OURS, (), TEXT_END, TEXT_END,
                        [("9 is divisble",), ("<reasoning>", "another model")]),
    "deaf": (DEAF, (), END, END, [("system", "first question")]),
    "no token": (CHATML.replace("im_", "IM_"), (), END, END, [("<|IM_end|>", "no token")]),
    "Qwen base": (CHATML, (), TEXT_END, TEXT_END, [(END, TEXT_END, "[2, 0]")]),
}  # fmt: skip


@pytest.mark.parametrize("one_shot", ["False", "True"])
@pytest.mark.parametrize("case", TEMPLATES)
def test_one_line_for_each_thing_that_does_not_fit(tmp_path, capsys, case, one_shot):
    template, extra, eos, stops, expected = TEMPLATES[case]
    folder = make_model(tmp_path, template, stops, eos_token=eos)
    flags = [f"--chat_template_kwargs={text}" for text in extra]
    trainer = prepare(folder, "--one_shot", one_shot, *flags)
    lines = warnings(capsys)
    assert len(lines) == len(expected), lines
    for line, parts in zip(lines, expected, strict=True):
        assert all(part in line for part in parts), line
    ids, _, _ = trainer._tokenize_prompts([trainer.train_dataset["prompt"][0]])
    text = trainer.processing_class.decode(ids[0])
    question, system = trainer.train_dataset["question"][0], grpo_demo.SYSTEM_PROMPT.strip()
    assert text.count(system) == 1 and text.count(question) == 1
    example = one_shot == "True" and template != OURS
    assert text.count(grpo_demo.ONE_SHOT_REASONING) == example
    assert text.index(system) < text.index(question)


@pytest.mark.parametrize("thinking", ["true", "false"])
def test_prompts_are_measured_as_they_are_trained_on(tmp_path, capsys, thinking):
    """With `enable_thinking` false the template adds an empty block of thoughts."""
    folder = make_model(tmp_path, QWEN_3, [END], eos_token=END)
    flag = f'--chat_template_kwargs={{"{OFF}": {thinking}}}'
    trainer = prepare(folder, flag, "--max_prompt_length", "1")
    ids, _, _ = trainer._tokenize_prompts(trainer.train_dataset["prompt"][:])
    (line,) = warnings(capsys)
    assert f"16 of 16 prompts have over 1 tokens (up to {max(map(len, ids))})" in line
    text = trainer.processing_class.decode(ids[0])
    assert text.endswith("</think>\n\n") == (thinking == "false")


def test_a_model_without_a_system_role_trains_and_its_copy_takes_one(tmp_path):
    """The messages are the same for training, evaluation and whoever loads the trained model."""
    folder = make_model(tmp_path / "gemma", GEMMA, ["<end_of_turn>"], eos_token=TEXT_END)
    step = ("--max_steps", 1, "--per_device_train_batch_size", 16, "--eval_samples", 4)
    out = ("--output_dir", tmp_path / "out", "--report_to", "none")
    done = run(*LAPTOP, "--model_name_or_path", folder, *step, *out)
    assert done.returncode == 0 and done.stderr.count("system role") == 1, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = grpo_demo.make_prompt("How many?", one_shot=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parts = ["<start_of_turn>user\nRespond", "</answer>\n\nWhat is the largest"]
    assert all(text.count(part) == 1 for part in parts)
    assert text.endswith("How many?<end_of_turn>\n<start_of_turn>model\n")
    again = run(*LAPTOP, "--eval_only", "--model_name_or_path", tmp_path / "out", *step, *out)
    assert again.returncode == 0 and "system role" not in again.stderr, again.stderr


def test_what_cannot_work_is_refused(tmp_path):
    none = {"eos_token": None, "pad_token": None}
    plain_text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    cases = {
        "chat_template.jinja": make_model(tmp_path / "base", None, END),
        "eos_token in tokenizer_config.json": make_model(tmp_path / "endless", plain_text, **none),
        "must alternate": make_model(
            tmp_path / "broken", "{{ raise_exception('must alternate') }}"
        ),
    }
    for text, folder in cases.items():
        with pytest.raises(UserError, match=text):
            prepare(folder)


def test_the_saved_model_keeps_every_stop_token(tmp_path):
    """transformers aligns the stop tokens with the tokenizer's when training starts."""
    folder = make_model(tmp_path, stops=[END, START], eos_token=TEXT_END, pad_token=TEXT_END)
    trainer = prepare(folder)
    trainer.train()
    trainer.save_model()
    saved = json.loads((folder / "out" / "generation_config.json").read_text())
    assert set(saved["eos_token_id"]) == {0, 1, 2} == set(trainer.eos_token_ids)


def test_the_evaluation_counts_answers_that_go_on_after_a_special_token(tmp_path, capsys):
    """A model that ends its answers with a token that generation does not stop at."""
    folder = make_model(tmp_path, stops=TEXT_END, eos_token=TEXT_END, pad_token=TEXT_END)
    trainer = prepare(folder)
    capsys.readouterr()
    evaluation = Evaluation(trainer.args, str(folder), trainer.train_dataset, grpo_demo.make_prompt)
    answers = evaluation.evaluate(trainer, "before_zero_shot", one_shot=False)
    evaluation.evaluate(trainer, "before_one_shot", one_shot=True)
    strays = [answer["stray"] for answer in answers]
    assert set(strays) <= {"", START, END} and strays.count(END) > 8
    (line,) = warnings(capsys)
    assert f"{len(strays) - strays.count('')} of 16 completions" in line and END in line


@pytest.mark.parametrize(("stops", "lines"), [(TEXT_END, 1), ([TEXT_END, END], 0)])
def test_without_an_evaluation_the_first_step_counts_them(tmp_path, stops, lines):
    folder = make_model(tmp_path / "model", stops=stops, eos_token=TEXT_END, pad_token=TEXT_END)
    steps = ("--max_steps", 2, "--per_device_train_batch_size", 16, "--save_strategy", "no")
    out = ("--output_dir", tmp_path / "out", "--report_to", "none", "--evaluate", "False")
    done = run(*LAPTOP, "--model_name_or_path", folder, *steps, *out)
    assert done.returncode == 0 and done.stderr.count("completions go on after") == lines


@pytest.mark.parametrize(
    ("logs", "said"),
    [
        ({}, "--max_completion_length"),
        ({"rewards/soft_format_reward_func/mean": 0.3}, "eos_token_id"),
        ({"kl": 3.0}, "--learning_rate"),
        ({"completions/clipped_ratio": 0.5, "kl": 3.0}, None),
    ],
)
def test_why_completions_are_cut_off(capsys, logs, said):
    formats = {f"rewards/{name}_format_reward_func/mean": 0.0 for name in ("soft", "strict")}
    formats = formats if logs else {}  # a run with other rewards
    usual = {"reward": 1.0, "completions/clipped_ratio": 0.8, "kl": 0.3, **formats}
    health, state = Health(), TrainerState(global_step=3)
    for _ in range(2):
        health.on_log(GRPOConfig, state, TrainerControl(), logs=usual | logs)
    lines = warnings(capsys)
    assert len(lines) == (said is not None) and all(said in line for line in lines)


def test_an_adapter_whose_base_is_missing_and_one_of_another_rank(tmp_path):
    peft = ("--use_peft", "--lora_r", 4, "--lora_dropout", 0)
    small = (
        "--max_steps",
        1,
        "--evaluate",
        "False",
        "--report_to",
        "none",
        "--max_completion_length",
        8,
    )
    done = run(*LAPTOP, *small, *peft, "--output_dir", tmp_path / "lora")
    assert done.returncode == 0, done.stderr[-2000:]
    adapter = ("--model_name_or_path", tmp_path / "lora", "--output_dir", tmp_path / "further")
    done = run(*LAPTOP, *small, "--lora_r", 32, *adapter)
    assert done.returncode == 0 and "the loaded adapter has rank 4" in done.stderr
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(file.read_text().replace("assets/tiny", "models/nowhere"))
    done = run(
        *LAPTOP, *small, "--model_name_or_path", tmp_path / "lora", "--output_dir", tmp_path / "c"
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "an adapter of 'models/nowhere'" in line
