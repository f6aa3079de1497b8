"""Datasets: local folders, bad rows, long prompts, the real GSM8K and the embedded one."""

import gzip
import json

import pytest
from conftest import GSM8K, LAPTOP, ROOT, gsm8k, needs_gsm8k
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

import grpo_demo
from assets.common import UserError
from assets.tiny import make
from grpo_demo import get_gsm8k_questions, load_questions

GOOD = json.dumps({"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"})


def folder(tmp_path, *lines: str, split: str = "train"):
    (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path)


def laptop(tmp_path, *flags: str):
    return grpo_demo.parse_args([*LAPTOP, "--output_dir", str(tmp_path / "out"), *flags])


def test_a_local_folder(tmp_path):
    rows = get_gsm8k_questions("train", folder(tmp_path, GOOD, GOOD, ""))
    assert rows.column_names == ["prompt", "question", "answer"] and len(rows) == 2
    assert rows[0]["answer"] == "4" and rows[0]["prompt"] == grpo_demo.make_prompt("How many?")


@pytest.mark.parametrize("kind", ["gz", "json", "parquet", "hub", "saved"])
def test_datasets_as_people_have_them_on_disk(tmp_path, kind):
    splits = {split: embedded(split)[:9] for split in ("train", "test")}
    for split, rows in splits.items():
        lines = "\n".join(map(json.dumps, rows))
        if kind == "gz":
            with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt") as file:
                file.write(lines)
        elif kind == "json":
            (tmp_path / f"{split}.json").write_text(json.dumps(rows))
        elif kind == "parquet":
            Dataset.from_list(rows).to_parquet(tmp_path / f"{split}.parquet")
        elif kind == "hub":
            Dataset.from_list(rows).to_parquet(tmp_path / f"main/{split}-00000-of-00001.parquet")
    if kind == "saved":
        DatasetDict({k: Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(tmp_path)
    for split, rows in splits.items():
        read = get_gsm8k_questions(split, str(tmp_path))
        assert read["question"][:] == [row["question"] for row in rows]


def test_a_single_file_is_the_train_split(tmp_path):
    (tmp_path / "mine.jsonl").write_text(GOOD + "\n" + GOOD)
    args, _ = laptop(tmp_path, "--dataset_name", str(tmp_path / "mine.jsonl"))
    assert len(load_questions(args, "train")) == 2
    with pytest.raises(UserError, match="--evaluate False needs none"):
        load_questions(args, "test")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD, encoding="utf-8-sig")
    assert len(get_gsm8k_questions("train", str(tmp_path))) == 1


def test_a_question_that_ends_its_own_turn_is_kept_and_reported(tmp_path, capsys):
    """The tokenizer reads <|im_end|> in a question as the token: the turn ends there."""
    bad = json.dumps({"question": "How<|im_end|> many?", "answer": "#### 4"})
    rows = get_gsm8k_questions("train", folder(tmp_path, *[GOOD] * 7, bad))
    trainer = grpo_demo.prepare_trainer(*laptop(tmp_path, "--report_to", "none"), rows)
    assert "warning: 1 questions have tokens that end a turn" in capsys.readouterr().err
    ids, _, _ = trainer._tokenize_prompts(rows["prompt"][:])
    ends = [prompt.count(trainer.processing_class.eos_token_id) for prompt in ids]
    assert ends == [2] * 7 + [3]


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
        json.dumps({"question": "half a \ud83d", "answer": "#### 1"}),
        '{"question": ' + "[" * 100_000,
    ]
    assert len(get_gsm8k_questions("train", folder(tmp_path, GOOD, *bad))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "9 of 10 train rows left out" in line
    parts = ("2 with no number after '####'", "4 with no text in", "2 with no JSON", "1 with half")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "lines", [[], ["", " "], ['{"a": 1}'], ["not json"]], ids=["empty", "blank", "columns", "json"]
)
def test_no_usable_row_is_an_error(tmp_path, lines):
    data = folder(tmp_path, *lines)
    with pytest.raises(ValueError, match="no usable row"):
        get_gsm8k_questions("train", data)
    args, _ = laptop(tmp_path, "--dataset_name", data)
    with pytest.raises(UserError, match=r"no split 'train' in dataset .*: no usable row"):
        load_questions(args, "train")


def test_a_missing_split_is_an_error(tmp_path):
    args, _ = laptop(tmp_path, "--dataset_name", folder(tmp_path, GOOD))
    with pytest.raises(UserError, match=r"no split .test.*--evaluate False.*test\.jsonl"):
        load_questions(args, "test")


def test_a_path_of_the_project_from_another_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert grpo_demo.is_local("assets/tiny") and not grpo_demo.is_local("openai/gsm8k")
    with pytest.raises(FileNotFoundError, match=r"looked for train\.jsonl"):
        grpo_demo.get_gsm8k_questions("train", "assets/tiny")


@pytest.mark.parametrize("test", [None, "", "not json"], ids=["missing", "empty", "unusable"])
def test_no_test_split_is_an_error_before_any_work(tmp_path, monkeypatch, capsys, test):
    monkeypatch.setenv("COLUMNS", "160")
    data = folder(tmp_path, *[GOOD] * 8)
    out = tmp_path / "out"
    if test is not None:
        folder(tmp_path, test, split="test")
    with pytest.raises(SystemExit) as stopped:
        grpo_demo.main([*LAPTOP, "--dataset_name", data, "--output_dir", str(out)])
    assert stopped.value.code == 2 and not out.exists()
    assert "--evaluate False" in capsys.readouterr().err


def test_odd_characters_and_bytes(tmp_path):
    row = {"question": "caf\u00e9 \u2028 \u0085 \U0001f600?", "answer": "#### 1"}
    (tmp_path / "train.jsonl").write_bytes(
        json.dumps(row, ensure_ascii=False).encode() + b"\n\xff\xfe\n" + GOOD.encode()
    )
    rows = get_gsm8k_questions("train", str(tmp_path))
    assert [r["question"] for r in rows] == [row["question"], "How many?"]


def test_long_prompts_are_reported_and_kept(tmp_path, capsys):
    rows = get_gsm8k_questions("train", "assets/tiny")
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
    ids = tokenizer.apply_chat_template(rows["prompt"][:], add_generation_prompt=True)["input_ids"]
    lengths = sorted(map(len, ids))
    limit = lengths[len(lengths) // 2]
    long = sum(length > limit for length in lengths)
    flags = ["--report_to", "none", "--max_prompt_length", str(limit)]
    trainer = grpo_demo.prepare_trainer(*laptop(tmp_path, *flags), rows)
    errors = capsys.readouterr().err.splitlines()
    (line,) = [line for line in errors if line.startswith("warning")]
    assert f"{long} of {len(rows)} prompts" in line and 0 < long < len(rows)
    assert trainer.train_dataset["prompt"][:] == rows["prompt"][:]


def test_too_few_rows_for_a_step(tmp_path):
    args, model_args = laptop(tmp_path)
    args.dataset_name, args.evaluate = folder(tmp_path, GOOD), False
    with pytest.raises(UserError, match="1 training rows do not fill a step of 8 prompts"):
        grpo_demo.train(args, model_args)


@needs_gsm8k
def test_real_gsm8k(capsys):
    train, test = (get_gsm8k_questions(split, str(GSM8K)) for split in ("train", "test"))
    assert (len(train), len(test)) == (7473, 1319) and capsys.readouterr().err == ""
    assert train[0]["question"] == gsm8k("train")[0]["question"]


def embedded(split: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"assets/tiny/{split}.jsonl").open()]


def test_the_embedded_data():
    splits = {split: embedded(split) for split in ("train", "test")}
    questions = {split: {row["question"] for row in rows} for split, rows in splits.items()}
    assert {split: len(asked) for split, asked in questions.items()} == {"train": 480, "test": 512}
    assert not questions["train"] & questions["test"]
    for split, rows in splits.items():
        assert len(get_gsm8k_questions(split, "assets/tiny")) == len(rows)
    files = [path for path in (ROOT / "assets/tiny").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000


def test_the_embedded_model_is_an_ordinary_directory():
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    chat = [{"role": "user", "content": "12?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\n12?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.tokenize("12") == ["1", "2"]
    config = json.loads((ROOT / "assets/tiny/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"


def test_no_question_is_in_two_splits_of_the_maker():
    for split in ("train", "test"):
        assert {make.split_of(row["question"]) for row in embedded(split)} == {split}
    rng = make.random.Random(5)
    fixed = {make.ONE_SHOT_QUESTION, "Equations"}
    messages = [message for _ in range(500) for message in make.sample(rng)[0]]
    asked = {m["content"] for m in messages if m["role"] == "user"} - fixed
    assert len(asked) > 400 and {make.split_of(question) for question in asked} == {"pretrain"}
