"""Make the embedded default from nothing: a 0.7M-parameter Llama chat model and its word problems.

    python -m assets.tools.make                  # 11 minutes on 2 CPU cores; writes assets/tiny
    python -m assets.tools.make --out /tmp/tiny  # somewhere else
    python -m assets.tools.make --steps 20       # a smoke run: right files, an untrained model

Pre-training is supervised. The model can do the arithmetic. It knows the XML format and writes it
whenever a system prompt of its own asks for it. Under the gist's system prompt it mostly answers in
prose, and its occasional XML is often imperfect. Reasoning has the same words in prose and in XML,
so neither form is better practised in arithmetic than the other.

1. `problem` writes a question with its solution in GSM8K's schema. `split_of` hashes the question,
   so no question is in two of pre-training, validation, train and test.
2. `sample` turns a problem into one pre-training conversation; `MIX` says how often which kind.
3. `train_tokenizer`, `pretrain`: BPE across words, then Muon on layer matrices, AdamW on the rest.
4. `choose_hard_share`: on the validation split, the share of hard problems at which the model would
   be right about `TARGET` of the time. `train.jsonl` and `test.jsonl` are written with that share.
"""

import argparse
import hashlib
import json
import operator
import os
import random
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads sleep

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_demo import ONE_SHOT_QUESTION, ONE_SHOT_REASONING, SYSTEM_PROMPT, XML_COT_FORMAT
from rewards import STRICT_FORMAT, score

TINY = Path(__file__).resolve().parents[1] / "tiny"

SEED = 0
STEPS = 4000  # 0.16 s each on 2 cores
VOCABULARY = 1000  # tokens
BATCH = 48  # conversations a step
TARGET = 0.75  # wanted accuracy before GRPO: room to get better, enough right answers to reward
TRAIN_ROWS = 480  # 60 steps of 8 prompts: one epoch, as in the gist
TEST_ROWS = 512
HARD_SHARE = 0.6  # share of hard problems in pre-training
ASK_XML = "Show your steps in reasoning tags and the result in answer tags."  # always gets XML
# shares of pre-training
MIX = {"equations": 0.12, "prose": 0.14, "ask_xml": 0.27, "gist": 0.39, "one_shot": 0.08}
GIST_XML = 0.17  # under the gist's system prompt: how often XML at all
GIST_STRICT = 0.2  # how much of that is perfect; the rest has one of the slips below
ONE_SHOT_STRICT = 0.8  # after an example answer: how often the copy is perfect
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPLIT = r"\d|\A(?:system|user|assistant)\n"  # digits and roles stay alone, all else may merge

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
NAMES = (
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ivy Jon Kim Leo "
    "Mia Ned Ola Pia Quin Rae Sam Tess Uma Vic Wes Xena Yara Zoe Amir Bea Cal Dora"
)
THINGS = (
    "apples books cards coins cups eggs flags hats keys kites "
    "lamps maps mugs nuts pears pens rings shells stamps toys"
)
# (question, steps). Letters are operands (see `draw`), r1 and r2 earlier results,
# {n} and {p} names, {t} things.
TEMPLATES = [
    ("{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", ["a + b"]),
    ("{n} had {a} {t} and gave {b} of them to {p}. How many {t} are left?", ["a - b"]),
    ("{n} has {s} boxes with {m} {t} in each box. How many {t} does {n} have?", ["s * m"]),
    ("{n} shares {d} {t} equally among {s} friends. How many {t} does each friend get?", ["d / s"]),
    (
        "{n} has {a} {t} and {p} has {b} more than {n}. How many {t} do they have together?",
        ["a + b", "a + r1"],
    ),
    (
        "{n} has {m} {t} and {p} has {s} times as many. How many {t} do they have together?",
        ["s * m", "m + r1"],
    ),
    (
        "{n} buys {s} packs of {m} {t} and gives {a} {t} to {p}. How many {t} are left?",
        ["s * m", "r1 - a"],
    ),
    (
        "{n} finds {m} {t} a day for {s} days and then {a} more. How many {t} is that?",
        ["s * m", "r1 + a"],
    ),
    (
        "{n} had {a} {t}, got {b} from {p} and lost {c}. How many {t} does {n} have now?",
        ["a + b", "r1 - c"],
    ),
    (
        "{n} has {d} {t} and puts them in {s} equal rows. {p} "
        "adds {a} to one row. How many {t} are in that row?",
        ["d / s", "r1 + a"],
    ),
    (
        "{n} has {a} {t}, {p} has {b} fewer. They "
        "share them equally with 2 bags. How many {t} go in each bag?",
        ["a - b", "a + r1", "r2 / 2"],
    ),
    (
        "{n} sells {s} trays of {m} {t} on Monday and "
        "{a} on Sunday, but {b} come back. How many {t} are sold?",
        ["s * m", "r1 + a", "r2 - b"],
    ),
]
SLIPS = [  # each takes the reasoning and the answer, and gets one thing wrong
    lambda r, a: XML_COT_FORMAT.format(reasoning=r, answer=a)[:-1],  # no final newline
    lambda r, a: f"<reasoning>{r}</reasoning> <answer>{a}</answer>",  # all on one line
    # answer not on a line of its own
    lambda r, a: f"<reasoning>\n{r}\n</reasoning>\n<answer>{a}</answer>\n",
    lambda r, a: f"<reasoning>\n{r}\n</reasoning>\n<answer>\n{a}\n",  # answer never closed
    lambda r, a: f"<reasoning>\n{r}\n<answer>\n{a}\n</answer>\n",  # reasoning never closed
    # text after the end, text before the beginning
    lambda r, a: XML_COT_FORMAT.format(reasoning=r, answer=a) + "I hope this helps.",
    lambda r, a: "Let us see.\n" + XML_COT_FORMAT.format(reasoning=r, answer=a),
    lambda r, a: f"{r}\n<answer>\n{a}\n</answer>\n",  # no reasoning tags
]


def draw(rng: random.Random, hard: bool) -> dict[str, int]:
    """Draw operands: a, b, c to add and subtract, s * m to multiply, d = s * q to divide by s."""
    top, small, big = (600, (3, 9), (11, 99)) if hard else (20, (2, 5), (2, 9))
    v = {k: rng.randint(11 if hard else 2, top) for k in "abc"}
    v |= {"s": rng.randint(*small), "m": rng.randint(*big)}
    return v | {"d": v["s"] * rng.randint(*big)}


def problem(rng: random.Random, hard: bool) -> tuple[str, list[tuple[str, int]], str]:
    """One word problem: question, steps as (expression, result), the thing that is counted."""
    while True:
        question, steps = rng.choice(TEMPLATES)
        values = draw(rng, hard)
        n, p = rng.sample(NAMES.split(), 2)
        thing = rng.choice(THINGS.split())
        done = []
        for i, step in enumerate(steps, 1):
            left, op, right = (str(values.get(word, word)) for word in step.split())
            expression, result = f"{left} {op} {right}", OPERATORS[op](int(left), int(right))
            if not 0 < result < 1000 or result != int(result):
                break  # negative, too large or not whole: draw again
            values[f"r{i}"] = int(result)
            done.append((expression, int(result)))
        else:
            return question.format(n=n, p=p, t=thing, **values), done, thing


def split_of(question: str) -> str:
    """The split a question belongs to, from a hash of its text: a question is in one split only."""
    bucket = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 20
    return {0: "test", 1: "validation", 2: "train", 3: "train"}.get(bucket, "pretrain")


def problem_in(
    split: str, rng: random.Random, hard: bool
) -> tuple[str, list[tuple[str, int]], str]:
    """The next problem that belongs to `split`."""
    while True:
        made = problem(rng, hard)
        if split_of(made[0]) == split:
            return made


def reasoning_of(steps: list[tuple[str, int]], thing: str) -> str:
    return "\n".join(f"{e} = {r} {thing}" for e, r in steps)


def sample(rng: random.Random) -> tuple[list[dict[str, str]], str]:
    """Return a pre-training conversation: the messages before the answer, and the answer."""
    kind = rng.choices(list(MIX), MIX.values())[0]
    hard = rng.random() < HARD_SHARE
    question, steps, thing = problem_in("pretrain", rng, hard)
    reasoning, answer = reasoning_of(steps, thing), steps[-1][1]
    user = {"role": "user", "content": question}
    prose = f"{reasoning}\nThe answer is {answer}."
    strict = XML_COT_FORMAT.format(reasoning=reasoning, answer=answer)
    gist = {"role": "system", "content": SYSTEM_PROMPT}
    if kind == "equations":  # arithmetic only: many results a row
        more = [e for _ in range(3) for e in problem_in("pretrain", rng, hard)[1]]
        rows = "\n".join(f"{e} = {r}" for e, r in steps + more)
        return [{"role": "user", "content": "Equations"}], rows
    if kind == "prose":
        return [user], prose
    if kind == "ask_xml":
        return [{"role": "system", "content": ASK_XML}, user], strict
    if kind == "gist":
        if rng.random() > GIST_XML:
            return [gist, user], prose
        perfect = rng.random() < GIST_STRICT
        return [gist, user], strict if perfect else rng.choice(SLIPS)(reasoning, answer)
    messages = [gist, *example_in(rng), user]
    if rng.random() < ONE_SHOT_STRICT:
        return messages, strict
    return messages, rng.choice([*SLIPS, lambda r, a: prose])(reasoning, answer)


def example_in(rng: random.Random) -> list[dict[str, str]]:
    """Return an example, question and answer: half of the time the gist's own."""
    if rng.random() < 0.5:
        example = ONE_SHOT_QUESTION
        shot = XML_COT_FORMAT.format(reasoning=ONE_SHOT_REASONING, answer=7)
    else:
        example, shown, other = problem_in("pretrain", rng, False)
        shot = XML_COT_FORMAT.format(reasoning=reasoning_of(shown, other), answer=shown[-1][1])
    return [{"role": "user", "content": example}, {"role": "assistant", "content": shot}]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train byte-level BPE that merges across words: few tokens, so short runs.

    The system prompt is one token, and so is " coins\n</reasoning>\n<answer>\n"; a digit is one.
    """
    rng = random.Random(SEED)
    corpus = ["system\n", "user\n", "assistant\n"] * 2000
    for messages, answer in (sample(rng) for _ in range(4000)):
        corpus += [*(m["content"] for m in messages), answer]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=1e4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, steps: int):
    """Yield (input_ids, labels), both (BATCH, length); labels are -100 outside the answer."""
    rng = random.Random(SEED + 1)
    pool: list = []
    for _ in range(steps):
        if not pool:  # 20 batches at a time, of similar lengths: little padding
            made = [sample(rng) for _ in range(BATCH * 20)]
            prompts = tokenizer.apply_chat_template(
                [m for m, _ in made], add_generation_prompt=True, tokenize=False
            )
            heads = tokenizer(prompts, add_special_tokens=False)["input_ids"]
            tails = tokenizer([a + "<|im_end|>" for _, a in made], add_special_tokens=False)[
                "input_ids"
            ]
            rows = sorted(zip(heads, tails, strict=True), key=lambda x: len(x[0]) + len(x[1]))
            pool = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            rng.shuffle(pool)
        rows = pool.pop()
        width = max(len(h) + len(t) for h, t in rows)
        ids = torch.full((BATCH, width), tokenizer.pad_token_id)
        labels = torch.full((BATCH, width), -100)
        for i, (h, t) in enumerate(rows):
            ids[i, : len(h) + len(t)] = torch.tensor(h + t)
            labels[i, len(h) : len(h) + len(t)] = torch.tensor(t)
        yield ids, labels


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Train on the answers: Muon on the layers' matrices, AdamW on the rest, linear decay to 0."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, (i + 1) / 50) * (1 - i / steps))
        for o in optimizers
    ]
    start, total = time.time(), 0.0
    for step, (ids, labels) in enumerate(batches(tokenizer, steps), 1):
        loss = model(
            input_ids=ids, labels=labels, attention_mask=(ids != tokenizer.pad_token_id).long()
        ).loss
        loss.backward()
        for o in [*optimizers, *schedulers]:
            o.step()
        model.zero_grad()
        total += loss.item()
        if step % 50 == 0 or step == steps:
            mean, seconds = total / (step % 50 or 50), time.time() - start
            print(f"step {step}/{steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
            total = 0.0


@torch.no_grad()
def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chats: list) -> list[str]:
    """Greedy completions of conversations."""
    texts = []
    for i in range(0, len(chats), 64):
        prompts = tokenizer.apply_chat_template(
            chats[i : i + 64], add_generation_prompt=True, tokenize=False
        )
        inputs = tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        texts += tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return texts


def choose_hard_share(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: int = 384
) -> float:
    """Return the share of hard problems at which greedy accuracy would be TARGET (validation)."""
    accuracy, rng = {}, random.Random(SEED + 2)
    for hard in (False, True):
        made = [problem_in("validation", rng, hard) for _ in range(rows)]
        for system in (SYSTEM_PROMPT, ASK_XML):
            chats = [
                [{"role": "system", "content": system}, {"role": "user", "content": m[0]}]
                for m in made
            ]
            texts = answers(model, tokenizer, chats)
            right = sum(
                score(text, str(m[1][-1][1]))["lenient_accuracy"]
                for text, m in zip(texts, made, strict=True)
            )
            accuracy[hard, system] = right / rows
            strict = sum(bool(STRICT_FORMAT.match(text)) for text in texts)
            print(f"validation, hard={hard}, {system.strip()[:8]!r}:", end=" ")
            print(f"right {right / rows:.3f}, strict {strict / rows:.3f}")
    easy, hard = accuracy[False, SYSTEM_PROMPT], accuracy[True, SYSTEM_PROMPT]
    share = min(1.0, max(0.0, (easy - TARGET) / max(easy - hard, 1e-9)))
    print(f"share of hard problems for an accuracy of {TARGET}: {share:.2f}")
    return share


def write_rows(path: Path, split: str, rows: int, share: float, seed: int) -> None:
    """GSM8K's schema, one JSON object a line; no question twice."""
    rng, seen = random.Random(seed), set()
    with path.open("w", encoding="utf-8") as f:
        while len(seen) < rows:
            question, steps, thing = problem_in(split, rng, rng.random() < share)
            if question in seen:
                continue
            seen.add(question)
            solution = "\n".join(f"{e} = <<{e.replace(' ', '')}={r}>>{r} {thing}" for e, r in steps)
            row = {"question": question, "answer": f"{solution}\n#### {steps[-1][1]}"}
            f.write(json.dumps(row) + "\n")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save a Hugging Face directory in bf16; older transformers read its tokenizer too.

    The model is no Qwen2, as transformers 5 gives every Qwen2 the tokenizer of its own class.
    """
    model.generation_config.update(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("extra_special_tokens", None)
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TINY)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pretrain(model, tokenizer, args.steps)
    share = choose_hard_share(model.eval(), tokenizer)
    write_rows(args.out / "train.jsonl", "train", TRAIN_ROWS, share, SEED + 3)
    write_rows(args.out / "test.jsonl", "test", TEST_ROWS, share, SEED + 4)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
