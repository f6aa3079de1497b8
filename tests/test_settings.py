"""The gist's settings, pinned; constants = YAML = flags; what is refused, and how soon."""

import dataclasses
import resource
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import LAPTOP, ROOT, command
from trl import ModelConfig

import grpo_demo
from assets import settings
from assets.settings import UserError
from grpo_demo import DemoConfig, parse_args

GIST = {  # in TRL 1.16's names
    **{"learning_rate": 5e-6, "adam_beta1": 0.9, "adam_beta2": 0.99, "weight_decay": 0.1},
    **{"warmup_steps": 0.1, "lr_scheduler_type": "cosine", "logging_steps": 1, "bf16": True},
    **{"num_train_epochs": 1, "save_steps": 100, "max_grad_norm": 0.1, "report_to": ["wandb"]},
    **{"log_on_each_node": False, "num_generations": 16, "max_completion_length": 786},
    **{"beta": 0.04, "use_bias_correction_kl": False, "loss_type": "grpo", "num_iterations": 1},
    **{"vllm_importance_sampling_correction": False, "scale_rewards": "group", "top_k": 50},
    **{"temperature": 1.0, "generation_kwargs": {"temperature": 0.9}, "top_p": 1.0},
    **{"repetition_penalty": 1.0, "gradient_checkpointing": False, "optim": "adamw_torch"},
    **{"max_steps": -1, "output_dir": "outputs/Qwen-1.5B-GRPO", "one_shot": False},
    **{"run_name": "Qwen-1.5B-GRPO-gsm8k", "dataset_name": "openai/gsm8k", "project": "grpo-demo"},
    **{"dataset_config": "main", "max_prompt_length": 256, "log_completions": True},
    **{"generation_batch_size": 64, "steps_per_generation": 64},  # one step, one generate call
}
MODEL = {  # with the gist's LoRA adapter, which is off by default
    **{"model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct", "dtype": "bfloat16"},
    **{"use_peft": False, "lora_r": 16, "lora_alpha": 64, "lora_dropout": 0.05},
    **{"lora_task_type": "CAUSAL_LM", "attn_implementation": None},
    "lora_target_modules": [f"{part}_proj" for part in ("q", "k", "v", "o", "up", "down", "gate")],
}
VALUES = [  # a setting, its flag (values split at |), in YAML or as a constant, as read
    ("run_name", "2024-01-01", "2024-01-01", "2024-01-01"),
    ("project", "x=y -z", "x=y -z", "x=y -z"),
    ("hub_model_id", "7", "7", "7"),
    ("learning_rate", "1e-5", "1e-5", 1e-5),
    ("eval_steps", "0.25", "0.25", 0.25),
    ("seed", "7", "7", 7),
    ("evaluate", "False", "no", False),
    ("use_peft", "True", "true", True),
    ("report_to", "none", "none", []),
    ("loss_type", "dapo", "dapo", "dapo"),
    ("attn_implementation", "eager", "eager", "eager"),
    ("reward_weights", "1e-1|2|3|4|-1e-5", "[1e-1, 2, 3, 4, -1e-5]", [0.1, 2, 3, 4, -1e-5]),
    ("lora_target_modules", "a|b c", "[a, b c]", ["a", "b c"]),
    ("generation_kwargs", '{"temperature": 1}', "{temperature: 1}", {"temperature": 1.0}),
    ("chat_template_kwargs", '{"a": ["1", true]}', "{a: ['1', true]}", {"a": ["1", True]}),
]
FIELDS = {f.name for c in (DemoConfig, ModelConfig) for f in dataclasses.fields(c) if f.init}


def test_the_defaults_are_the_gists():
    args, model_args = parse_args(["--use_cpu"])
    assert {name: getattr(args, name) for name in GIST} == GIST
    assert {name: getattr(model_args, name) for name in MODEL} == MODEL


def test_names_from_the_sources_are_those_of_the_classes():
    names = settings.read_names(grpo_demo.__file__)
    assert names.keys() == FIELDS and sum(map(bool, names.values())) > 200  # with help
    constants = {name.lower() for name in vars(grpo_demo) if name.isupper()}
    others = "system_prompt xml_cot_format one_shot_question one_shot_reasoning reserved"
    assert constants - names.keys() == {*others.split()}


@pytest.mark.parametrize("way", ["flags", "YAML", "constants"])
def test_constants_yaml_and_flags_give_equal_values(tmp_path, monkeypatch, way):
    argv = ["--use_cpu"]
    if way == "flags":
        argv += [text for name, words, *_ in VALUES for text in (f"--{name}", *words.split("|"))]
    elif way == "YAML":
        text = "".join(f"{name}: {written}\n" for name, _, written, _ in VALUES)
        (tmp_path / "all.yaml").write_text(text)
        argv += ["--config", str(tmp_path / "all.yaml")]
    else:
        for name, _, written, _ in VALUES:
            monkeypatch.setattr(grpo_demo, name.upper(), yaml.safe_load(written), raising=False)
    args, model_args = parse_args(argv)
    found = vars(args) | vars(model_args)
    for name, *_, value in VALUES:
        assert found[name] == value and type(found[name]) is type(value), name
    assert isinstance(args.generation_kwargs["temperature"], float)  # transformers refuses 1


def test_of_constants_yaml_files_and_flags_the_last_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("use_cpu: true\nlearning_rate: 1e-4\nbeta: 0.1\ntop_k: 3\n")
    (tmp_path / "b.yaml").write_text("beta: 0.3\nsave_total_limit: null\ndataset_name: x\n")
    monkeypatch.setattr(grpo_demo, "SEED", 3 + 4)  # constants edited by a learner
    monkeypatch.setattr(grpo_demo, "TOP_K", 9)
    monkeypatch.setattr(grpo_demo, "MY_FOLDER", "x", raising=False)
    flags = ["--beta", "0.2", "--config=~/b.yaml", "--use_peft", "--lora-r", "8", "--no_evaluate"]
    args, model_args = parse_args(["--config", str(tmp_path / "a.yaml"), *flags])
    assert (args.learning_rate, args.beta, args.seed, args.top_k) == (1e-4, 0.2, 7, 3)
    assert (args.save_total_limit, args.dataset_name) == (None, "x")
    assert (model_args.use_peft, model_args.lora_r, args.evaluate) == (True, 8, False)


MISTAKES = """
    --learning_rat 1                       | learning_rat; did you mean learning_rate
    --max-prompt-lenght 1                  | max_prompt_length
    --confg x                              | did you mean config
    --bf16 False stray                     | ['stray']
    --beta much                            | --beta: invalid float value: 'much'
    --beta nan                             | --beta nan
    --learning_rate -1e-5                  | --learning_rate -1e-05
    --max_steps 0                          | --max_steps 0
    --num_generations 7                    | num_generations (7)
    --per_device_train_batch_size 4        | generation_batch_size (4)
    --temperature 0                        | --temperature 0
    --loss_type foo                        | --loss_type foo
    --loss_type cispo                      | --epsilon_high
    --scale_rewards True                   | --scale_rewards True
    --reward_weights 1 1                   | --reward_weights [1.0, 1.0]: give 5
    --reward_weights 0 0 0 0 0             | --reward_weights
    --generation_kwargs {"temperature":    | --generation_kwargs {"temperature":
    --generation_kwargs {"temperature":0}  | --temperature 0
    --generation_kwargs {"eos_token_id":1} | eos_token_id
    --generation_kwargs {"seed":1}         | seed
    --chat_template_kwargs x               | --chat_template_kwargs x
    --optim adamw_bnb_8bit                 | --optim
    --save_total_limit 0                   | --save_total_limit 0
    --data_seed 7                          | --seed
    --push_to_hub                          | hf upload
    --use_vllm                             | pip install vllm
    --config nowhere.yaml                  | nowhere.yaml
    --config README.md                     | README.md
""".strip().splitlines()


def refused(argv: list[str], named: str, capsys) -> str:
    """Run the script; return its one line of error, which must have `named`."""
    with pytest.raises(SystemExit) as stopped:
        grpo_demo.main(argv)
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and "Traceback" not in errors and len(line) < 900
    assert named in line
    return line


@pytest.mark.parametrize("row", MISTAKES, ids=lambda row: row.split("|")[0].strip())
def test_a_mistake_is_one_line_that_names_it(tmp_path, capsys, row):
    flags, _, named = row.partition("|")
    out = tmp_path / "out"
    refused([*LAPTOP, "--output_dir", str(out), *flags.split()], named.strip(), capsys)
    assert not out.exists()


IN_YAML = """
    learning_rat: 1        | key learning_rat; did you mean learning_rate
    LEARNING_RATE: 1       | key LEARNING_RATE
    1: 2                   | key 1;
    - a                    | bad.yaml
    a: [                   | bad.yaml
    beta: null             | beta
    beta: {a: 1}           | beta
    top_k: 5.5             | --top_k
    eval_samples: true     | --eval_samples
    loss_type: [grpo]      | loss_type
    generation_kwargs: [1] | generation_kwargs
""".strip().splitlines()


def test_a_mistake_in_yaml_names_file_and_key_and_one_in_a_constant_its_name(
    tmp_path, monkeypatch, capsys
):
    for text, named in (row.split(" | ") for row in IN_YAML):
        (tmp_path / "bad.yaml").write_text(text.strip() + "\n", encoding="utf-8")
        line = refused([*LAPTOP, "--config", str(tmp_path / "bad.yaml")], "bad.yaml: ", capsys)
        assert named.strip() in line
    for name, value in (("BETA", "much"), ("TOP_K", "5.5"), ("EVALUATE", "2"), ("BTA", "1")):
        with monkeypatch.context() as patch:
            patch.setattr(grpo_demo, name, value, raising=False)
            refused(["--use_cpu"], "beta" if name == "BTA" else f"--{name.lower()}", capsys)


def test_settings_made_in_python_are_checked_too():
    for name, value in (("beta", -1), ("loss_type", "x")):
        with pytest.raises(UserError, match=f"--{name}"):
            DemoConfig(use_cpu=True, **{name: value})


@pytest.mark.parametrize("found", [False, True])
def test_no_gpu_or_one_without_bf16(monkeypatch, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(UserError, match="cards/16gb.yaml" if found else "tiny/config.yaml"):
        parse_args([])


@pytest.mark.parametrize("row", ["--help 0 peak", "--beat=1 2 beta", "--config=no.yaml 2 no.yaml"])
def test_help_and_misspelt_names_need_no_package(row):
    flag, status, said = row.split()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = command(flag, launcher=(sys.executable, "-X", "importtime"))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert done.returncode == int(status) and said in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == len(imports) + int(status) // 2  # one line of error
    assert not any(name in line for line in imports for name in ("torch", "transformers", "trl"))
    assert spent < 2  # CPU seconds: about 0.2; importing the packages takes 6


def test_a_broken_pipe_is_no_traceback():
    lines = "from assets.settings import print_once\nfor i in range(9999): print_once('x' * 99)\n"
    code = f"{lines}open('/dev/stderr', 'w').write('went on')"
    head = f"{sys.executable} -c {shlex.quote(code)} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", head], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"went on")
