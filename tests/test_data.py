"""Datasets: local folders, bad rows, long prompts, and the real GSM8K; the embedded one."""

import importlib.util
import json

import pytest
from conftest import GSM8K, ROOT, gsm8k, needs_gsm8k
from transformers import AutoTokenizer

import grpo_demo
from grpo_demo import UserError, get_gsm8k_questions

GOOD = json.dumps({"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"})


def folder(tmp_path, *lines: str, split: str = "train"):
    (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path)


def test_a_local_folder(tmp_path):
    rows = get_gsm8k_questions("train", folder(tmp_path, GOOD, GOOD, ""))
    assert rows.column_names == ["prompt", "question", "answer"] and len(rows) == 2
    assert rows[0]["answer"] == "4" and rows[0]["prompt"] == grpo_demo.make_prompt("How many?")


def test_one_shot(tmp_path):
    rows = get_gsm8k_questions("train", folder(tmp_path, GOOD), one_shot=True)
    assert len(rows[0]["prompt"]) == 4


def test_bad_rows_are_counted_in_one_line(tmp_path, capsys):
    bad = [
        '{"question": "a", "answer": "no hashes"}',
        '{"question": "a", "answer": "#### many"}',
        '{"question": "a"}',
        '{"question": 3, "answer": "#### 1"}',
        '{"question": null, "answer": "#### 1"}',
        '["a"]',
        '{"quest',
    ]
    assert len(get_gsm8k_questions("train", folder(tmp_path, GOOD, *bad))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "7 of 8 train rows left out" in line
    assert all(part in line for part in ["2 with no number after '####'", "4 with no text in", "1 with no JSON"])


@pytest.mark.parametrize(
    "lines", [[], ["", " "], ['{"a": 1}'], ["not json"]], ids=["empty", "blank", "columns", "json"]
)
def test_no_usable_row_is_an_error(tmp_path, lines):
    with pytest.raises(UserError, match="no usable row in the train split"):
        get_gsm8k_questions("train", folder(tmp_path, *lines))


def test_a_missing_split_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no split 'test'.*test\.jsonl"):
        get_gsm8k_questions("test", folder(tmp_path, GOOD))


def test_odd_characters_and_bytes(tmp_path):
    row = {"question": "caf\u00e9 \u2028 \u0085 \U0001f600?", "answer": "#### 1"}
    (tmp_path / "train.jsonl").write_bytes(
        json.dumps(row, ensure_ascii=False).encode() + b"\n\xff\xfe\n" + GOOD.encode()
    )
    rows = get_gsm8k_questions("train", str(tmp_path))
    assert [r["question"] for r in rows] == [row["question"], "How many?"]


def test_long_prompts_are_reported_and_kept(tmp_path, capsys):
    args, model_args = grpo_demo.parse_args(
        f"--config assets/tiny/config.yaml --output_dir {tmp_path}/out --report_to none --max_prompt_length 60".split()
    )
    rows = get_gsm8k_questions("train", "assets/tiny")
    trainer = grpo_demo.build_trainer(args, model_args, rows)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
    ids = tokenizer.apply_chat_template(rows["prompt"][:], add_generation_prompt=True)["input_ids"]
    assert f"{sum(len(i) > 60 for i in ids)} of {len(rows)} prompts have more than 60 tokens" in line
    assert trainer.train_dataset["prompt"][:] == rows["prompt"][:]


def test_too_few_rows_for_a_step(tmp_path):
    args, model_args = grpo_demo.parse_args(
        ["--config", "assets/tiny/config.yaml", "--output_dir", str(tmp_path / "out")]
    )
    with pytest.raises(UserError, match="1 training rows do not fill a step of 8 prompts"):
        grpo_demo.build_trainer(args, model_args, get_gsm8k_questions("train", folder(tmp_path, GOOD)))


@needs_gsm8k
def test_real_gsm8k(capsys):
    train, test = get_gsm8k_questions("train", str(GSM8K)), get_gsm8k_questions("test", str(GSM8K))
    assert (len(train), len(test)) == (7473, 1319) and capsys.readouterr().err == ""
    assert train[0]["question"] == gsm8k("train")[0]["question"]


def test_the_embedded_data():
    splits = {s: [json.loads(x) for x in (ROOT / f"assets/tiny/{s}.jsonl").open()] for s in ("train", "test")}
    questions = {s: {r["question"] for r in rows} for s, rows in splits.items()}
    assert (
        len(questions["train"]) == len(splits["train"]) == 480 and len(questions["test"]) == len(splits["test"]) == 512
    )
    assert not questions["train"] & questions["test"]
    assert all(len(get_gsm8k_questions(s, "assets/tiny")) == len(splits[s]) for s in splits)
    assert sum(f.stat().st_size for f in (ROOT / "assets/tiny").iterdir() if f.is_file()) < 4_000_000


def test_the_embedded_model_is_an_ordinary_directory():
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12?"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\n12?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.tokenize("12") == ["1", "2"]
    config = json.loads((ROOT / "assets/tiny/config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["model_type"] == "qwen2"


def test_no_question_is_in_two_splits_of_the_maker():
    spec = importlib.util.spec_from_file_location("make", ROOT / "assets/tiny/make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    for split in ("train", "test"):
        rows = [json.loads(x) for x in (ROOT / f"assets/tiny/{split}.jsonl").open()]
        assert {make.split_of(r["question"]) for r in rows} == {split}
    rng, fixed = make.random.Random(5), {make.ONE_SHOT_QUESTION, "Equations"}
    asked = {m["content"] for _ in range(500) for m in make.sample(rng)[0] if m["role"] == "user"} - fixed
    assert len(asked) > 400 and {make.split_of(q) for q in asked} == {"pretrain"}
