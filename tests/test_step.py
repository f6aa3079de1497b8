"""GRPO on one page: one optimizer step written from the formula, without TRL, against the script's own trainer.

DeepSeekMath (arXiv 2402.03300, eq. 3 and 4), one update per batch of completions, as in the gist. For each prompt q a
group of G completions o_1..o_G with rewards r_1..r_G:

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)                                       the group is its own baseline
    kl_it = pi_ref / pi - log(pi_ref / pi) - 1       at token t of o_i            never negative, unbiased ("k3")
    loss = - mean over i of  mean over t of  [ pi / pi_old * A_i - beta * kl_it ]       pi_old = pi, not differentiated

then the gradient is clipped to a norm of 0.1 and AdamW takes a step at the scheduled learning rate.
"""

import math
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer

import grpo_demo

STEPS, GROUP, BETA, TINY = 5, 4, 0.04, "assets/tiny"
PEAK = float(os.environ.get("PEAK", 1e-5))  # the learning rate; at larger ones fp32 leaves less than five digits
ANSWERS = [  # completions are fixed: in each group some are right, some wrong, some readable, some not
    "<reasoning>\n{a}\n</reasoning>\n<answer>\n{a}\n</answer>\n",
    "The answer is {a}.",
    "<reasoning>\n1 + 1 = 2\n</reasoning>\n<answer>\n2\n</answer>\n",
    "<reasoning>no</reasoning> <answer>{a}</answer>",
]


def log_probs(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log pi(o_t | q, o_<t) for each token of one completion: (tokens,)."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion)), completion]


def grpo_loss(policy, reference, prompts, completions, rewards: torch.Tensor) -> torch.Tensor:
    """The loss of one step; prompts and completions are token lists, one per completion, groups in a row."""
    groups = rewards.view(-1, GROUP)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
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
    """Linear warm-up over a tenth of the steps (rounded up), then a half cosine to 0; step counts from 0."""
    warmup = math.ceil(0.1 * STEPS)
    if step < warmup:
        return PEAK * step / warmup
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def adamw(params: dict, grads: dict, state: dict, step: int, lr: float) -> None:
    """Loshchilov and Hutter 2019, betas 0.9 and 0.99, weight decay 0.1 on all but biases and norms; step from 1."""
    for name, p in params.items():
        m, v = state.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
        m.mul_(0.9).add_(0.1 * grads[name])
        v.mul_(0.99).add_(0.01 * grads[name] ** 2)
        if "norm" not in name and "bias" not in name:
            p.mul_(1 - lr * 0.1)
        p.sub_(lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8))


def from_scratch(batches: list, rewards: list[torch.Tensor]) -> list[dict]:
    """STEPS optimizer steps on recorded (prompts, completions): loss, clipped gradient and weights of each."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32) for _ in range(2))
    params, state, record = dict(policy.named_parameters()), {}, []
    for step, ((prompts, completions), reward) in enumerate(zip(batches, rewards, strict=True)):
        policy.zero_grad()
        loss = grpo_loss(policy, reference, prompts, completions, reward)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in params.values()]).norm()
        grads = {n: p.grad * min(1.0, 0.1 / (norm.item() + 1e-6)) for n, p in params.items()}
        with torch.no_grad():
            adamw(params, grads, state, step + 1, learning_rate(step))
        record.append(
            {"loss": loss.item(), "grads": grads, "weights": {n: p.detach().clone() for n, p in params.items()}}
        )
    return record


# --- and the same steps by the script's trainer


class FixedTrainer(GRPOTrainer):
    """The real trainer with fixed completions in the place of sampled ones, keeping what it was given and made."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        assert all(prompt_ids[i] == prompt_ids[i - i % GROUP] for i in range(len(prompt_ids)))
        tokenizer = self.processing_class
        texts = [ANSWERS[(i + self.state.global_step) % 4].format(a=i // GROUP + 20) for i in range(len(prompt_ids))]
        completions = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        self.batches = [*getattr(self, "batches", []), (prompt_ids, completions)]
        return completions, None

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)
        self.rewards = [*getattr(self, "rewards", []), rewards.sum(1)]
        return rewards


class Keep(TrainerCallback):
    """Clipped gradients before, weights after, and loss of each optimizer step."""

    def __init__(self):
        self.record = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.record.append({"grads": {n: p.grad.clone() for n, p in model.named_parameters()}})

    def on_step_end(self, args, state, control, model, **kwargs):
        self.record[-1]["weights"] = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.record[-1]["loss"] = logs["loss"]


def errors(monkeypatch, tmp_path, *flags: str) -> dict[str, float]:
    """Worst error of the trainer against the formula over all steps: loss (absolute), gradient, weights (relative)."""
    monkeypatch.setattr(grpo_demo, "GRPOTrainer", FixedTrainer)
    ours = f"--config assets/tiny/config.yaml --output_dir {tmp_path} --report_to none --save_strategy no"
    ours += f" --max_steps {STEPS} --num_generations {GROUP} --per_device_train_batch_size 8 --learning_rate {PEAK}"
    args, model_args = grpo_demo.parse_args([*ours.split(), "--log_completions=False", "--disable_tqdm=True", *flags])
    rows = grpo_demo.get_gsm8k_questions("train", TINY)
    rows = rows.map(lambda row, i: {"answer": str(20 + i % 2)}, with_indices=True)
    trainer = grpo_demo.build_trainer(args, model_args, rows)
    keep = Keep()
    trainer.add_callback(keep)
    trainer.train()
    ours = from_scratch(trainer.batches, trainer.rewards)
    assert len(keep.record) == len(ours) == STEPS and all(r.std() > 0.1 for r in trainer.rewards)

    def distance(key: str) -> float:  # of all tensors as one vector, relative; the worst step
        flat = [[torch.cat([step[key][n].flatten() for n in ours[0][key]]) for step in r] for r in (keep.record, ours)]
        return max(((x - y).norm() / y.norm()).item() for x, y in zip(*flat, strict=True))

    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(keep.record, ours, strict=True))
    return {"loss": worst, "grads": distance("grads"), "weights": distance("weights")}


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"],
        ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"],
        ["--gradient_checkpointing", "True"],
    ],
    ids=["8x1", "2x4", "1x8", "checkpointing"],
)
def test_the_trainer_is_the_formula(monkeypatch, tmp_path, flags):
    found = errors(monkeypatch, tmp_path, *flags)
    print(found)
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize(
    "flags",
    [["--loss_type", "dapo"], ["--beta", "0.0"], ["--use_bias_correction_kl", "True"], ["--scale_rewards", "none"],
     ["--temperature", "0.9"], ["--warmup_steps", "0"]],
    ids=lambda flags: flags[0][2:],
)  # fmt: skip
def test_a_wrong_setting_is_seen(monkeypatch, tmp_path, flags):
    found = errors(monkeypatch, tmp_path, *flags)
    print(found)
    assert max(found.values()) > 1e-4
