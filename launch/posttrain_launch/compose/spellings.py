"""Names that other training programs give to our keys: what to write here instead."""

from __future__ import annotations

import re

from posttrain_launch.compose.tuning_spellings import OTHER_KEYS, VALUED, tuning_advice

# Spelling of Hugging Face, axolotl, LLaMA-Factory or ms-swift -> our key.
KEYS: dict[str, str] = {
    # optimizer
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip",
    "gradient_clipping": "optimizer.clip",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_ratio": "optimizer.warmup_ratio",
    "warmup_steps": "optimizer.warmup_steps",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "num_warmup_steps": "optimizer.warmup_steps",
    "warmup": "optimizer.warmup_ratio",
    "beta_1": "optimizer.beta1",
    "beta_2": "optimizer.beta2",
    "max_norm": "optimizer.clip",
    "clip_grad": "optimizer.clip",
    "cosine_min_lr_ratio": "optimizer.min_lr_ratio",
    # train
    "max_epochs": "train.epochs",
    "n_epochs": "train.epochs",
    "train_steps": "train.steps",
    "batch_size": "train.batch_size",
    "save_freq": "train.save_every",
    "eval_freq": "train.eval_every",
    "checkpoint": "train.resume",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "total_batch_size": "train.batch_size",
    "global_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_batch_size": "train.micro_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_interval": "train.save_every",
    "every_steps": "train.save_every",
    "every": "train.save_every",
    "resume_from_checkpoint": "train.resume",
    "auto_resume_from_checkpoints": "train.resume",
    "torch_dtype": "train.dtype",
    "precision": "train.dtype",
    # data
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "train_files": "data.train",
    "train_dataset": "data.train",
    "data_path": "data.train",
    "val_dataset": "data.eval",
    "eval_dataset": "data.eval",
    "test_datasets": "data.eval",
    "validation_file": "data.eval",
    "val_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "split_dataset_ratio": "data.eval_fraction",
    "sequence_len": "data.max_length",
    "seq_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "model_max_length": "data.max_length",
    "max_len": "data.max_length",
    "max_tokens": "data.max_length",
    "block_size": "data.max_length",
    "preprocessing_num_workers": "data.workers",
    "dataset_num_proc": "data.workers",
    "dataset_processes": "data.workers",
    "num_proc": "data.workers",
    # model
    "model": "model.path",
    "tokenizer_name_or_path": "model.path",
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "model_id": "model.path",
    "attn_impl": "model.attention",
    "attn_implementation": "model.attention",
    "gradient_checkpointing": "model.activation_checkpointing",
    # run
    "output_dir": "output_root",
    "run_dir": "output_root",
    "run_name": "name",
    "wandb_project": "logging.project",
    "wandb_entity": "logging.entity",
    "wandb_mode": "logging.wandb",
    "wandb_name": "name",
    "save_total_limit": "checkpoint.keep",
    "save_limit": "checkpoint.keep",
    "data_seed": "seed",
    "max_new_tokens": "eval.max_new_tokens",
    "num_workers": "cluster.workers",
    "num_processes": "cluster.workers",
    "gpus": "cluster.workers",
    "n_gpus": "cluster.workers",
    "project": "logging.project",
    "project_name": "logging.project",
    "num_gpus": "cluster.workers",
    "nproc_per_node": "cluster.workers",
    "nnodes": "cluster.nodes",
    "num_nodes": "cluster.nodes",
    **OTHER_KEYS,
}
# The advice for these has the value that was typed, or follows from it.
WITH_VALUE = VALUED | {"chat_template"}

# Our own keys of earlier versions -> their names now.
RENAMED: dict[str, str] = {"template.policy": "template.supervise"}

_PACKED = "leave it out: rows are always packed, attention and positions never cross a sample"
_NO_HUB = "nothing is uploaded; `hf upload OWNER/NAME RUN/export` sends the model after the run"

_BEST = "leave it out: the best evaluation is that of the lowest held-out loss"

_EVALUATION = "set train.eval_every, a number of steps; null: before training and at its end"

# Spellings without a key of the same meaning -> what to do.
EXPLAINED: dict[str, str] = {
    "gradient_accumulation_steps": "set train.batch_size (packs per step over all workers) and "
    "train.micro_batch_size; accumulation follows from the two",
    "gradient_accumulation": "set train.batch_size and train.micro_batch_size; accumulation "
    "follows from the two",
    "bf16": "set train.dtype=bfloat16",
    "fp32": "set train.dtype=float32",
    "fp16": "float16 is not supported: set train.dtype=bfloat16, or float32",
    "tf32": "leave it out; number formats are set by train.dtype",
    "flash_attention": "leave it out, or set model.attention",
    "flash_attn": "leave it out, or set model.attention",
    "deepspeed": "choose engine=zero0, zero1, zero2, zero3 or zero3_offload; a DeepSpeed JSON of "
    "your own is merged in by engine.config=/path/ds.json",
    "fsdp": "choose engine=zero3",
    "stage": "choose objective=sft or objective=pretrain; the ZeRO stage is engine=zero0 to zero3",
    "rlhf_type": "choose objective=sft or objective=pretrain",
    "packing": _PACKED,
    "sample_packing": _PACKED,
    "pad_to_sequence_len": _PACKED,
    "train_on_inputs": "leave it out: objective=sft supervises what the assistant says, "
    "objective=pretrain every token",
    "assistant_only_loss": "leave it out: objective=sft always does so",
    "completion_only_loss": "leave it out: objective=sft always does so",
    "eval_strategy": _EVALUATION,
    "evaluation_strategy": _EVALUATION,
    "save_strategy": "set train.save_every, a number of steps; null is at the end only",
    "logging_strategy": "set train.log_every, a number of steps",
    "early_stopping_patience": "set diagnose.early_stop=[overfitting] and diagnose.overfit_evals, "
    "how many evaluations in a row may be above the best one; train.eval_every says how often",
    "early_stopping": "set diagnose.early_stop=[overfitting]; it is looked at when an evaluation "
    "is, every train.eval_every steps",
    "load_best_model_at_end": "leave it out: the checkpoint of the best evaluation is kept beside "
    "the newest; `posttrain export RUN OUT --step STEP` writes it",
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "hub_model_id": f"leave it out: {_NO_HUB}",
    "push_to_hub": f"leave it out: {_NO_HUB}",
    "hub_token": f"leave it out: {_NO_HUB}",
    "hub_strategy": f"leave it out: {_NO_HUB}",
    "dataloader_num_workers": "leave it out: batches are made ahead of the step in a thread; "
    "data.workers is how many processes tokenise",
    "remove_unused_columns": "leave it out: keys of a row that no format knows are never used",
    "group_by_length": _PACKED,
    "explode_turns": "write template.form=turns (one sample for each turn); left out, a turn is a "
    "sample where the whole conversation is not proven right",
    "chat_template": "choose template=chatml, llama3, qwen or another of those that `posttrain "
    "train --help` lists, or template.name=<a .jinja file>; left out, it is the tokenizer's own",
    "trust_remote_code": "leave it out: code that comes with a model is never run",
    "report_to": "set logging.wandb=auto, offline, online or off",
    "do_train": "leave it out: the verb says what is done (posttrain train, posttrain evaluate)",
    "do_eval": "leave it out: the verb says what is done (posttrain train, posttrain evaluate)",
    "per_device_eval_batch_size": "leave it out: evaluation uses train.micro_batch_size",
    "overwrite_output_dir": "leave it out: every run has a folder of its own",
    "use_liger_kernel": "leave it out: the loss is always fused",
}


# Thresholds of the diagnosis that were keys of an earlier version.
_THRESHOLDS = {
    "quiet_rows",
    "medium_low",
    "medium_high",
    "large_low",
    "large_high",
    "random_band",
    "rise",
    "rise_sigmas",
    "overfit_rise",
    "overfit_least",
    "overfit_sigmas",
    "dominating_share",
    "asked_ratio",
    "spike_rise",
    "spike_sigmas",
    "stall_rows",
    "stall_fall",
    "stall_eval_fall",
    "special_rows",
    "special_loss",
    "special_fall",
}


# Names of templates elsewhere -> ours, where an option of ours is the same format.
TEMPLATES: dict[str, str] = {
    "qwen1_5": "chatml",
    "qwen2": "chatml",
    "qwen2_5": "chatml",
    "qwen3": "qwen",
    "qwen_3": "qwen",
    "qwen3_5": "qwen3.5",
    "qwen_3_5": "qwen3.5",
    "qwen3_6": "qwen3.5",
    "llama3_1": "llama3",
    "llama3_2": "llama3",
    "llama3_3": "llama3",
    "llama_3": "llama3",
    "llama_3_1": "llama3",
    "llama_3_2": "llama3",
    "llama_3_3": "llama3",
    "llama_2": "llama2",
    "llama4": "tokenizer",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma_2": "gemma",
    "gemma_3": "gemma",
    "gemma_4": "gemma4",
    "mistral_v1": "mistral",
    "phi3": "phi",
    "phi_3": "phi",
    "phi_4": "phi4",
    "phi4_mini": "tokenizer",
    "deepseek_v2": "tokenizer",
    "deepseek3": "deepseek",
    "deepseek_v3": "deepseek",
    "deepseek_r1": "r1",
    "deepseekr1": "r1",
    "glm4_moe": "glm",
    "glm4_5": "glm",
    "glm_4_5": "glm",
    "glm4_6": "glm",
    "glm_4_6": "glm",
    "glm4": "tokenizer",
    "glm4_7": "tokenizer",
    "cohere2": "cohere",
    "command_a": "cohere",
    "command_r": "cohere",
    "command_r7b": "cohere",
    "granite4": "granite",
    "granite_4": "granite",
    "granite3": "tokenizer",
    "gpt_oss": "gpt-oss",
    "gptoss": "gpt-oss",
    "harmony": "gpt-oss",
    "im_start": "chatml",
    "default": "tokenizer",
    "auto": "tokenizer",
    "tokenizer_default": "tokenizer",
}


def foreign(key: str, value: str | None = None) -> str | None:
    """What to do about a key in the spelling of another program; None if we do not know it.

    Args:
        key: as it was typed, without dashes before it.
        value: that was typed with it; the advice then has it too.
    """
    typed = "" if value is None else f"={value}"
    if key in RENAMED:
        return f"write {RENAMED[key]}{typed} (it was renamed)"
    leaf = key.rsplit(".", 1)[-1].lower().replace("-", "_")
    if leaf in ("chat_template", "template") and value is not None:
        if value.endswith(".jinja"):
            return f"write template.name={value}"
        if re.fullmatch(r"[\w.-]+", value):
            return f"choose template={foreign_template(value) or value}"
    if leaf in KEYS and KEYS[leaf] != key:
        return f"write {KEYS[leaf]}{typed} (that is the name here)"
    if key.startswith("diagnose.") and leaf in _THRESHOLDS:
        return "leave it out: it is a constant of its rule now; diagnose.off leaves a rule out"
    return EXPLAINED.get(leaf) or tuning_advice(leaf, value)


def foreign_template(name: str) -> str | None:
    """Our option for the name that another program gives to a chat template."""
    spelled = name.lower().replace("-", "_").replace(".", "_").replace(" ", "_")
    return TEMPLATES.get(spelled)
