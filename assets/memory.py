"""Will it fit? The peak GPU memory of a training step, computed without a GPU and without weights.

    python grpo_demo.py --estimate_memory           # Qwen2.5-1.5B, the script's defaults
    python grpo_demo.py --estimate_memory --model_name_or_path DIR --max_completion_length 512

Runs the real model, TRL's scoring, backward and AdamW on tensors that have a shape but no data
(torch's FakeTensorMode), and adds up what is alive. Prompts and completions have their maximum
length, some are padded (so sdpa uses its memory-efficient kernel), and the step is not the first.
The reference's pass is left out: the loss' own holds more.

Not counted: the CUDA context, cuBLAS workspaces, buffers inside kernels, memory that PyTorch's
allocator holds but cannot use, and the evaluation's one-shot example: a tenth of the card is kept
free for them. 1 GB is 10^9 bytes, for tensors and for cards.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock
from weakref import finalize

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen2Config
from transformers import TopKLogitsWarper as TopK
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from assets.common import UserError, as_user_error, print_once

CARDS = (16, 24, 48, 80)  # GB; each has settings in assets/cards
USABLE = 0.9  # of a card: the rest is for what is not counted
DEFAULT = "Qwen/Qwen2.5-1.5B-Instruct"  # its shape is here: no download is needed
QWEN = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}  # Qwen2.5-1.5B
QWEN |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
QWEN |= {"tie_word_embeddings": True}


class Memory(TorchDispatchMode):
    """Count the bytes of all tensors that are made under it and are still alive."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.alive:  # a view shares its storage
            self.alive.add(id(storage))
            self.now += storage.nbytes()
            finalize(storage, self.remove, id(storage), storage.nbytes())

    def remove(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, result)
        self.peak = max(self.peak, self.now)
        return result

    def of(self, phase: Callable, *args: int) -> int:
        """Return the most bytes alive while `phase` runs."""
        self.peak = self.now
        phase(*args)
        return self.peak


class Step:
    """A step after the first, phase by phase: model, reference and Adam's state are there."""

    def __init__(self, config: PretrainedConfig, args: GRPOConfig, model_args: ModelConfig):
        self.args, lora = args, get_peft_config(model_args)
        mixed = torch.float16 if args.fp16 else torch.bfloat16
        self.autocast = lambda: torch.autocast("cpu", mixed, enabled=args.bf16 or args.fp16)
        self.accelerator = SimpleNamespace(autocast=self.autocast)  # for TRL's method, below

        def build(*outputs: str) -> torch.nn.Module:
            kwargs = {"dtype": getattr(torch, model_args.dtype), "attn_implementation": "sdpa"}
            model = AutoModelForCausalLM.from_config(config, **kwargs).train()
            add_fused_lm_head(model, outputs=outputs)
            return model

        model = build("log_probs", "entropy")
        with mock.patch("torch.utils.swap_tensors"):  # peft casts the adapter from fp32 and back
            self.model = get_peft_model(model, lora) if lora else model
        self.reference = build("log_probs") if args.beta and not lora else None
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, foreach=True)  # the default on a GPU
        self.fill_gradients()
        self.update()

    def fill_gradients(self) -> None:
        """Let there be gradients, as there are from the second micro-batch on."""
        for parameter in self.trained:
            parameter.grad = torch.ones_like(parameter)

    def checkpoint(self) -> None:
        """Turn gradient checkpointing on, as the trainer does."""
        self.model.gradient_checkpointing_enable()
        if hasattr(self.model, "peft_config"):
            self.model.enable_input_require_grads()

    def batch(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[:, 0] = 0  # padding
        return {"input_ids": torch.ones_like(mask), "attention_mask": mask}

    @torch.no_grad()
    def prefill(self, rows: int) -> None:
        """Read the prompts of a generate call, one for each of its completions."""
        batch = self.batch(rows, self.args.max_prompt_length)
        with self.autocast():
            self.cache = self.model(**batch, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def decode(self, rows: int) -> None:
        """Sample the last token of all completions, when the KV cache is longest."""
        length = self.args.max_prompt_length + self.args.max_completion_length
        batch = self.batch(rows, length)
        for layer in self.cache.layers:
            _, heads, _, size = layer.keys.shape
            layer.keys = layer.keys.new_ones(rows, heads, length - 1, size)
            layer.values = torch.ones_like(layer.keys)
        batch["input_ids"] = batch["input_ids"][:, -1:]
        with self.autocast():
            logits = self.model(**batch, past_key_values=self.cache).logits[:, -1].float()
        torch.multinomial(TopK(self.args.top_k)(None, logits).softmax(-1), 1)
        del self.cache

    def loss(self, rows: int) -> None:
        """Score a micro-batch with TRL's own method, and go backward."""
        completion = self.args.max_completion_length
        batch = self.batch(rows, self.args.max_prompt_length + completion)
        score = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
        options = {"logits_to_keep": completion, "compute_entropy": True}
        logps, _entropies, _ = score(self, self.model, **batch, **options)
        gap = torch.zeros_like(logps) - logps
        kl = gap.exp() - gap - 1
        (self.args.beta * kl - (logps - logps.detach()).exp()).mean().backward()

    def update(self) -> None:
        """Clip the gradients, take an AdamW step, drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Let fake CPU tensors take what CUDA's attention, dropout and TRL's Triton kernels take.

    (Fake CUDA tensors have no autograd in a torch without CUDA.)
    """

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        if attn_mask is not None:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -1e4)
            attn_mask = bias.expand(*query.shape[:3], key.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        grad = torch.is_grad_enabled()
        return kernel(query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, True)[0] if p and training else x

    torch_ops = {"scaled_dot_product_attention": attention, "dropout": dropout}
    names = ("_forward_tile", "_backward_tile", "_addmm_fp32")
    in_place = dict.fromkeys(names, lambda *args, **kwargs: None)  # Triton, cuBLAS: take nothing
    fused_head = mock.patch.multiple(chunked_logprob, **in_place)
    with mock.patch.multiple(functional, **torch_ops), fused_head:
        yield


def peaks(
    config: PretrainedConfig,
    args: GRPOConfig,
    model_args: ModelConfig,
    modes: Iterable[bool] = (False, True),
    sizes: Iterable[int] = (),
) -> Iterator[tuple[bool, int, dict[str, int]]]:
    """Yield gradient checkpointing (on or off), micro-batch, and each phase's peak in bytes.

    modes  gradient checkpointing, False before True
    sizes  micro-batches; without them the powers of two that divide the step, and the setting
    """
    own = args.per_device_train_batch_size
    calls = {"generation": own * args.steps_per_generation}  # completions in a generate call
    if args.evaluate:
        calls["evaluation"] = args.per_device_eval_batch_size
    if not sizes:
        sizes = sorted({2**k for k in range(10) if calls["generation"] % 2**k == 0} | {own})
    with cuda_kernels(), FakeTensorMode(), Memory() as memory:
        step, peak = Step(config, args, model_args), {}
        for name, n in calls.items():
            peak[name] = max(memory.of(step.prefill, n), memory.of(step.decode, n))
        step.fill_gradients()
        peak["optimizer"] = memory.of(step.update)
        step.fill_gradients()
        for checkpointing in modes:
            if checkpointing:
                step.checkpoint()
            for rows in sizes:
                yield checkpointing, rows, peak | {"loss": memory.of(step.loss, rows)}


def check(args: GRPOConfig, model_args: ModelConfig) -> None:
    """Raise UserError for what is not simulated."""
    if args.use_vllm:
        raise UserError("not estimated with vLLM: add --use_vllm False; vLLM's share is on top")
    if args.optim != "adamw_torch" or model_args.load_in_4bit:
        raise UserError("not estimated in 4 bits, or with another optimizer")


def report(args: GRPOConfig, model_args: ModelConfig) -> None:
    """Print the table of `--estimate_memory`, what fits each card, and each card's file."""
    check(args, model_args)
    name, largest = model_args.model_name_or_path, {}
    own = (model_args.use_peft, args.gradient_checkpointing, args.per_device_train_batch_size)
    row = "{:<8} {:>13} {:>11} {:>8}  {:<10}{}"
    print_once(f"Peak memory of {name}, estimated in about a minute:")
    print_once(
        f"prompts of {args.max_prompt_length} tokens, completions of {args.max_completion_length}"
    )
    print_once(row.format("training", "checkpointing", "micro-batch", "peak, GB", "in", ""))
    with as_user_error(f"cannot estimate {name!r}"):
        config = Qwen2Config(**QWEN) if name == DEFAULT else AutoConfig.from_pretrained(name)
        for training, model_args.use_peft in (("full", False), ("LoRA", True)):
            for checkpointing, rows, peak in peaks(config, args, model_args):
                phase, mode = max(peak, key=peak.get), "on" if checkpointing else "off"
                these = own == (model_args.use_peft, checkpointing, rows)
                mark, top = " <- these settings" if these else "", peak[phase] / 1e9
                print_once(row.format(training, mode, rows, f"{top:.1f}", phase, mark))
                fits = largest.setdefault(f"{training}, checkpointing {mode}", {})
                fits |= {card: rows for card in CARDS if top <= USABLE * card}
    row = "{:<40}" + " {:>9}" * len(CARDS)
    free = f"Largest micro-batch that leaves {1 - USABLE:.0%} free"
    print_once("\n" + row.format(free, *(f"{card} GB" for card in CARDS)))
    for mode, fits in largest.items():
        print_once(row.format(mode, *(fits.get(card, "none") for card in CARDS)))
    files = [f"{card}gb.yaml" for card in CARDS]
    print_once(row.format("For Qwen2.5-1.5B: --config assets/cards/", *files))
