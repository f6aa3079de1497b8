"""Datasets: files on disk, bad rows, own columns, the real GSM8K and the embedded one."""

import gzip
import json
import os
import signal

import pytest
from conftest import GSM8K, LAPTOP, ROOT, gsm8k, needs_gsm8k
from datasets import Dataset

import grpo_demo
import rewards
from assets.tools import make
from grpo_demo import get_gsm8k_questions

GOOD = json.dumps({"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"})
WORDS = '{"question": "Caf\u00e9 \u2028 \u0085 \U0001f600, or none?", "answer": "#### 1"}'
TINY = ROOT / "assets/tiny"


def folder(path, *lines: str, split: str = "train") -> str:
    path.mkdir(exist_ok=True)
    (path / f"{split}.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return str(path)


KINDS = ["jsonl.gz", "json", "csv", "parquet", "main", "data"]


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_as_people_have_them_on_disk(tmp_path, kind):
    rows, file = gsm8k("train", TINY)[:9], tmp_path / f"train.{kind}"
    data = Dataset.from_list(rows)
    if kind == "jsonl.gz":
        file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "csv":
        data.to_pandas().to_csv(file, index=False)
    elif kind == "parquet":
        data.to_parquet(file)
    else:  # as `hf download` leaves them, in parts
        for i, part in enumerate(data.shard(2, i, contiguous=True) for i in range(2)):
            part.to_parquet(tmp_path / kind / f"train-{i:05}-of-00002.parquet")
    asked = [row["question"] for row in rows]
    assert get_gsm8k_questions("train", str(tmp_path))["question"][:] == asked


def test_only_the_files_meant_are_read_and_anew_when_changed(tmp_path):
    data = folder(tmp_path, GOOD, "", WORDS)
    others = "train.jsonl.bak train.jsonl~ train.jsonl.part train.jsonl.zip train-old.jsonl"
    others += " mytrain.jsonl .train.jsonl.swp train_aug.csv"
    for name in [*others.split(), "train (copy).jsonl", "train-00000-of-00001 (1).parquet"]:
        (tmp_path / name).write_text(GOOD)
    asked = ["How many?", json.loads(WORDS)["question"]]
    assert get_gsm8k_questions("train", data)["question"][:] == asked
    for gold in ("4", "5"):  # read anew, even with the old size and time, which fool a cache
        data = folder(tmp_path, GOOD.replace("#### 4", f"#### {gold}"))
        os.utime(tmp_path / "train.jsonl", (0, 0))
        assert get_gsm8k_questions("train", data)["answer"][:] == [gold]


def test_which_rows_stay_with_which_gold(tmp_path, capsys):
    golds = {"45.0": "45", "45": "45", "1,000": "1000", "$-3": "-3", "2.50": "2.50", "007": "7"}
    golds |= dict.fromkeys(["38,5", "many", "", "18 eggs", "1/0", "3 or 4"])
    rows = [{"question": "a", "answer": f"#### {gold}"} for gold in golds]
    rows += [{"question": "a", "answer": "no hashes 5"}, {"question": "a"}]
    rows += [{"question": None, "answer": "#### 5"}, {"question": "", "answer": "#### 5"}]
    rows += [{"question": "a", "answer": "#### Step 1\n...\n#### 1.50"}]
    data = get_gsm8k_questions("train", folder(tmp_path, *map(json.dumps, rows)))
    assert data["answer"][:] == [*filter(None, golds.values()), "1.50"]
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]
    assert "10 of 17 train rows" in line


WRONG = {  # name: what the folder holds, what the one line names
    "not json": (["not json"], "train.jsonl"),
    "half a line": ([GOOD, '{"quest'], "train.jsonl"),
    "no text": ([GOOD.replace('"How many?"', "3")], "question"),
    "an answer that is a number": ([GOOD, '{"question": "a", "answer": 18}'], "answer"),
    "other columns": (['{"q": "a", "a": "#### 1"}'], "answer, question"),
    "no number": ([GOOD.replace("####", "=")] * 3, "3 rows"),
    "empty": ([], "train.jsonl"),
    "too few": ([GOOD], "1 training rows do not fill a step of 8 prompts"),
    "no test split": ([GOOD] * 8, "--evaluate False"),
    "a bad test split": ([GOOD] * 8, "test.jsonl", "test.jsonl", "not json"),
    "two formats": ([GOOD] * 8, "train.csv, train.jsonl", "train.csv", "a,b"),
    "two places": ([GOOD] * 8, "train.jsonl, train.jsonl", "main/train.jsonl", GOOD),
    "a part is missing": (None, "train-00001", "train-00001-of-00002.parquet", ""),
    "no parquet": (None, "train.parquet", "train.parquet", "hello"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_one_line_before_the_model_loads(tmp_path, capsys, case):
    lines, named, *file = WRONG[case]
    data, out = tmp_path / "data", tmp_path / "out"
    if lines is not None:
        folder(data, *lines)
    if file:
        (data / file[0]).parent.mkdir(parents=True, exist_ok=True)
        (data / file[0]).write_text(file[1])
    flags = ["--dataset_name", str(data), "--output_dir", str(out), "--report_to", "none"]
    with pytest.raises(SystemExit) as stopped:
        grpo_demo.main([*LAPTOP, *flags, "--model_name_or_path", str(tmp_path / "no model")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and named in line, line
    assert len(line) < 700 and "no model" not in line and not out.exists()


def test_own_columns_reach_the_rewards(tmp_path, monkeypatch, capsys):
    """Those named as TRL's own do not, nor a text "007" that datasets made a number."""
    taken = "prompts completion completions completion_ids image images environment environments "
    taken = [*taken.split(), "messages", "chosen", "trainer_state", "log_extra", "log_metric"]
    own = [{"question": f"{i}?", "answer": f"#### {i}.0", "level": i} for i in range(8)]
    odd = dict.fromkeys([*taken, "prompt"], "hijacked")
    rows = [row | odd | {"meta": {"at": [i]}} for i, row in enumerate(own)]
    rows[0]["id"], rows[1]["id"] = "007", 7
    folder(tmp_path, *map(json.dumps, rows))
    seen = []

    def own(prompts, completions, answer, level, meta, optional=None, **kwargs):
        asked = [prompt[-1]["content"] for prompt in prompts]
        seen.extend(zip(asked, answer, level, meta, kwargs["question"], strict=True))
        assert optional is None and "id" not in kwargs and "hijacked" not in kwargs.values()
        return [float(value) for value in level]

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of pytest stay
    monkeypatch.setattr(rewards, "REWARD_FUNCS", [*rewards.REWARD_FUNCS, own])
    flags = "--evaluate False --max_steps 1 --max_completion_length 4 --save_strategy no --beta 0"
    flags += f" --report_to none --dataset_name {tmp_path} --output_dir {tmp_path}/out"
    grpo_demo.main([*LAPTOP, *flags.split()])
    # before the last 64: the trial on the examples of rewards.py
    wanted = [(f"{i}?", f"{i}", i, {"at": [i]}, f"{i}?") for i in range(8)]
    assert sorted(seen[-64:], key=lambda row: row[2])[::8] == wanted
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "columns left out" in line]
    assert all(f"'{name}'" in line for name in [*taken, "prompt", "id"]) and "level" not in line


@needs_gsm8k
def test_real_gsm8k(capsys):
    for split, n in (("train", 7473), ("test", 1319)):
        rows, raw = get_gsm8k_questions(split, str(GSM8K)), gsm8k(split)
        assert len(rows) == n and rows["question"][:] == [row["question"] for row in raw]
        assert rows["answer"][:] == [rewards.extract_hash_answer(row["answer"]) for row in raw]
    assert "warning" not in capsys.readouterr().err


def test_the_embedded_data_and_its_maker():
    splits = {split: gsm8k(split, TINY) for split in ("train", "test")}
    asked = {split: {row["question"] for row in rows} for split, rows in splits.items()}
    assert [*map(len, asked.values())] == [480, 512] and not asked["train"] & asked["test"]
    for split, rows in splits.items():
        assert len(get_gsm8k_questions(split, "assets/tiny")) == len(rows)
        assert {make.split_of(row["question"]) for row in rows} == {split}
    rng = make.random.Random(5)
    messages = [message for _ in range(500) for message in make.sample(rng)[0]]
    asked = {message["content"] for message in messages if message["role"] == "user"}
    asked -= {make.ONE_SHOT_QUESTION, "Equations"}
    assert len(asked) > 400 and {make.split_of(question) for question in asked} == {"pretrain"}
    files = [path for path in TINY.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
