"""The trainer: what is trained is what was sampled. Model and tokenizer are checked for that."""

import inspect
import os
import re
import socket
from functools import partial

import torch
import trl
from accelerate.utils import set_seed
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.trainer.utils import split_tensor_dict

from assets.settings import UserError, as_user_error, print_error
from rewards import count_xml, score

TRIM = re.compile(r"\s*\|\s*trim\b(?!\()|\.strip\(\)")  # in a chat template


def order_matters(args: trl.GRPOConfig) -> bool:
    """Return whether the loss has a mean over a micro-batch's tokens: its rows then matter."""
    entropy = args.top_entropy_quantile < 1 or args.entropy_coef or args.use_adaptive_entropy
    return bool(args.loss_type == "bnpo" or entropy or args.router_aux_loss_coef)


def call_without_padding(model, input_ids, attention_mask, labels, **kwargs):
    """Call the model without the columns in which no row has a token; their outputs are 0."""
    used = attention_mask.any(0).nonzero()
    start, end = used[0].item(), used[-1].item() + 1
    cut = {"attention_mask": attention_mask[:, start:end], "labels": labels[:, start:end]}
    output = model(input_ids=input_ids[:, start:end], **cut, **kwargs)
    for name in {"log_probs", "entropy"} & output.keys():
        output[name] = torch.nn.functional.pad(output[name], (start, input_ids.shape[1] - end))
    return output


def sync_exactly(sync, model: PeftModel) -> None:
    """Send merged weights to vLLM by `sync`; put the base back, which in bf16 would drift."""
    layers = [m.get_base_layer() for m in model.modules() if hasattr(m, "get_base_layer")]
    kept = [(layer, layer.weight, layer.weight.detach().clone()) for layer in layers]
    sync()
    for layer, weight, values in kept:
        weight.data.copy_(values)
        layer.weight = weight  # of a quantized layer, merging makes another one


class GRPOTrainer(trl.GRPOTrainer):  # the same name: W&B's timers are named after the class
    """TRL's trainer and loss, without work on padding; equal rewards have advantage 0, exactly."""

    def __init__(self, *args, **kwargs):
        with socket.socket() as free:  # two runs with vLLM that start together take one port
            free.bind(("", 0))
            os.environ.setdefault("MASTER_PORT", str(free.getsockname()[1]))
        super().__init__(*args, **kwargs)
        if self.use_vllm:
            engine, stops = self.vllm_generation, {"stop_token_ids": self.eos_token_ids}
            engine.generation_kwargs = engine.generation_kwargs | stops
            if isinstance(engine.model, PeftModel):
                engine.sync_weights = partial(sync_exactly, engine.sync_weights, engine.model)
            if self.args.vllm_mode == "colocate":  # vLLM has set the seed to its own
                set_seed(self.args.seed, device_specific=True)

    def _get_per_token_logps_and_entropies(self, model, ids, mask, keep, batch_size=None, **kwargs):
        order = (mask.sum(1) * bool(batch_size and batch_size < len(ids))).argsort(stable=True)
        call = partial(call_without_padding, model)
        scores = super()._get_per_token_logps_and_entropies(
            call, ids[order], mask[order], keep, batch_size, **kwargs
        )
        return tuple(x if x is None or x.ndim == 0 else x[order.argsort()] for x in scores)

    def _prepare_inputs(self, generation_batch):
        before, n = self._buffered_inputs, self.args.gradient_accumulation_steps
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or n == 1 or order_matters(self.args):
            return inputs
        buffer = self._buffered_inputs
        steps = [buffer[i : i + n] for i in range(0, len(buffer), n)]  # of the optimizer
        self._buffered_inputs = [batch for step in steps for batch in in_order_of_length(step)]
        return self._buffered_inputs[self._step % len(buffer)]

    def _calculate_rewards(self, *args):
        return super()._calculate_rewards(*args).double()  # a float32 mean can be one unit off

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        exact = batch["advantages"]  # in float64; what is not 0, but tiny, is rounding
        return batch | {"advantages": exact.where(exact.abs() > 1e-8, 0).float()}

    def log(self, logs, start_time=None):
        self.log_completions &= "loss" in logs  # not the last step's again when training ends
        super().log(logs, start_time)


def in_order_of_length(batches: list[dict]) -> list[dict]:
    """Return the micro-batches with their rows sorted by length, the shortest in the first one."""
    whole = {k: torch.cat([b[k] for b in batches]) if x.ndim else x for k, x in batches[0].items()}
    order = (whole["prompt_mask"].sum(1) + whole["completion_mask"].sum(1)).argsort(stable=True)
    return split_tensor_dict({k: x[order] if x.ndim else x for k, x in whole.items()}, len(batches))


def check_model(args, model, tokenizer, prompt: list[dict], rows) -> None:
    """Check that the format can be learned, and prompts fit. prompt: messages with the example."""
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")  # `generate` obeys all others too
    kept = {name: getattr(model.generation_config, name) for name in kept}
    model.generation_config = GenerationConfig(**kept)
    if not tokenizer.chat_template:
        raise UserError("no chat template: use the instruct version, or add chat_template.jinja")
    options = {"tokenize": False, **(args.chat_template_kwargs or {})}
    show = partial(tokenizer.apply_chat_template, add_generation_prompt=True, **options)
    with as_user_error("the chat template cannot show a prompt", Exception):
        keep_newlines(tokenizer, prompt[2]["content"], partial(show, prompt))
        turn = tokenizer.apply_chat_template(prompt[:3], **options)
    check_stops(model, tokenizer, *turn.rpartition(prompt[2]["content"].rstrip())[::2])
    check_tokens(tokenizer, prompt, show(prompt))
    lengths = [*map(len, tokenizer(show(rows["prompt"][:]), add_special_tokens=False).input_ids)]
    if long := sum(n > args.max_prompt_length for n in lengths):
        over = f"{long} of {len(lengths)} prompts have over {args.max_prompt_length} tokens"
        print_error(f"warning: {over} (up to {max(lengths)}); they are kept whole")
    takes, rope = inspect.signature(type(model).forward).parameters, "rope_parameters"
    if "position_ids" in takes and not getattr(model.config.get_text_config(), rope, None):
        raise UserError(f"{model.config.model_type} has absolute positions, which TRL would shift")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and (longest := max(lengths) + args.max_completion_length) > positions:
        why = f"a prompt and its completion may take {longest} tokens, the model takes {positions}"
        raise UserError(f"{why}: lower --max_completion_length")


def keep_newlines(tokenizer: PreTrainedTokenizerBase, example: str, show) -> None:
    """Let the chat template `show` the example with its last newline, as it is to be learned."""
    if example not in show() and example.strip() in show():
        tokenizer.chat_template = TRIM.sub("", tokenizer.get_chat_template())
        done = "that is taken out of it" if example in show() else "the example lost its newline"
        print_error(f"warning: the chat template trims messages: {done}")


def check_tokens(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], text: str) -> None:
    """Check that template (`text`) and tokenizer keep the prompt, and the example's format."""
    example = prompt[2]["content"]
    ids, answer = tokenizer([text, example], add_special_tokens=False)["input_ids"]
    read = tokenizer.decode(answer, skip_special_tokens=True)
    if count_xml(read) < count_xml(example) or score(read, "") != score(example, ""):
        tokens = tokenizer.added_tokens_decoder.values()
        special = [token.content for token in tokens if token.special and token.content in example]
        cure = f"let {special} not be special" if special else "is its tokenizer_class right?"
        raise UserError(f"the tokenizer makes {read[:60]!r} of the format: {cure}")
    if len(answer) > 0.8 * len(example):
        print_error("warning: the tokenizer cuts texts into single letters: use the model's own")
    shown = tokenizer.decode(ids)
    if lost := [m["content"][:50] for m in prompt if m["content"].strip() not in shown]:
        print_error(f"warning: chat template or tokenizer lose or change {lost}")
    thinks = re.search(r"<\w+>\s*$", text)
    if thinks or ("enable_thinking" in tokenizer.get_chat_template() and "</think>" not in text):
        cure = """use --chat_template_kwargs '{"enable_thinking": false}', or another model"""
        print_error(f"warning: completions begin with <think>, so no format is earned: {cure}")


def check_stops(model, tokenizer: PreTrainedTokenizerBase, start: str, rest: str) -> None:
    """Check that generation stops as the template ends a turn; it shows `start`, text, `rest`."""
    rest, ids = rest.strip(), tokenizer.get_added_vocab()
    end = max((token for token in ids if rest.startswith(token)), key=len, default=None)
    stops = model.generation_config.eos_token_id  # TRL stops there, and at the tokenizer's
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    eos = tokenizer.eos_token
    if eos is None or (end and eos != end and eos in start):  # as in GGUF files of Llama
        if not (end or stops):
            raise UserError("no token stops generation: set eos_token in the model's folder")
        tokenizer.eos_token = tokenizer.pad_token = end or tokenizer.convert_ids_to_tokens(stops[0])
        print_error(f"warning: eos_token is {eos}; {tokenizer.eos_token} is used instead")
    stops = sorted({tokenizer.eos_token_id, *stops} - {None})
    if rest and (not end or ids[end] not in stops):
        cure = f": set eos_token_id {[ids[end], *stops]} in generation_config.json" if end else ""
        ends = f"a turn ends with {end or rest!r}, generation at {tokenizer.decode(stops)}"
        print_error(f"warning: {ends}{cure}")


def check_adapter(model: PeftModel, beta: float) -> None:
    """Warn of linear layers without adapter; with beta, refuse one that changes the base."""
    start = model.peft_config["default"].init_lora_weights
    if beta and re.match("(?i)pissa|olora|corda|loftq", str(start)):
        raise UserError(f"{start} changes the base weights, the KL's reference: use --beta 0")
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    bare = {n.split(".")[-1] for n in linear if "lora_" not in n and ".base_layer" not in n}
    if bare := sorted(bare - {"lm_head", "embed_out"}):
        names = " ".join(sorted({*model.peft_config["default"].target_modules, *bare}))
        print_error(f"warning: no adapter on {', '.join(bare)}: add --lora_target_modules {names}")
