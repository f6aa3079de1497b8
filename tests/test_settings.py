"""The gist's settings, pinned; constants, YAML and flags; errors in settings."""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import LAPTOP, ROOT, command, run
from trl import GRPOConfig, ModelConfig, TrlParser

import grpo_demo
from assets.common import UserError
from assets.research.flags import collect
from assets.settings import CHOICES, FIXED_OPTIONS, FLAGS, RANGES, Parser
from grpo_demo import DemoConfig, parse_args

CONFIGS = [DemoConfig, ModelConfig]
QUICK = ("--max_steps", "1", "--eval_samples", "4")  # what is not refused ends soon
GIST = {  # the gist's settings, in TRL 1.16's names
    "learning_rate": 5e-6,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "weight_decay": 0.1,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "bf16": True,
    "num_train_epochs": 1,
    "save_steps": 100,
    "max_grad_norm": 0.1,
    "report_to": ["wandb"],
    "log_on_each_node": False,
    "num_generations": 16,
    "max_completion_length": 786,
    "beta": 0.04,
    "use_bias_correction_kl": False,
    "vllm_importance_sampling_correction": False,
    "loss_type": "grpo",
    "scale_rewards": "group",
    "temperature": 1.0,
    "generation_kwargs": {"temperature": 0.9},
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "gradient_checkpointing": False,
    "optim": "adamw_torch",
    "num_iterations": 1,
    "max_steps": -1,
    "output_dir": "outputs/Qwen-1.5B-GRPO",
    "run_name": "Qwen-1.5B-GRPO-gsm8k",
    "dataset_name": "openai/gsm8k",
    "dataset_config": "main",
    "one_shot": False,
    "max_prompt_length": 256,
    "log_completions": True,
    "project": "grpo-demo",
}


@pytest.fixture(scope="module")
def defaults():
    return parse_args(["--use_cpu"])


@pytest.mark.parametrize("name", GIST)
def test_default(defaults, name):
    assert getattr(defaults[0], name) == GIST[name]


def test_one_step_is_64_completions_in_one_generate_call(defaults):
    args, _ = defaults
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert per_step == args.generation_batch_size == 64


MODEL = {  # with the gist's LoRA adapter, which is off by default
    "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "dtype": "bfloat16",
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "lora_target_modules": [f"{part}_proj" for part in ("q", "k", "v", "o", "up", "down", "gate")],
    "lora_task_type": "CAUSAL_LM",
}


def test_model_defaults(defaults):
    _, model_args = defaults
    assert {name: getattr(model_args, name) for name in MODEL} == MODEL


def test_prompts_are_the_gists():
    lines = ["<reasoning>", "...", "</reasoning>", "<answer>", "...", "</answer>", ""]
    lines = ["", "Respond in the following format:", "", *lines]
    assert "\n".join(lines) == grpo_demo.SYSTEM_PROMPT
    perfect = grpo_demo.XML_COT_FORMAT.format(reasoning="a", answer="b")
    assert perfect == "<reasoning>\na\n</reasoning>\n<answer>\nb\n</answer>\n"
    zero, one = grpo_demo.make_prompt("Q?"), grpo_demo.make_prompt("Q?", one_shot=True)
    assert [m["role"] for m in zero] == ["system", "user"] and zero[1]["content"] == "Q?"
    assert [m["role"] for m in one] == ["system", "user", "assistant", "user"]
    assert one[1]["content"] == "What is the largest single-digit prime number?"
    assert one[2]["content"].endswith("<answer>\n7\n</answer>\n")


def test_every_constant_is_a_flag(defaults):
    constants = {name.lower() for name in vars(grpo_demo) if name.isupper()}
    known = set(vars(defaults[0])) | set(vars(defaults[1]))
    texts = {"system_prompt", "xml_cot_format", "one_shot_question", "one_shot_reasoning"}
    assert constants - known == texts


def test_own_fields_have_the_constants_as_defaults():
    """A DemoConfig made in Python, without the command line, has them too."""
    trl_fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    fields = dataclasses.fields(DemoConfig)
    own = {field.name: field.default for field in fields if field.name not in trl_fields}
    flags = {"eval_only": False, "estimate_memory": False, "overwrite_output": False}
    constants = {name: getattr(grpo_demo, name.upper()) for name in own.keys() - flags.keys()}
    assert own == constants | flags


def test_flags_over_yaml_over_constants(tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text("use_cpu: true\nlearning_rate: 1e-4\nbeta: 0.1\n")
    monkeypatch.setattr(grpo_demo, "SEED", 7)  # a constant edited by a learner
    flags = ["--beta", "0.2", "--use_peft", "--lora_r", "8"]
    args, model_args = parse_args(["--config", str(file), *flags])
    assert (args.learning_rate, args.beta, args.seed, args.top_k) == (1e-4, 0.2, 7, 50)
    assert model_args.use_peft and model_args.lora_r == 8


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--learning_rat", "1"], "--learning_rat; did you mean --learning_rate"),
        (["--max-prompt-lenght", "1"], "--max-prompt-lenght; did you mean --max_prompt_length"),
        (["--learning", "1"], "--learning"),  # no abbreviations
        (["--xyzzy", "1"], "--xyzzy; --help"),  # near no other
        (["-max_steps", "1"], "-max_steps; did you mean --max_steps"),
        (["--confg", "x"], "--confg; did you mean --config"),
        (["--beta", "much"], "--beta"),
        (["--config"], "--config"),
        (["--config=nowhere.yaml"], "nowhere.yaml: there is no such YAML file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: there is no such YAML file"),
        (["--config", "assets"], "assets: there is no such YAML file"),
        ([*LAPTOP, "--config=nowhere.yaml"], "nowhere.yaml: there is no such YAML file"),
        (["--gradient_accumulation_steps", "1"], "num_generations .*gradient_accumulation_steps"),
        (["--num_generations", "48"], "num_generations .*gradient_accumulation_steps"),
        (["--generation_batch_size", "24"], "num_generations"),
        (["--trust_remote_code"], "trust_remote_code"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint"),
        (["--push_to_hub"], "hf upload"),
        (["--hub_token", "x"], "HF_TOKEN"),
    ],
)
def test_wrong_flags_are_named(flags, named):
    with pytest.raises(UserError, match=named):
        parse_args(["--use_cpu", *flags])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_rat: 1\n", "learning_rat; did you mean learning_rate"),
        ("system_prompt: short\n", "system_prompt; --help"),  # a constant, but no flag
        ("1: 2\n", "1; --help"),
        ("config: other.yaml\n", "bad.yaml: unknown key config"),
        ("- a\n", "bad.yaml: it must hold lines of YAML"),
        ("LEARNING_RATE: 1\n", "LEARNING_RATE; did you mean learning_rate"),
        ("a: [\n", "bad.yaml: while parsing"),
        ("beta: much\n", "bad.yaml: argument --beta: invalid float value: 'much'"),
        ("optim: adm\n", "bad.yaml: argument --optim: invalid choice: 'adm'"),
    ],
)
def test_wrong_yaml_is_named(tmp_path, text, named):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=named):
        parse_args(["--use_cpu", "--config", str(tmp_path / "bad.yaml")])


@pytest.mark.parametrize(("name", "value"), [("BETA", "much"), ("TOP_K", 5.5), ("EVALUATE", 2)])
def test_a_constant_is_as_strict_as_a_flag(monkeypatch, name, value):
    monkeypatch.setattr(grpo_demo, name, value)
    with pytest.raises(UserError, match=f"grpo_demo.py: argument --{name.lower()}.*'{value}'"):
        parse_args(["--use_cpu"])


def test_a_misspelt_constant_is_named(monkeypatch):
    monkeypatch.setattr(grpo_demo, "MY_FOLDER", "x", raising=False)  # a user's own is none
    parse_args(["--use_cpu"])
    monkeypatch.setattr(grpo_demo, "BTA", 0.04, raising=False)
    with pytest.raises(UserError, match="unknown constant BTA; did you mean BETA"):
        parse_args(["--use_cpu"])


def test_settings_made_in_python_are_checked_too():
    for settings in ({"beta": -1}, {"push_to_hub": True}, {"max_completion_length": 0}):
        with pytest.raises(UserError, match=f"--{next(iter(settings))}"):
            DemoConfig(use_cpu=True, **settings)


def test_the_first_unknown_key_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("zzz: 1\nfoo: 2\nlearning_rat: 3\n")
    with pytest.raises(UserError, match="unknown key zzz"):
        parse_args(["--config", str(tmp_path / "bad.yaml")])


def test_of_several_yaml_files_the_last_one_wins(tmp_path):
    (tmp_path / "mine.yaml").write_text("beta: 0.1\nseed: 3\n")
    args, _ = parse_args([*LAPTOP, f"--config={tmp_path}/mine.yaml", "--seed", "4"])
    assert (args.beta, args.seed, args.output_dir) == (0.1, 4, "outputs/tiny")


def test_the_list_of_flags_is_that_of_the_packages():
    listed = json.loads(FLAGS.read_text())
    assert listed == collect(), "python -m assets.research.flags mends it"
    names = {options["dest"] for _, _, options in listed}
    assert {field.name for config in CONFIGS for field in dataclasses.fields(config)} - names == {
        "parallelism_config"  # only Python can write it
    }
    assert names >= {name for _, many in RANGES.values() for name in many.split()} | {*CHOICES}


def read_with(parser: argparse.ArgumentParser, flag: str, text: str) -> object:
    """Return the value that a parser gives a setting for a text; "refused" if it takes none."""
    try:
        return vars(parser.parse_args([f"--{flag}={text}"]))[flag]
    except (argparse.ArgumentError, UserError):
        return "refused"


def test_a_flag_reads_what_it_reads_in_trls_parser():
    ours, theirs = Parser(""), TrlParser(CONFIGS, allow_abbrev=False, exit_on_error=False)
    stricter = {*CHOICES, "parallelism_config", "liger_kernel_config"}
    flags = [name for name in ours.takes if not name.endswith("_kwargs") and name not in stricter]
    for flag in flags:
        for text in ("7", "0.5", "1e-5", "-1", "true", "no", "abc", "", '{"a": 1}', "a b"):
            assert read_with(ours, flag, text) == read_with(theirs, flag, text), (flag, text)
    numbers = [name for name in flags if "None" in ours.takes[name]]
    assert len(flags) > 200 and {"save_total_limit", "min_p"} <= {*numbers}
    assert read_with(ours, "min_p", "None") is None and read_with(ours, "beta", "None") == "refused"


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--help"], 0, "The initial learning rate for AdamW. (default: 5e-06)"),
        (["--learning_rat", "1"], 2, "did you mean --learning_rate?"),
        (["--config", "{bad}"], 2, "bad.yaml: unknown key learning_rat; did you mean"),
        (["--config", "nowhere.yaml"], 2, "there is no such YAML file"),
        (["--config", "{slow}"], 2, "argument --beta: invalid float value: 'much'"),
        (["--beta", "much"], 2, "argument --beta: invalid float value: 'much'"),
        (["--save_total_limit", "1.5"], 2, "invalid int value: '1.5'"),
        (["--generation_kwargs", '{{"temperature":'], 2, "--generation_kwargs"),
        (["--chat_template_kwargs", "x"], 2, "'x' is no JSON mapping"),
        (["--bf16", "perhaps"], 2, "'perhaps' is neither True nor False"),
        (["--optim", "adm"], 2, "invalid choice: 'adm'"),
        (["--beta", "-1"], 2, "--beta -1.0: it must be 0 or above"),
        (["--loss_type", "foo"], 2, "--loss-type: invalid choice: 'foo'"),
        (["--push_to_hub"], 2, "hf upload"),
    ],
)
def test_what_needs_no_package_comes_at_once(tmp_path, flags, status, said):
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
    (tmp_path / "slow.yaml").write_text("use_cpu: true\nlearning_rate: 1e-4\nbeta: much\n")
    files = {file.stem: file for file in tmp_path.iterdir()}
    flags = [flag.format(**files) for flag in flags]
    done = command(*flags, launcher=(sys.executable, "-X", "importtime"))
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert done.returncode == status and said in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == len(imports) + status // 2  # one line of error
    assert not any(name in line for line in imports for name in ("torch", "transformers", "trl"))


def test_no_gpu_names_the_laptop_command(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"on a laptop add --config assets/tiny/config.yaml"):
        parse_args([])


def test_several_gpus_need_a_launcher(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    wanted = "--num_processes 4 grpo_demo.py --gradient_accumulation_steps 16"
    with pytest.raises(UserError, match=f"accelerate launch {wanted}"):
        parse_args([])


def test_a_card_without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    emulates = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(
        UserError, match=r"Tesla T4 .*assets/cards/16gb.yaml.*--fp16 True --dtype float32"
    ):
        parse_args([])


def check_one_line_and_no_file(errors: str, named: str, out: Path) -> None:
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert named in line and "Traceback" not in errors and len(line) < 900
    assert not any(path.is_file() for path in out.rglob("*"))


def refuse(argv: list[str], named: str, out: Path, capsys) -> None:
    """Run the script; check that it ends with status 2, one line that has `named`, and no file."""
    with pytest.raises(SystemExit) as stopped:
        grpo_demo.main([*LAPTOP, *QUICK, *argv])
    assert stopped.value.code == 2
    check_one_line_and_no_file(capsys.readouterr().err, named, out)


WRONG = """
    --no_such_flag 1
    --learning 1
    --beta much
    --beta nan
    --beta -1
    --beta inf
    --learning_rate nan
    --learning_rate inf
    --learning_rate -1e-5
    --learning_rate
    --adam_beta1 1.5
    --adam_beta2 2
    --adam_epsilon 0
    --weight_decay -1
    --max_grad_norm -1
    --max_grad_norm nan
    --warmup_steps -1
    --num_train_epochs 0
    --num_train_epochs -1
    --num_train_epochs nan
    --max_steps 0
    --max_steps -2
    --max_steps 1.5
    --num_generations 0
    --num_generations -8
    --num_generations 1
    --num_generations 7
    --num_iterations 0
    --per_device_train_batch_size 0
    --per_device_train_batch_size -1
    --per_device_train_batch_size 4
    --gradient_accumulation_steps 0
    --generation_batch_size 7
    --steps_per_generation 0
    --per_device_eval_batch_size 0
    --per_device_eval_batch_size -4
    --eval_samples -5
    --max_completion_length 0
    --max_completion_length -1
    --max_completion_length 5000
    --max_prompt_length 0
    --temperature 0
    --temperature -1
    --temperature nan
    --top_p 0
    --top_p 1.5
    --top_k -1
    --min_p 2
    --repetition_penalty 0
    --generation_kwargs '{"temperature":0}'
    --generation_kwargs '{"temperature":"hot"}'
    --generation_kwargs '{"temperature":2}'
    --generation_kwargs '{"temprature":1}'
    --generation_kwargs [
    --generation_kwargs 3
    --generation_kwargs '[1]'
    --cache_implementation foo
    --epsilon -1
    --loss_type foo
    --scale_rewards foo
    --scale_rewards True
    --importance_sampling_level foo
    --reward_weights 1 1
    --reward_weights 1 1 1 1 1 1
    --reward_weights a
    --reward_weights nan 1 1 1 1
    --reward_weights 1 inf 1 1 1
    --optim foo
    --optim adamw_bnb_8bit
    --optim galore_adamw
    --lr_scheduler_type foo
    --lr_scheduler_type cosine_with_min_lr
    --report_to nobody
    --report_to tensorboard
    --logging_strategy no
    --logging_steps 0
    --logging_steps -1
    --save_strategy foo
    --save_steps 0
    --save_steps -1
    --save_total_limit 0
    --save_only_model
    --num_completions_to_print -1
    --seed -1
    --project a/b
    --dtype foo
    --attn_implementation foo
    --attn_implementation flash_attention_2
    --load_in_4bit --load_in_8bit
    --load_in_4bit
    --use_peft --lora_r 0
    --use_peft --lora_alpha -1
    --use_peft --lora_dropout 2
    --use_peft --lora_target_modules nothing
    --use_vllm
    --use_liger_kernel True
    --vllm_mode foo
    --fp16 True --bf16 True
    --trust_remote_code
    --resume_from_checkpoint x
    --push_to_hub
    --hub_token x
    --auto_find_batch_size
    --model_name_or_path ''
    --dataset_name ''
    --output_dir ''
    --run_name ''
    --project ''
    --model_name_or_path nobody/nothing
    --model_name_or_path /no/where
    --model_name_or_path assets/research/runs
    --model_revision nowhere --model_name_or_path nobody/nothing
    --dataset_name nobody/nothing
    --dataset_name /no/where
    --dataset_name assets/nowhere
    --dataset_name README.md
    --config nowhere.yaml
    --config README.md
    --output_dir README.md
    --output_dir README.md/under
    --output_dir /dev/null/under
    --output_dir /proc/nothing
    --output_dir . --overwrite_output
    --output_dir assets
    --output_dir assets/tiny/model.safetensors
""".strip().splitlines()


SAID = {  # by libraries, in other words than the flag
    "--per_device_train_batch_size 4": "generation_batch_size (4)",
    "--num_generations 1": "at least 2 generations",
    "--attn_implementation flash_attention_2": "FlashAttention2",
    "--load_in_4bit --load_in_8bit": "8 bit and 4 bit",
    "--load_in_4bit": "bitsandbytes",
}
OPTIONS = {"do_sample": False}  # of generation, each with a value that is none of its defaults
FIXED = [
    f"--generation_kwargs '{json.dumps({name: OPTIONS.get(name, 2)})}'"
    for name in " ".join(FIXED_OPTIONS.values()).split()
]


@pytest.mark.parametrize(
    "flags", [*WRONG, *FIXED, f"--output_dir {'x' * 300}"], ids=lambda f: f.strip()[:60]
)
def test_wrong_input_is_one_line_with_its_name_and_status_2(tmp_path, capsys, flags):
    tracked = subprocess.check_output(["git", "status", "--short"], cwd=ROOT)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        grpo_demo.main([*LAPTOP, *QUICK, "--output_dir", str(out), *shlex.split(flags)])
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and "Traceback" not in errors and "shows where" not in line
    names = [part.removeprefix("--") for part in shlex.split(flags) if part.startswith("--")]
    values = [part for part in shlex.split(flags) if len(part) > 3 and not part.startswith("-")]
    assert any(text in line for text in [SAID.get(flags.strip()), *names, *values] if text)
    assert len(line) < 900 and not any(path.is_file() for path in out.rglob("*"))
    assert tracked == subprocess.check_output(["git", "status", "--short"], cwd=ROOT)


@pytest.mark.parametrize(
    "text",
    [
        "beta: null",
        "max_grad_norm: null",
        "temperature: null",
        "evaluate: null",
        "model_name_or_path: null",
        "output_dir: ''",
        "top_k: 5.5",
        "max_completion_length: 4.5",
        "save_total_limit: 1.5",
        "max_steps: 2.5",
        "eval_samples: 8.5",
        "eval_samples: true",
        "evaluate: 2",
        "learning_rate: true",
        "learning_rate: [1e-5]",
        "beta: {a: 1}",
        "bf16: maybe",
        "reward_weights: [a, 1, 1, 1, 1]",
        "reward_weights: [null, 1, 1, 1, 1]",
        "reward_weights: 1",  # one, as with a flag
        "reward_weights: [[1], 1, 1, 1, 1]",
        "generation_kwargs: [1]",
        "generation_kwargs: 3",
        "loss_type: [grpo]",
        "run_name: [a]",
        "report_to: {a: 1}",
    ],
)
def test_a_value_in_yaml_is_as_strict_as_a_flag(tmp_path, capsys, text):
    """The laptop's file with one line more, which counts if a key is there twice."""
    file = tmp_path / "mine.yaml"
    quick = f"max_steps: 1\neval_samples: 4\noutput_dir: {tmp_path / 'out'}\n"
    file.write_text(Path(LAPTOP[1]).read_text() + quick + text)
    with pytest.raises(SystemExit) as stopped:
        grpo_demo.main(["--config", str(file)])
    assert stopped.value.code == 2
    check_one_line_and_no_file(capsys.readouterr().err, text.split(":")[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


def test_values_in_yaml_become_what_flags_become(tmp_path):
    lines = {
        "run_name": "2024-01-01",  # a date, for YAML
        "learning_rate": "1e-5",  # a text, for YAML
        "beta": "0",
        "save_total_limit": "null",
        "evaluate": "no",
        "report_to": "none",
        "reward_weights": "[1, 2, 3, 4, -1.0e-5]",
        "lora_target_modules": "[q_proj, v_proj]",
        "generation_kwargs": "{temperature: 0.5}",
        "scale_rewards": "batch",
        "project": "7",
        "optim_target_modules": "[a]",
        "include_for_metrics": "[a, b]",
        "lora_modules_to_save": "[]",
        "chat_template_kwargs": "{date: '2024', thinking: 'true', day: 2024-01-01}",
    }
    file = tmp_path / "mine.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    args, model_args = parse_args(["--use_cpu", "--config", str(file)])
    found = {name: getattr(args, name, None) for name in lines}
    for name in ("lora_target_modules", "lora_modules_to_save"):
        found[name] = getattr(model_args, name)
    wanted = {
        "run_name": "2024-01-01",
        "learning_rate": 1e-5,
        "beta": 0.0,
        "save_total_limit": None,
        "evaluate": False,
        "report_to": [],
        "reward_weights": [1.0, 2.0, 3.0, 4.0, -1e-5],
        "lora_target_modules": ["q_proj", "v_proj"],
        "generation_kwargs": {"temperature": 0.5},
        "scale_rewards": "batch",
        "project": "7",
        "optim_target_modules": ["a"],
        "include_for_metrics": ["a", "b"],
        "lora_modules_to_save": [],
        "chat_template_kwargs": {"date": "2024", "thinking": "true", "day": date(2024, 1, 1)},
    }
    assert found == wanted
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in wanted.items()
    }


@pytest.mark.parametrize(
    "env",
    [{"WANDB_MODE": "foo"}, {"WANDB_PROJECT": "a/b"}, {"WANDB_API_KEY": "abc", "WANDB_MODE": ""}],
    ids=lambda env: next(iter(env)),
)
def test_wrong_environment_is_one_line(tmp_path, monkeypatch, capsys, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    refuse(["--output_dir", str(out)], "W&B", out, capsys)
    assert not out.exists()


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_a_package_that_is_missing_is_named(tmp_path):
    """In a process of its own: transformers keeps the half-made configuration."""
    done = run(*LAPTOP, "--deepspeed", "nosuch.json", "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    check_one_line_and_no_file(done.stderr, "deepspeed", tmp_path / "out")


def test_an_output_directory_that_is_a_dangling_link(tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refuse(["--output_dir", str(tmp_path / "link")], "link", tmp_path, capsys)


def test_a_misspelt_flag_is_named_before_the_missing_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
    for flags in (["--learning_rat", "1"], ["--config", str(tmp_path / "bad.yaml")]):
        with pytest.raises(UserError, match="learning_rat"):
            parse_args(flags)


def test_the_command_exits_with_status_2(tmp_path):
    flags = ["--output_dir", tmp_path / "out", "--use_cpu", "False"]
    done = command(*LAPTOP, *flags, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    check_one_line_and_no_file(done.stderr, "assets/tiny/config.yaml", tmp_path / "out")


def test_importing_has_no_side_effects(tmp_path):
    code = "import grpo_demo, rewards, wandb; print('wandb.run', wandb.run)"
    env = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"} | {"PYTHONPATH": str(ROOT)}
    python = [sys.executable, "-c", code]
    done = subprocess.run(python, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("wandb.run None\n", 0)
    assert list(tmp_path.iterdir()) == []
