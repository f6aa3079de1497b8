"""Will it fit? The peak GPU memory of a training step, computed without a GPU and without weights.

    python -m assets.tools.memory           # Qwen2.5-1.5B, the script's defaults
    python -m assets.tools.memory --model_name_or_path DIR --max_completion_length 512

Runs the real model, TRL's scoring, backward and AdamW on tensors that have a shape but no data
(torch's FakeTensorMode), and adds up what is alive. Prompts and completions have their maximum
length, some are padded (so sdpa uses its memory-efficient kernel), and the step is not the first.
The reference's pass is left out: the loss' own holds more.

Not counted: the CUDA context, cuBLAS workspaces, buffers inside kernels, memory that PyTorch's
allocator holds but cannot use, and the evaluation's one-shot example: a tenth of the card is kept
free for them. Linear attention runs PyTorch's own code, which may hold more than special kernels.
1 GB is 10^9 bytes, for tensors and for cards.
"""

import logging
import sys
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

from assets.settings import UserError, as_user_error, exit_on_error, print_once
from grpo_demo import parse_args

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

    def fill_gradients(self) -> None:  # as from the second micro-batch on
        for parameter in self.trained:
            parameter.grad = torch.ones_like(parameter)

    def batch(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[:, 0] = 0  # padding
        return {"input_ids": torch.ones_like(mask), "attention_mask": mask}

    @torch.no_grad()
    def generate(self, rows: int) -> None:
        """Read prompts, then sample the last token of all completions: the KV cache is longest."""
        prompt, new = self.args.max_prompt_length, self.args.max_completion_length - 1
        with self.autocast():
            cache = self.model(**self.batch(rows, prompt), logits_to_keep=1).past_key_values
            for layer in cache.layers:
                if getattr(layer, "keys", None) is not None:  # a linear layer's state does not grow
                    more = (x[:, :, :1].expand(-1, -1, new, -1) for x in (layer.keys, layer.values))
                    layer.update(*more)  # a sliding one keeps a view of its window
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            batch = self.batch(rows, prompt + new + 1)
            batch["input_ids"] = batch["input_ids"][:, -1:]
            logits = self.model(**batch, past_key_values=cache).logits[:, -1].float()
        torch.multinomial(TopK(self.args.top_k)(None, logits).softmax(-1), 1)

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
    """Let fake CPU tensors take what CUDA's attention, dropout and TRL's Triton kernels take."""
    # fake CUDA tensors have no autograd in a torch without CUDA

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
    modes: Iterable[bool] = (False, True),  # gradient checkpointing, False before True
    sizes: Iterable[int] = (),
    enough: float = float("inf"),
) -> Iterator[tuple[bool, int, dict[str, int]]]:
    """Yield gradient checkpointing (on or off), micro-batch, and each phase's peak in bytes.

    sizes  micro-batches; without them the powers of two that divide the step, and the setting
    enough  bytes: larger micro-batches than the first that takes more are left out
    """
    own, evaluated = args.per_device_train_batch_size, args.per_device_eval_batch_size
    sampled = own * args.steps_per_generation  # completions in a generate call
    sizes = sizes or sorted({2**k for k in range(10) if sampled % 2**k == 0} | {own})
    larger = "evaluation" if args.evaluate and evaluated > sampled else "generation"
    with cuda_kernels(), FakeTensorMode(), Memory() as memory:
        step = Step(config, args, model_args)
        peak = {larger: memory.of(step.generate, max(sampled, args.evaluate * evaluated))}
        step.fill_gradients()
        peak["optimizer"] = memory.of(step.update)
        step.fill_gradients()
        for checkpointing in modes:
            if checkpointing:  # as the trainer turns it on
                step.model.gradient_checkpointing_enable()
                step.model.enable_input_require_grads()
            for rows in sizes:
                loss = memory.of(step.loss, rows)
                yield checkpointing, rows, peak | {"loss": loss}
                if loss > enough and rows >= own:
                    break


def report(args: GRPOConfig, model_args: ModelConfig) -> None:
    """Print the table, what fits each card, and each card's file."""
    if args.use_vllm:
        raise UserError("not estimated with vLLM: add --use_vllm False; vLLM's share is on top")
    if args.optim != "adamw_torch" or model_args.load_in_4bit:
        raise UserError("not estimated in 4 bits, or with another optimizer")
    logging.getLogger(FakeTensorMode.__module__).disabled = True  # the error is one line below
    name, largest = model_args.model_name_or_path, {}
    own = (model_args.use_peft, args.gradient_checkpointing, args.per_device_train_batch_size)
    row = "{:<8} {:>13} {:>11} {:>8}  {:<10}{}"
    with as_user_error(f"cannot estimate {name!r}"):
        config = Qwen2Config(**QWEN) if name == DEFAULT else AutoConfig.from_pretrained(name)
    print_once(
        f"Peak memory of {name}, estimated line by line, in all about two minutes on an idle CPU:\n"
        f"prompts of {args.max_prompt_length} tokens, completions of {args.max_completion_length}"
    )
    if (text := config.get_text_config()) is not config:
        print_once("its text model alone: parts for images or sound are not counted")
    print_once(row.format("training", "checkpointing", "micro-batch", "peak, GB", "in", ""))
    for training, model_args.use_peft in (("full", False), ("LoRA", True)):
        try:
            for checkpointing, rows, peak in peaks(text, args, model_args, enough=max(CARDS) * 1e9):
                phase, mode = max(peak, key=peak.get), "on" if checkpointing else "off"
                these = own == (model_args.use_peft, checkpointing, rows)
                mark, top = " <- these settings" if these else "", peak[phase] / 1e9
                print_once(row.format(training, mode, rows, f"{top:.1f}", phase, mark))
                fits = largest.setdefault(f"{training}, checkpointing {mode}", {})
                fits |= {card: rows for card in CARDS if top <= USABLE * card}
        except Exception as error:  # a model's own code may need data, or another kernel
            why = str(error).splitlines() or [type(error).__name__]
            print_once(f"{training:<8} not estimated from here on: {why[0]}")
    if not largest:
        raise UserError(f"cannot estimate {name!r}: see above")
    show_fits(largest)


def show_fits(largest: dict[str, dict[int, int]]) -> None:
    """Print the largest micro-batch of each way to train on each card, as far as one fits."""
    table = {f"Largest micro-batch that leaves {1 - USABLE:.0%} free": [f"{c} GB" for c in CARDS]}
    table |= {mode: [fits.get(c, "none") for c in CARDS] for mode, fits in largest.items()}
    table["For Qwen2.5-1.5B: --config assets/cards/"] = [f"{c}gb.yaml" for c in CARDS]
    print_once()
    for title, cells in table.items():
        print_once(f"{title:<40}" + "".join(f" {cell:>9}" for cell in cells))


def main(argv: list[str]) -> None:
    """Estimate for the flags of grpo_demo.py."""
    with exit_on_error():
        report(*parse_args([*argv, "--use_cpu"]))


if __name__ == "__main__":
    main(sys.argv[1:])
