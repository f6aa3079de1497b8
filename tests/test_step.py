"""GRPO on one page: five steps from the formula, without TRL, against the script's own trainer.

DeepSeekMath (arXiv 2402.03300, eq. 3 and 4), one update per batch of completions, as in the gist.
For each prompt q a group of G completions o_1..o_G with rewards r_1..r_G:

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)          the group is its own baseline
    kl_it = pi_ref / pi - log(pi_ref / pi) - 1       at token t of o_i: never negative ("k3")
    loss = - mean over i of mean over t of [pi / pi_old * A_i - beta * kl_it]

with pi_old = pi, not differentiated. Then the gradient is clipped to a norm of 0.1 and AdamW takes
a step at the scheduled learning rate. All of it in float64, so that only a real difference is seen.
"""

import functools
import math
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import trl
from conftest import LAPTOP, ROOT, TWO
from transformers import AutoModelForCausalLM, TrainerCallback

import grpo_demo
from rewards import REWARD_FUNCS

torch.set_num_threads(1)  # the model is small: more threads wait longer than they compute
STEPS = 5
GROUP = 4
BETA = 0.04
PEAK = 2.8e-4  # learning rate
TINY = "assets/tiny"
ANSWERS = [  # completions are fixed; the gold answer is 20; n is the prompt's own number
    "<reasoning>\n{n}\n</reasoning>\n<answer>\n20\n</answer>\n",
    "{n} and {n}. The answer is 20.",
    "<reasoning>\n1 + 1 = {n}\n</reasoning>\n<answer>\n2\n</answer>\n",
    "<reasoning>no {n}</reasoning> <answer>20</answer>",
]


@contextmanager
def float64():
    """Make float32 mean float64: TRL fixes it for rewards and log-probs, transformers for norms."""
    single = torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(single)


def log_probs(model, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """Return log pi(o_t | q, o_<t) for each token of one completion: (tokens,)."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion)), list(completion)]


def grpo_loss(policy, reference, prompts, completions, rewards) -> torch.Tensor:
    """Return the loss of one step: tokens and reward of each completion, groups in a row."""
    groups = torch.tensor(rewards).view(-1, GROUP)
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    advantages = ((groups - mean) / (std + 1e-4)).flatten()
    losses = []
    for prompt, completion, advantage in zip(prompts, completions, advantages, strict=True):
        log_pi = log_probs(policy, prompt, completion)
        with torch.no_grad():
            log_ref = log_probs(reference, prompt, completion)
        ratio = torch.exp(log_pi - log_pi.detach())  # 1, but its gradient is that of log pi
        kl = torch.exp(log_ref - log_pi) - (log_ref - log_pi) - 1
        losses.append(-(ratio * advantage - BETA * kl).mean())
    return torch.stack(losses).mean()


def learning_rate(step: int) -> float:
    """Return the rate of a step from 0: up over a tenth of the steps, then half a cosine to 0."""
    warmup = math.ceil(0.1 * STEPS)
    if step < warmup:
        return PEAK * step / warmup
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def adamw(params: dict, grads: dict, state: dict, step: int, lr: float) -> None:
    """Take step 1, 2, ... of AdamW (Loshchilov and Hutter 2019); norms and biases do not decay."""
    for name, p in params.items():
        m, v = state.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
        m.mul_(0.9).add_(0.1 * grads[name])
        v.mul_(0.99).add_(0.01 * grads[name] ** 2)
        if "norm" not in name and "bias" not in name:
            p.mul_(1 - lr * 0.1)
        p.sub_(lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8))


@float64()
@functools.cache  # all runs below have the same batches
def from_scratch(batches: tuple) -> list[dict]:
    """Return loss, clipped gradient and weights of each step on (prompts, completions, rewards)."""
    load = AutoModelForCausalLM.from_pretrained
    policy, reference = (load(TINY, dtype=torch.float64) for _ in range(2))
    params, state, record = dict(policy.named_parameters()), {}, []
    for step, batch in enumerate(batches):
        policy.zero_grad()
        loss = grpo_loss(policy, reference, *batch)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in params.values()]).norm()
        grads = {n: p.grad * min(1.0, 0.1 / (norm.item() + 1e-6)) for n, p in params.items()}
        with torch.no_grad():
            adamw(params, grads, state, step + 1, learning_rate(step))
        weights = {n: p.detach().clone() for n, p in params.items()}
        record.append({"loss": loss.item(), "grads": grads, "weights": weights})
    return record


# --- and the same steps by the script's trainer


class FixedTrainer(grpo_demo.GRPOTrainer):
    """The script's trainer with fixed completions for sampled ones; keeps them and the rewards."""

    batches, widths, batch = (), (), ()

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        def measured(input_ids, **inputs):  # how wide is what the model really sees?
            self.widths += (input_ids.shape,)
            return model(input_ids=input_ids, **inputs)

        return super()._get_per_token_logps_and_entropies(measured, *args, **kwargs)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        tokenizer, completions = self.processing_class, []
        first = self.accelerator.process_index * len(prompt_ids)
        for i, prompt in enumerate(prompt_ids, first + self.state.global_step):
            text = ANSWERS[i % GROUP].format(n=sum(prompt) % 1000)
            completions.append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        self.batch = tuple(map(tuple, prompt_ids)), tuple(map(tuple, completions))
        return completions, None

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)
        five = rewards[:, : len(REWARD_FUNCS)]  # the sixth column is only logged
        self.batches += ((*self.batch, tuple(five.sum(1).tolist())),)
        return rewards


class Keep(TrainerCallback):
    """Keeps clipped gradients, weights after the step, loss and KL of each optimizer step."""

    def __init__(self):
        self.record = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.record.append({"grads": grads})

    def on_step_end(self, args, state, control, model, **kwargs):
        self.record[-1]["weights"] = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_log(self, args, state, control, logs, **kwargs):
        self.record[-1] |= {"kl": 0.0, "logs": logs} | logs if "loss" in logs else {}


def train(out: object, *flags: object) -> tuple[tuple, list[dict]]:
    """Take the steps with the script's trainer in float64; return their batches and record."""
    with float64():
        trainer, record = train_as(FixedTrainer, out, *flags)
    return trainer.batches, record


def train_as(kind: type, out: object, *flags: object) -> tuple[trl.GRPOTrainer, list[dict]]:
    """Take the steps with a kind of trainer; return it, and the record of `Keep`."""
    ours = f"--max_steps {STEPS} --num_generations {GROUP} --per_device_train_batch_size 8"
    ours += f" --output_dir {out} --report_to none --save_strategy no --log_completions False"
    args, model_args = grpo_demo.parse_args([*LAPTOP, *ours.split(), *map(str, flags)])
    rows = grpo_demo.get_gsm8k_questions("train", TINY).map(lambda row: {"answer": "20"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_demo, "GRPOTrainer", kind)
        trainer = grpo_demo.build_trainer(args, model_args, rows)
    keep = Keep()
    trainer.add_callback(keep)
    trainer.train()
    return trainer, keep.record


def errors(theirs: list[dict], ours: list[dict]) -> dict[str, float]:
    """Return the worst step's error: of the loss absolute; of gradient and weights relative."""
    found = {"loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(theirs, ours, strict=True))}
    for key in ("grads", "weights"):
        found[key] = 0.0
        for a, b in zip(theirs, ours, strict=True):
            x, y = (torch.cat([r[key][n].flatten() for n in sorted(r[key])]) for r in (a, b))
            assert x.dtype == y.dtype == torch.float64
            found[key] = max(found[key], ((x - y).norm() / y.norm()).item())
    print(found)
    return found


SIZE, PARTS = "--per_device_train_batch_size", "--gradient_accumulation_steps"
WAYS = {"8x1": [], "2x4": [SIZE, 2, PARTS, 4], "1x8": [SIZE, 1, PARTS, 8]}
WAYS |= {"checkpointing": ["--gradient_checkpointing", True]}


@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
def test_the_trainer_is_the_formula(tmp_path, flags):
    batches, record = train(tmp_path, *flags)
    assert len(record) == STEPS and record[-1]["kl"] > 0.01
    assert all(torch.tensor(rewards).std() > 0.1 for *_, rewards in batches)
    assert max(errors(record, from_scratch(batches)).values()) < 1e-10


WRONG = "loss_type dapo|beta 0.0|use_bias_correction_kl True|scale_rewards none|temperature 0.9"


@pytest.mark.parametrize("setting", [*WRONG.split("|"), "warmup_steps 0"])
def test_a_wrong_setting_is_seen(tmp_path, setting):
    batches, record = train(tmp_path, *f"--{setting}".split())
    assert max(errors(record, from_scratch(batches)).values()) > 1e-4


def test_two_processes_take_the_same_steps(tmp_path):
    """The middle one of the three groups is split: half of it is in each process."""
    launch = [*TWO, "tests/test_step.py", tmp_path, SIZE, "6"]
    done = subprocess.run(map(str, launch), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    batches, record = train(tmp_path, SIZE, "12")
    assert all(len(set(prompts)) == 3 for prompts, *_ in batches)
    assert max(errors(torch.load(tmp_path / "record.pt"), record).values()) < 1e-10


LENGTHS = [1, 4, 9, 17, 26, 37, 50, 64]  # of the completions of a step; 64 is the limit


class SpreadTrainer(FixedTrainer):
    """Completions of all lengths, from one token to the limit, which alone has no end."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        tokenizer, rows = self.processing_class, []
        for i, prompt in enumerate(prompt_ids):
            length = LENGTHS[5 * i % len(LENGTHS)]
            text = "".join(answer.format(n=sum(prompt) % 100 + i) for answer in ANSWERS)
            row = tokenizer(text)["input_ids"][:length]
            rows.append(row if length == LENGTHS[-1] else [*row[:-1], tokenizer.eos_token_id])
        return rows, None

    def _calculate_rewards(self, inputs, prompts, completions, ids):
        more = torch.tensor([[len(row) % 7 / 7] for row in ids])
        return super()._calculate_rewards(inputs, prompts, completions, ids) + more


class SpreadBare(SpreadTrainer):
    """The same completions by TRL's own trainer, without this project's changes."""

    _prepare_inputs = trl.GRPOTrainer._prepare_inputs
    _get_per_token_logps_and_entropies = trl.GRPOTrainer._get_per_token_logps_and_entropies


PEFT, BF16 = "--use_peft --lora_dropout 0", "--bf16 True"
CASES = [(1, more) for more in ("", PEFT, "--gradient_checkpointing True", BF16)]
CASES += [(2, more) for more in ("", "--loss_type dapo", "--loss_type bnpo")] + [(8, "")]


@pytest.mark.parametrize(("size", "more"), CASES)
def test_without_padding_the_numbers_are_trls(tmp_path, size, more):
    """Two steps from the same weights (the first has learning rate 0), by both trainers.

    bf16 keeps 8 bits, and a product of matrices of another shape rounds some values otherwise.
    """
    flags = f"{SIZE} {size} {PARTS} {8 // size} --max_steps 2 --warmup_steps 1 {more}".split()
    ours, record = train_as(SpreadTrainer, tmp_path, *flags)
    _, expected = train_as(SpreadBare, tmp_path, *flags)
    relative, absolute = {BF16: (1e-2, 1e-3), PEFT: (3e-6, 1e-7)}.get(more, (1e-6, 1e-7))
    for a, b in zip(record, expected, strict=True):
        for name in ("loss", "grad_norm"):
            assert a["logs"][name] == pytest.approx(b["logs"][name], rel=relative, abs=absolute)
    rows, columns = torch.tensor(ours.widths).T
    share = ((rows * columns).sum() / rows.sum() / columns.max()).item()
    assert share < {1: 0.75, 2: 0.8, 8: 1.01}[size] or "bnpo" in more


if __name__ == "__main__":  # one of the two processes
    _, record = train(*sys.argv[1:])
    if os.environ["RANK"] == "0":
        torch.save(record, f"{sys.argv[1]}/record.pt")
