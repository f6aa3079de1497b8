"""Stop and resume with a second value of every field of TRL's GRPOConfig: is the run the same?

A few rows run by default; `FIELDS=all python -m pytest tests/test_fields.py` runs all of them.
"""

import dataclasses
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import trl
from conftest import LAPTOP, ROOT, history, run
from safetensors.torch import load_file

BASE = "--num_generations 4 --per_device_train_batch_size 16 --max_completion_length 24"
BASE += " --evaluate False --log_completions False --max_steps 6 --save_steps 1"
BASE += " --save_total_limit 9 --disable_tqdm True"
HELD = "--evaluate True --eval_samples 8 --per_device_eval_batch_size 8"
EVAL = f"{HELD} --eval_strategy steps --eval_steps 2"
EPOCHS = "--max_steps -1 --dataset_name {few}"  # 14 questions: 3 steps an epoch
BEST = f"{EVAL} --eval_steps 1 --metric_for_best_model reward"
OFF = "--num_iterations 2 --learning_rate 1e-2"  # away from the policy that sampled

SCHEDULES = "linear cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt"
OPTIMIZERS = "adamw_torch_fused adafactor sgd adagrad rmsprop"
LOSSES = "bnpo dr_grpo dapo luspo cispo sapo vespo"
HUB = "token private_repo model_id strategy always_push revision"
VLLM = """
    use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode
    vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length
    vllm_tensor_parallel_size vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_cap
"""

# Field -> flags, with which it has another value; the run is stopped at step 3, or at that after @
ROWS = {
    "per_device_train_batch_size": [
        "--per_device_train_batch_size 8",
        "--per_device_train_batch_size 32",
    ],
    "num_train_epochs": [
        f"{EPOCHS} --num_train_epochs 2",
        f"@4 {EPOCHS} --num_train_epochs 2",
        f"@5 {EPOCHS} --num_train_epochs 1.9",
        f"@5 {EPOCHS} --num_train_epochs 3 --seed 3",
        f"@7 {EPOCHS} --num_train_epochs 3",
        # seven batches an epoch, and the last step of an epoch has one of them
        f"{EPOCHS} --num_train_epochs 2 --per_device_train_batch_size 8 "
        "--gradient_accumulation_steps 2 --steps_per_generation 1",
        f"@4 {EPOCHS} --num_train_epochs 2 --per_device_train_batch_size 8 "
        "--gradient_accumulation_steps 2 --steps_per_generation 1",
        f"@5 {EPOCHS} --num_train_epochs 2 --num_iterations 2",
        f"@6 {EPOCHS} --num_train_epochs 2 --num_iterations 2",
        f"@7 {EPOCHS} --num_train_epochs 2 --num_iterations 2",
    ],
    "max_steps": ["--max_steps 5", "@6 --max_steps 6", "@5 --max_steps 8 --dataset_name {few}"],
    "learning_rate": ["--learning_rate 1e-2"],
    "lr_scheduler_type": [
        *(f"--lr_scheduler_type {name}" for name in SCHEDULES.split()),
        "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{{\"min_lr\": 1e-5}}'",
        "--lr_scheduler_type cosine_warmup_with_min_lr "
        "--lr_scheduler_kwargs '{{\"min_lr\": 1e-5}}'",
        "--lr_scheduler_type warmup_stable_decay "
        "--lr_scheduler_kwargs '{{\"num_decay_steps\": 2}}'",
        f"{EVAL} --eval_steps 1 --lr_scheduler_type reduce_lr_on_plateau "
        "--lr_scheduler_kwargs '{{\"patience\": 0}}'",
        f"{EVAL} --eval_steps 1 --lr_scheduler_type greedy --lr_scheduler_kwargs "
        "'{{\"patience\": 0}}'",
    ],
    "lr_scheduler_kwargs": [
        "--lr_scheduler_type polynomial --lr_scheduler_kwargs '{{\"power\": 2}}'"
    ],
    "warmup_steps": ["--warmup_steps 0", "--warmup_steps 4"],
    "optim": [f"--optim {name}" for name in OPTIMIZERS.split()],
    "optim_args": ["--optim_args a=1"],
    "weight_decay": ["--weight_decay 0"],
    "adam_beta1": ["--adam_beta1 0.5"],
    "adam_beta2": ["--adam_beta2 0.9"],
    "adam_epsilon": ["--adam_epsilon 1e-3"],
    "optim_target_modules": ["--optim_target_modules q_proj"],
    "gradient_accumulation_steps": [
        "--gradient_accumulation_steps 2",
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 4",
    ],
    "average_tokens_across_devices": ["--average_tokens_across_devices False"],
    "max_grad_norm": ["--max_grad_norm 0", "--max_grad_norm 1"],
    "label_smoothing_factor": ["--label_smoothing_factor 0.1"],
    "bf16": ["--bf16 True", "--bf16 True --dtype bfloat16 --learning_rate 1e-2"],
    "fp16": ["--fp16 True"],
    "bf16_full_eval": [f"{EVAL} --bf16_full_eval True"],
    "fp16_full_eval": [f"{EVAL} --fp16_full_eval True"],
    "tf32": ["--tf32 True"],
    "gradient_checkpointing": ["--gradient_checkpointing True"],
    "gradient_checkpointing_kwargs": [
        "--gradient_checkpointing True --gradient_checkpointing_kwargs "
        "'{{\"use_reentrant\": true}}'",
        "--use_peft --gradient_checkpointing True --gradient_checkpointing_kwargs "
        '\'{{"use_reentrant": false, "preserve_rng_state": false}}\'',
    ],
    "use_liger_kernel": ["--use_liger_kernel True"],
    "use_cache": ["--use_cache True"],
    "neftune_noise_alpha": ["--neftune_noise_alpha 5"],
    "torch_empty_cache_steps": ["--torch_empty_cache_steps 2"],
    "auto_find_batch_size": ["--auto_find_batch_size True"],
    "logging_strategy": ["--logging_strategy no", f"{EPOCHS} --logging_strategy epoch"],
    "logging_steps": [
        "--logging_steps 2",
        "--logging_steps 4",
        "--logging_steps 0.4",
        "--logging_steps 4 --num_iterations 2",
        "--logging_steps 10",
    ],
    "logging_first_step": ["--logging_steps 5 --logging_first_step True"],
    "log_on_each_node": ["--log_on_each_node True"],
    "logging_nan_inf_filter": ["--logging_nan_inf_filter True"],
    "include_num_input_tokens_seen": ["--include_num_input_tokens_seen True"],
    "log_level": ["--log_level error"],
    "log_level_replica": ["--log_level_replica error"],
    "disable_tqdm": ["--disable_tqdm False"],
    "report_to": ["--report_to none", "--report_to tensorboard"],
    "run_name": ["--run_name another"],
    "project": ["--project another"],
    "eval_strategy": [EVAL, f"@4 {EVAL}", f"{HELD} {EPOCHS} --eval_strategy epoch"],
    "eval_steps": [f"{EVAL} --eval_steps 1", f"{EVAL} --eval_steps 0.5"],
    "eval_delay": [f"{EVAL} --eval_delay 3"],
    "per_device_eval_batch_size": [f"{EVAL} --per_device_eval_batch_size 4"],
    "prediction_loss_only": [f"{EVAL} --prediction_loss_only True"],
    "eval_on_start": [f"{EVAL} --eval_on_start True"],
    "eval_do_concat_batches": [f"{EVAL} --eval_do_concat_batches False"],
    "eval_use_gather_object": [f"{EVAL} --eval_use_gather_object True"],
    "eval_accumulation_steps": [f"{EVAL} --eval_accumulation_steps 1"],
    "include_for_metrics": [f"{EVAL} --include_for_metrics loss"],
    "batch_eval_metrics": [f"{EVAL} --batch_eval_metrics True"],
    "save_only_model": ["--save_only_model True"],
    "save_strategy": [
        "--save_strategy no",
        f"{EPOCHS} --save_strategy epoch",
        f"@4 {EPOCHS} --num_train_epochs 2 --save_strategy epoch",
        f"{BEST} --save_strategy best",
        f"{BEST} --save_strategy best --num_iterations 2",
    ],
    "save_steps": [
        "@4 --save_steps 2",
        "--save_steps 0.5",
        "@5 --save_steps 5 --num_iterations 2",
        "@5 --save_steps 5 --steps_per_generation 4 --per_device_train_batch_size 4",
    ],
    "save_on_each_node": ["--save_on_each_node True"],
    "save_total_limit": ["--save_total_limit 2"],
    "enable_jit_checkpoint": ["--enable_jit_checkpoint True"],
    "push_to_hub": ["--push_to_hub True"],
    "load_best_model_at_end": [
        f"{BEST} --load_best_model_at_end True",
        f"@6 {BEST} --load_best_model_at_end True",
    ],
    "metric_for_best_model": [BEST],
    "greater_is_better": [f"{BEST} --greater_is_better False"],
    "ignore_data_skip": ["--ignore_data_skip True"],
    "restore_callback_states_from_checkpoint": ["--restore_callback_states_from_checkpoint True"],
    "full_determinism": ["--full_determinism True"],
    "seed": ["--seed 7"],
    "data_seed": ["--data_seed 7"],
    "accelerator_config": [
        f"--accelerator_config '{{{{{text}}}}}'"
        for text in (
            '"split_batches": true',
            '"use_seedable_sampler": false',
            '"even_batches": false',
            '"dispatch_batches": true',
            '"gradient_accumulation_kwargs": {{"sync_each_batch": true}}',
        )
    ],
    "dataloader_drop_last": ["--dataloader_drop_last True"],
    "dataloader_num_workers": [
        "--dataloader_num_workers 2",
        f"@4 {EPOCHS} --dataloader_num_workers 2 --num_train_epochs 2",
    ],
    "dataloader_pin_memory": ["--dataloader_pin_memory False"],
    "dataloader_persistent_workers": [
        "--dataloader_num_workers 1 --dataloader_persistent_workers True",
        f"{EPOCHS} --num_train_epochs 2 --dataloader_num_workers 1 "
        "--dataloader_persistent_workers True",
        f"{EVAL} --dataloader_num_workers 1 --dataloader_persistent_workers True",
    ],
    "dataloader_prefetch_factor": ["--dataloader_num_workers 1 --dataloader_prefetch_factor 4"],
    "dataloader_multiprocessing_context": [
        "--dataloader_num_workers 1 --dataloader_multiprocessing_context fork"
    ],
    "dataloader_in_order": ["--dataloader_in_order False"],
    "remove_unused_columns": ["--remove_unused_columns True"],
    "label_names": ["--label_names labels"],
    "train_sampling_strategy": ["--train_sampling_strategy group_by_length"],
    "length_column_name": ["--length_column_name tokens"],
    "ddp_find_unused_parameters": ["--ddp_find_unused_parameters True"],
    "ddp_bucket_cap_mb": ["--ddp_bucket_cap_mb 5"],
    "ddp_broadcast_buffers": ["--ddp_broadcast_buffers True"],
    "ddp_static_graph": ["--ddp_static_graph True"],
    "ddp_backend": ["--ddp_backend gloo"],
    "ddp_timeout": ["--ddp_timeout 900"],
    "debug": ["--debug underflow_overflow"],
    "skip_memory_metrics": ["--skip_memory_metrics False"],
    "do_train": ["--do_train True"],
    "do_eval": ["--do_eval True"],
    "do_predict": ["--do_predict True"],
    "resume_from_checkpoint": ["--resume_from_checkpoint checkpoint-2"],
    "model_init_kwargs": ['--model_init_kwargs \'{{"attn_implementation": "eager"}}\''],
    "trust_remote_code": ["--trust_remote_code True"],
    "router_aux_loss_coef": ["--router_aux_loss_coef 0.1"],
    "disable_dropout": ["--disable_dropout True", "--use_peft --disable_dropout True"],
    "cast_lm_head_to_fp32": ["--cast_lm_head_to_fp32 True"],
    "num_generations": ["--num_generations 8"],
    "num_generations_eval": [f"{EVAL} --num_generations_eval 2"],
    "max_completion_length": ["--max_completion_length 16"],
    "ds3_gather_for_generation": ["--ds3_gather_for_generation False"],
    "shuffle_dataset": [
        "--shuffle_dataset False",
        f"@4 {EPOCHS} --num_train_epochs 2 --shuffle_dataset False",
    ],
    "pad_to_multiple_of": ["--pad_to_multiple_of 8"],
    "generation_batch_size": ["--generation_batch_size 32", "@4 --generation_batch_size 64"],
    "steps_per_generation": [
        "--steps_per_generation 2",
        "--steps_per_generation 4",
        "@4 --steps_per_generation 4",
        "@5 --steps_per_generation 4 --gradient_accumulation_steps 2",
        "--steps_per_generation 1 --gradient_accumulation_steps 2",
        "--steps_per_generation 2 --gradient_accumulation_steps 3 --dataset_name {few}",
    ],
    "temperature": ["--temperature 0.7"],
    "top_p": ["--top_p 0.9"],
    "top_k": ["--top_k 5"],
    "min_p": ["--min_p 0.1"],
    "generation_kwargs": ["--generation_kwargs '{{\"temperature\": 0.5}}'"],
    "chat_template_kwargs": ["--chat_template_kwargs '{{\"enable_thinking\": false}}'"],
    "repetition_penalty": ["--repetition_penalty 1.2"],
    "cache_implementation": ["--cache_implementation static"],
    "beta": ["--beta 0", "--beta 0.5"],
    "num_iterations": [
        "--num_iterations 2",
        "@4 --num_iterations 2",
        "@5 --num_iterations 3",
        "@5 --num_iterations 2 --steps_per_generation 2",
        "--num_iterations 2 --gradient_accumulation_steps 2 --per_device_train_batch_size 8",
    ],
    "epsilon": [f"{OFF} --epsilon 0.01"],
    "delta": [f"{OFF} --delta 1.1"],
    "epsilon_high": [f"{OFF} --epsilon_high 0.3"],
    "sapo_temperature_neg": ["--loss_type sapo --sapo_temperature_neg 2"],
    "sapo_temperature_pos": ["--loss_type sapo --sapo_temperature_pos 2"],
    "vespo_k_pos": ["--loss_type vespo --vespo_k_pos 1"],
    "vespo_lambda_pos": ["--loss_type vespo --vespo_lambda_pos 1"],
    "vespo_k_neg": ["--loss_type vespo --vespo_k_neg 1"],
    "vespo_lambda_neg": ["--loss_type vespo --vespo_lambda_neg 1"],
    "importance_sampling_level": [f"{OFF} --importance_sampling_level sequence"],
    "reward_weights": ["--reward_weights 1 1 1 1 2"],
    "multi_objective_aggregation": ["--multi_objective_aggregation normalize_then_sum"],
    "scale_rewards": ["--scale_rewards batch", "--scale_rewards none"],
    "loss_type": [
        *(f"--loss_type {name} {OFF}" for name in LOSSES.split()),
        "--loss_type dapo --gradient_accumulation_steps 2 --steps_per_generation 4",
        f"{EPOCHS} --num_train_epochs 2 --loss_type dapo --per_device_train_batch_size 8 "
        "--gradient_accumulation_steps 2 --steps_per_generation 1",
    ],
    "mask_truncated_completions": ["--mask_truncated_completions True"],
    "sync_ref_model": [
        "--sync_ref_model True --ref_model_sync_steps 2",
        "@6 --sync_ref_model True --ref_model_sync_steps 2",
    ],
    "ref_model_mixup_alpha": [
        "--sync_ref_model True --ref_model_sync_steps 2 --ref_model_mixup_alpha 0.3"
    ],
    "ref_model_sync_steps": ["--sync_ref_model True --ref_model_sync_steps 1"],
    "top_entropy_quantile": ["--top_entropy_quantile 0.2"],
    "entropy_coef": ["--entropy_coef 0.1"],
    "use_adaptive_entropy": ["--use_adaptive_entropy True"],
    "entropy_coef_min": ["--use_adaptive_entropy True --entropy_coef_min 0.01"],
    "entropy_coef_max": ["--use_adaptive_entropy True --entropy_coef_max 0.02"],
    "entropy_coef_delta": ["--use_adaptive_entropy True --entropy_coef_delta 0.05"],
    "entropy_target": [
        "--use_adaptive_entropy True --entropy_target 5 --per_device_train_batch_size 8 "
        "--gradient_accumulation_steps 2",
    ],
    "max_tool_calling_iterations": ["--max_tool_calling_iterations 2"],
    "off_policy_mask_threshold": [f"{OFF} --off_policy_mask_threshold 0.01"],
    "use_bias_correction_kl": [f"{OFF} --use_bias_correction_kl True"],
    "log_completions": ["--log_completions True", "--log_completions True --num_iterations 2"],
    "log_multimodal": ["--log_completions True --log_multimodal False"],
    "num_completions_to_print": ["--log_completions True --num_completions_to_print 2"],
    "log_unique_prompts": ["--log_completions True --log_unique_prompts True"],
    "use_transformers_continuous_batching": ["--use_transformers_continuous_batching True"],
    "transformers_continuous_batching_config": [
        "--use_transformers_continuous_batching True --transformers_continuous_batching_config "
        "'{{\"max_memory_percent\": 0.1}}'"
    ],
}
# Fields that have no second value on a laptop
NOT_HERE = {
    "output_dir": "each run has one",
    "use_cpu": "no GPU",
    "local_rank": "set by the launcher",
    "torch_compile": "slow",
    "torch_compile_backend": "slow",
    "torch_compile_mode": "slow",
    "liger_kernel_config": "needs a GPU",
    "parallelism_config": "several GPUs",
    "fsdp": "several GPUs",
    "fsdp_config": "several GPUs",
    "deepspeed": "several GPUs",
    "use_transformers_paged": "deprecated name of use_transformers_continuous_batching",
    "trackio_space_id": "another logger",
    "trackio_bucket_id": "another logger",
    "trackio_static_space_id": "another logger",
    "log_completions_hub_repo": "uploads to the hub",
    **{f"hub_{name}": "uploads to the hub" for name in HUB.split()},
    **{name: "vLLM" for name in VLLM.split()},
}
# Combinations with what is not TRL's
MORE = [
    "@6 --logging_steps 4",
    "@5 --num_iterations 2 --log_completions True --logging_steps 3 --print_steps 1",
    "@5 --sync_ref_model True --ref_model_sync_steps 2 --num_iterations 2 --logging_steps 5",
    "--use_peft --lora_dropout 0.5 --gradient_checkpointing True",
    "--use_peft --num_iterations 2",
    "--one_shot --log_completions True",
]
OTHERS = "artifact path sha256 profiling/ _runtime _timestamp _step _per_second time memory mem_"


def test_every_field_is_in_one_table():
    fields = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert fields == ROWS.keys() | NOT_HERE.keys()
    assert not ROWS.keys() & NOT_HERE.keys()


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder with 14 questions."""
    folder = tmp_path_factory.mktemp("few")
    lines = (ROOT / "assets/tiny/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:14]))
    shutil.copy(ROOT / "assets/tiny/test.jsonl", folder)
    return folder


def logged(file: Path, after: int) -> dict:
    """Return the last value of each series at each step after `after`; no times, no files."""
    values = {}
    for row in history(file):
        step = row.get("train/global_step", 0)
        for name, value in row.items():
            if step > after and not any(part in name for part in OTHERS.split()):
                values[step, name] = json.dumps(value, sort_keys=True)
    return values


def same_weights(a: Path, b: Path) -> bool:
    (name,) = {file.name for out in (a, b) for file in out.glob("*.safetensors")}
    left, right = load_file(a / name), load_file(b / name)
    return left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left)


def stop(out: Path, step: int) -> None:
    """Make a finished run look as if it had been killed after a step."""
    for folder in out.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    for file in [*out.glob("*.safetensors")]:
        file.unlink()
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"finished": False}))


CASES = [(name, flags) for name, rows in {**ROWS, "more": MORE}.items() for flags in rows]
DEFAULT = {  # one row of these fields runs always, all rows of all fields with FIELDS=all
    "num_train_epochs": 4,
    "num_iterations": 2,
    "steps_per_generation": 1,
    "sync_ref_model": 0,
    "logging_steps": 1,
    "label_smoothing_factor": 0,
}
if os.environ.get("FIELDS") != "all":
    CASES = [(name, ROWS[name][i]) for name, i in DEFAULT.items()]


@pytest.mark.parametrize(("name", "flags"), CASES, ids=[name for name, _ in CASES])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, few, name, flags):
    step, flags = flags[1:].split(" ", 1) if flags[0] == "@" else (3, flags)
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    flags = [*LAPTOP, *BASE.split(), *shlex.split(flags.format(few=few))]
    done = run(*flags, "--output_dir", whole)
    if done.returncode == 2:  # refused
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        return
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.copytree(whole, out, symlinks=True)
    stop(out, int(step))
    done = run(*flags, "--output_dir", out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert same_weights(whole, out)
    files = [sorted(folder.glob("wandb/*run-*/*.wandb")) for folder in (whole, out)]
    if files[0]:
        series, again = (logged(each[-1], int(step)) for each in files)
        different = [key for key in series | again if series.get(key) != again.get(key)]
        assert different == []
