"""Other models: templates, tokenizers, stop tokens, layers, positions; on the laptop's weights."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import trl
from conftest import LAPTOP
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import grpo_demo
from assets.evaluate import generate
from assets.settings import UserError

torch.set_num_threads(1)  # the model is small: more threads wait longer than they compute
END, TEXT_END, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"  # ids 2, 0 and 1
REAL = Path(trl.__file__).parent / "chat_templates"  # of many models, as they are released
TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
CHATML = Path("assets/tiny/chat_template.jinja").read_text()
TOKENS = {  # which a template needs
    "llama3_2": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "gemma3": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}


def make_model(
    folder: Path, template: str | None = CHATML, stops: object = (), more=(), **tokens: str | None
) -> Path:
    """Return a copy of the laptop model with another template, stop tokens and special tokens.

    template  its text, or the name of one of TRL's files
    stops     tokens in generation_config.json: one, or a list
    more      special tokens to add
    tokens    eos_token and others of the tokenizer; None: it has none
    """
    shutil.copytree("assets/tiny", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | tokens
    known = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(known))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if more := [*more, *TOKENS.get(template, [])]:
        tokenizer.add_tokens(more, special_tokens=True)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(folder)
    file = REAL / f"{str(template)[:40]}.jinja"
    tokenizer.chat_template = file.read_text() if file.exists() else template
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
    return grpo_demo.build_trainer(args, model_args, data.select(range(rows)))


def warnings(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


ENDS = {  # the same stop token, said in different ways: tokenizer, generation config
    "pad differs": ({"eos_token": END, "pad_token": TEXT_END}, END),
    "no pad": ({"eos_token": END, "pad_token": None}, END),
    "no file": ({"eos_token": END}, ()),
    "Qwen's GGUF": ({"eos_token": TEXT_END, "pad_token": TEXT_END}, [END, TEXT_END]),
    "no eos": ({"eos_token": None, "pad_token": None}, END),
    "other settings": ({"eos_token": END}, END),
    "template only": ({"eos_token": None, "pad_token": None}, ()),
}


LEAKS = {"min_p": 0.99, "suppress_tokens": [5], "no_repeat_ngram_size": 2, "typical_p": 0.5}
LEAKS |= {"num_beams": 2, "min_new_tokens": 9, "num_return_sequences": 2, "top_k": 3}
LEAKS |= {"temperature": 0.3, "top_p": 0.5, "repetition_penalty": 1.3, "max_length": 300}


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
    file = make_model(tmp_path, stops=stops, **tokens) / "generation_config.json"
    if case == "other settings":  # neither samples nor greedy answers obey them
        file.write_text(json.dumps(json.loads(file.read_text()) | LEAKS))
    got = outcome(tmp_path)
    assert len(plain["completions"]) == 32 and len(plain["logs"]) == 2
    assert 5 < plain["logs"][0][2] < 64 and not all(row["truncated"] for row in got["answers"])
    for name in ("answers", "completions", "logs"):
        assert got[name] == plain[name], name
    assert all(torch.equal(p, plain["weights"][name]) for name, p in got["weights"].items())


OFF = "enable_thinking"
FAMILIES = {  # template, flags, eos, stop tokens of the file, parts of the expected lines
    "Qwen2.5": ("qwen2_5", (), END, [END, TEXT_END], []),
    "Qwen3": ("qwen3", (), END, [END, TEXT_END], [("<think>", OFF)]),
    "Qwen3 off": ("qwen3", (f'--chat_template_kwargs={{"{OFF}": false}}',), END, [END], []),
    "Qwen3.5": ("qwen3_5_think", (), END, [END], [("trims",), ("<think>", OFF)]),
    "Llama 3.2": ("llama3_2", (), "<|eot_id|>", ["<|eot_id|>"], [("trims",)]),
    "Llama base": ("llama3_2", (), TEXT_END, [TEXT_END],
                   [("trims",), ("<|eot_id|>", TEXT_END, "[1003, 0]")]),
    "Gemma 3": ("gemma3", (), TEXT_END, [TEXT_END, "<end_of_turn>"], [("trims",)]),
    "Phi-3": ("phi3", (), "<|end|>", ["<|end|>"], []),
    "R1": ("deepseek_r1_distill", (), TEXT_END, TEXT_END, [("end▁of▁sentence",), ("<think>",)]),
    "no token": (CHATML.replace("im_", "IM_"), (), END, END, [("<|IM_end|>", END)]),
    "Qwen base": (CHATML, (), TEXT_END, TEXT_END, [(END, TEXT_END, "[2, 0]")]),
    "long prompts": (CHATML, ("--max_prompt_length=9",), END, END, [("16 of 16 prompts",)]),
    "eos starts a turn": (CHATML, (), START, END, [(START, END)]),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_one_line_for_each_thing_that_does_not_fit(tmp_path, capsys, case):
    template, flags, eos, stops, expected = FAMILIES[case]
    folder = make_model(tmp_path, template, stops, eos_token=eos, bos_token=None)
    trainer = prepare(folder, "--one_shot", "True", "--beta", "0", *flags)
    lines = warnings(capsys)
    assert len(lines) == len(expected), lines
    for line, parts in zip(lines, expected, strict=True):
        assert all(part in line for part in parts), line
    ids, _, _ = trainer._tokenize_prompts([trainer.train_dataset["prompt"][0]])
    text = trainer.processing_class.decode(ids[0])
    messages = [message["content"].strip() for message in trainer.train_dataset["prompt"][0]]
    assert [text.count(content) for content in messages] == [1, 1, 1, 1]
    assert trainer.train_dataset["prompt"][0][2]["content"] in text  # with its last newline


def letters(folder: Path) -> None:
    """Give the model a tokenizer of single letters, as some conversions from GGUF do."""
    known = {chr(code): code - 29 for code in range(32, 127)} | {"\n": 98}
    special = {TEXT_END: 0, START: 1, END: 2}
    plain = Tokenizer(models.WordLevel({**special, **known}, unk_token=TEXT_END))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def another_class(folder: Path) -> None:
    """Name another kind's class in tokenizer_config.json, as copies of R1 distills do."""
    changes = {"tokenizer_config": ("tokenizer_class", "LlamaTokenizerFast")}
    for name, change in (changes | {"config": ("model_type", "llama")}).items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict([change])))


BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
BROKEN = {  # what is done to the model's folder, what the error or warning names
    "tags are special": (lambda f: make_model(f, more=TAGS, eos_token=END), TAGS),
    "another tokenizer's class": (another_class, ["tokenizer_class"]),
    "single letters": (letters, ["tokenizer"]),
    "no template": (lambda f: make_model(f, None, END), ["chat_template.jinja"]),
    "a template that refuses": (lambda f: make_model(f, "{{ raise_exception('no') }}"), ["no"]),
    "no stop token": (lambda f: make_model(f, BARE, eos_token=None, pad_token=None), ["eos_token"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_the_rewards_could_not_see_is_refused(tmp_path, capsys, case):
    change, named = BROKEN[case]
    change(make_model(tmp_path, eos_token=END, stops=END))
    try:
        prepare(tmp_path)
        said = "".join(warnings(capsys))
    except UserError as error:
        said = str(error)
    assert said and all(name in said for name in named), said


def test_a_prompt_begins_with_one_bos(tmp_path):
    """The template writes it, and the tokenizer would add one too."""
    bos = "<|begin_of_text|>"
    folder = make_model(tmp_path, "llama3_2", "<|eot_id|>", eos_token="<|eot_id|>", bos_token=bos)
    trainer = prepare(folder)
    trainer.processing_class.add_bos_token = True
    ids, _, _ = trainer._tokenize_prompts([trainer.train_dataset["prompt"][0]])
    assert ids[0].count(trainer.processing_class.bos_token_id) == 1


def other_architecture(folder: Path, kind: str, **sizes: int) -> Path:
    """Return a random model of another architecture, with the laptop's tokenizer."""
    shutil.copytree("assets/tiny", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = {name: tokenizer.eos_token_id for name in ("eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), bos_token_id=0, **ends, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_lora_names_the_layers_that_it_leaves_out(tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    folder = other_architecture(tmp_path, "phi3", num_attention_heads=2, **sizes)
    prepare(folder, "--use_peft")
    (line,) = warnings(capsys)
    assert "qkv_proj" in line and "gate_up_proj" in line and "lm_head" not in line
    kinds = line.partition("--lora_target_modules ")[2].split()
    prepare(folder, "--use_peft", "--lora_target_modules", *kinds)
    assert warnings(capsys) == []


def test_a_model_with_absolute_positions_is_refused(tmp_path):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
    with pytest.raises(UserError, match="gpt2"):
        prepare(other_architecture(tmp_path, "gpt2", **sizes))


def test_an_adapter_without_its_base_or_with_another_is_refused(tmp_path):
    folder, file = tmp_path / "lora/out", tmp_path / "lora/out/adapter_config.json"
    prepare(make_model(tmp_path / "lora", eos_token=END, stops=END), "--use_peft").save_model()
    config = json.loads(file.read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()
    file.write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(UserError, match="beta"):
        prepare(folder)
    file.write_text(json.dumps(config | {"base_model_name_or_path": "models/nowhere"}))
    with pytest.raises(UserError, match="adapter's base"):
        prepare(folder)


def test_a_template_without_a_system_role_is_refused(tmp_path):
    make_model(tmp_path, "gemma", "<end_of_turn>", eos_token=TEXT_END)
    with pytest.raises(UserError, match=r"(?i)system role"):
        prepare(tmp_path)


def test_the_saved_model_keeps_every_stop_token(tmp_path):
    """transformers aligns the stop tokens with the tokenizer's when training starts."""
    folder = make_model(tmp_path, stops=[END, START], eos_token=TEXT_END, pad_token=TEXT_END)
    trainer = prepare(folder)
    trainer.train()
    trainer.save_model()
    saved = json.loads((folder / "out" / "generation_config.json").read_text())
    assert set(saved["eos_token_id"]) == {0, 1, 2} == set(trainer.eos_token_ids)
