"""Each row of the gist's settings table, pinned; flags and YAML; and every way in which settings can be wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run

import grpo_demo
from grpo_demo import UserError, parse_args

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
    "num_completions_to_print": 1,
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
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64 == args.generation_batch_size
    assert 7473 // (64 // args.num_generations) == 1868


def test_model_defaults(defaults):
    _, model_args = defaults
    assert (model_args.model_name_or_path, model_args.dtype) == ("Qwen/Qwen2.5-1.5B-Instruct", "bfloat16")
    assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (16, 64, 0.05)
    assert model_args.lora_target_modules == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "up_proj",
        "down_proj",
        "gate_proj",
    ]
    assert model_args.lora_task_type == "CAUSAL_LM" and model_args.use_peft is False


def test_prompts_are_the_gists():
    lines = [
        "",
        "Respond in the following format:",
        "",
        "<reasoning>",
        "...",
        "</reasoning>",
        "<answer>",
        "...",
        "</answer>",
    ]
    assert "\n".join([*lines, ""]) == grpo_demo.SYSTEM_PROMPT
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
    texts = {"system_prompt", "xml_cot_format", "one_shot_question", "one_shot_reasoning", "reward_funcs"}
    assert constants - known == texts


def test_flags_over_yaml_over_constants(tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text("use_cpu: true\nlearning_rate: 1e-4\nbeta: 0.1\n")
    monkeypatch.setattr(grpo_demo, "SEED", 7)  # a constant edited by a learner
    args, model_args = parse_args(["--config", str(file), "--beta", "0.2", "--use_peft", "--lora_r", "8"])
    assert (args.learning_rate, args.beta, args.seed, args.top_k) == (1e-4, 0.2, 7, 50)
    assert model_args.use_peft and model_args.lora_r == 8


def test_llama_has_its_own_directory():
    args, _ = parse_args(["--use_cpu", "--model_name_or_path", "meta-llama/Llama-3.2-1B-Instruct"])
    assert (args.output_dir, args.run_name) == ("outputs/Llama-1B-GRPO", "Llama-1B-GRPO-gsm8k")


def test_vllm_and_continuous_batching_are_flags():
    assert parse_args(["--use_cpu", "--use_vllm", "--vllm_mode", "colocate"])[0].use_vllm
    assert parse_args(["--use_cpu", "--use_transformers_continuous_batching"])[0].use_transformers_continuous_batching


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--learning_rat", "1"], "--learning_rat"),
        (["--learning", "1"], "--learning"),  # no abbreviations
        (["--beta", "much"], "much"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config"], "--config"),
        (["--gradient_accumulation_steps", "1"], "num_generations"),
        (["--num_generations", "1"], "2 generations"),
        (["--lr_scheduler_type", "saw"], "saw"),
        (["--trust_remote_code"], "trust_remote_code"),
        (["--resume_from_checkpoint", "x"], "the same command again resumes"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_flags_are_named(flags, named):
    with pytest.raises(UserError, match=named):
        parse_args(["--use_cpu", *flags])


@pytest.mark.parametrize(
    ("text", "named"),
    [("learning_rat: 1\n", "learning_rat"), ("- a\n", "mapping"), ("a: [\n", "settings"), ("beta: much\n", "much")],
)
def test_wrong_yaml_is_named(tmp_path, text, named):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=named):
        parse_args(["--use_cpu", "--config", str(tmp_path / "bad.yaml")])


def test_no_gpu_names_the_laptop_command(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"python grpo_demo.py --config assets/tiny/config.yaml"):
        parse_args([])


def test_several_gpus_need_a_launcher(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(
        UserError, match=r"Use 4: accelerate launch --num_processes 4.*steps 16.*CUDA_VISIBLE_DEVICES=0"
    ):
        parse_args([])


def test_a_card_without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(UserError, match=r"Tesla T4 has no bf16: add --bf16 False --fp16 True --dtype float32"):
        parse_args([])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--no_such_flag 1", "--no_such_flag"),
        ("--model_name_or_path nobody/nothing", "nobody/nothing"),
        ("--dataset_name nobody/nothing", "nobody/nothing"),
        ("--reward_weights 1 1", "reward weights"),
        ("--use_vllm", "vLLM"),
        ("--use_cpu False", "python grpo_demo.py --config assets/tiny/config.yaml"),
    ],
    ids=["flag", "model", "dataset", "weights", "vllm", "gpu"],
)
def test_errors_are_one_line_and_status_2(tmp_path, flags, named):
    config = ["--config", "assets/tiny/config.yaml", "--output_dir", tmp_path / "out"]
    done = run(*config, *flags.split(), env={"CUDA_VISIBLE_DEVICES": ""})
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and named in lines[0], done.stderr
    assert "Traceback" not in done.stderr and not any(f.is_file() for f in (tmp_path / "out").rglob("*"))


def test_importing_has_no_side_effects(tmp_path):
    code = "import grpo_demo, rewards, wandb; print('wandb.run', wandb.run)"
    env = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode, list(tmp_path.iterdir())) == ("wandb.run None\n", 0, [])
    for name in [
        "SYSTEM_PROMPT",
        "XML_COT_FORMAT",
        "get_gsm8k_questions",
        "parse_args",
        "build_trainer",
        "evaluate",
        "main",
    ]:
        assert hasattr(grpo_demo, name)


def test_nothing_knows_the_embedded_model():
    texts = [(ROOT / name).read_text() for name in ("grpo_demo.py", "rewards.py", "assets/keep.py")]
    code = "".join(text.split('"""', 2)[2] for text in texts)
    assert code.count("tiny") == 1 and "--config assets/tiny/config.yaml" in code
    assert json.dumps(sorted(p.name for p in (ROOT / "assets/tiny").iterdir() if p.suffix == ".py")) == '["make.py"]'
