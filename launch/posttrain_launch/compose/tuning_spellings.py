"""Names of other programs for what is tuned, in how many bits, and by which optimizer."""

from __future__ import annotations

# Spelling of Hugging Face, PEFT, axolotl, LLaMA-Factory or ms-swift -> option of `tuning`, our key.
TUNING_KEYS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("r", "lora_r", "lora_rank"), ("lora", "tuning.rank")),
    "lora_alpha": ("lora", "tuning.alpha"),
    "lora_dropout": ("lora", "tuning.dropout"),
    **dict.fromkeys(
        ("lora_target", "lora_targets", "lora_target_modules", "target_modules"),
        ("lora", "tuning.targets"),
    ),
    **dict.fromkeys(
        ("use_rslora", "lora_use_rslora", "peft_use_rslora", "rs_lora"), ("lora", "tuning.rslora")
    ),
    **dict.fromkeys(("use_dora", "lora_use_dora", "peft_use_dora"), ("lora", "tuning.dora")),
    **dict.fromkeys(
        ("loraplus_lr_ratio", "lorap_lr_ratio", "lora_plus_lr_ratio"), ("lora", "tuning.lr_ratio_b")
    ),
    **dict.fromkeys(
        ("modules_to_save", "lora_modules_to_save", "additional_target"),
        ("lora", "tuning.modules_to_save"),
    ),
    **dict.fromkeys(
        ("adapter_name_or_path", "lora_model_dir", "adapters", "adapter_path", "adapter_model"),
        ("lora", "tuning.init_from"),
    ),
    **dict.fromkeys(("num_virtual_tokens", "pre_seq_len"), ("prompt", "tuning.tokens")),
    "prompt_tuning_init_text": ("prompt", "tuning.init_text"),
    "encoder_hidden_size": ("p_tuning", "tuning.hidden_size"),
    "encoder_num_layers": ("p_tuning", "tuning.layers"),
    "reduction_factor": ("bottleneck", "tuning.reduction"),
    "non_linearity": ("bottleneck", "tuning.nonlinearity"),
    **dict.fromkeys(
        ("trainable_parameters_regex", "unfrozen_parameters"), ("full", "tuning.train")
    ),
}

# ... of other groups.
OTHER_KEYS: dict[str, str] = {
    "neftune_noise_alpha": "train.neftune_alpha",
    **dict.fromkeys(("new_special_tokens", "add_special_tokens", "new_tokens"), "model.add_tokens"),
}

# Methods by their names elsewhere -> what to choose here.
METHODS: dict[str, str] = {
    "full": "tuning=full",
    "none": "tuning=full",
    "lora": "tuning=lora",
    "qlora": "tuning=qlora",
    "dora": "tuning=dora",
    "rslora": "tuning=lora tuning.rslora=true",
    "pissa": "tuning=lora tuning.init=pissa",
    **dict.fromkeys(
        ("lora_plus", "loraplus", "lora+"), "tuning=lora tuning.lr_ratio_b=<16, for instance>"
    ),
    **dict.fromkeys(("lora_fa", "lorafa"), "tuning=lora tuning.freeze_a=true"),
    "ia3": "tuning=ia3",
    **dict.fromkeys(("prompt", "prompt_tuning", "prompttuning", "soft_prompt"), "tuning=prompt"),
    **dict.fromkeys(("p_tuning", "ptuning", "p_tuning_v1"), "tuning=p_tuning"),
    **dict.fromkeys(
        ("prefix", "prefix_tuning", "prefixtuning", "p_tuning_v2", "ptuning_v2"), "tuning=prefix"
    ),
    **dict.fromkeys(
        ("adapter", "bottleneck", "pfeiffer", "seq_bn", "adapterp"),
        "tuning=bottleneck tuning.placement=pfeiffer",
    ),
    **dict.fromkeys(
        ("houlsby", "double_seq_bn", "adapterh"), "tuning=bottleneck tuning.placement=houlsby"
    ),
    **dict.fromkeys(
        ("parallel", "par_bn", "parallel_adapter"), "tuning=bottleneck tuning.placement=parallel"
    ),
    "freeze": "tuning=full tuning.train=<a regular expression of parameter names>",
}
METHOD_KEYS = frozenset(
    {
        *("finetuning_type", "train_type", "tuner_type", "sft_type", "adapter", "peft_type"),
        *("peft_method", "peft_scheme", "adapter_type", "tuning_method"),
    }
)
_NO_METHOD = "choose tuning=lora, qlora, dora, ia3, prompt, p_tuning, prefix, bottleneck or full"

# Optimizers by their names elsewhere -> options of `optimizer`.
OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(
        ("adamw", "adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"),
        "adamw",
    ),
    **dict.fromkeys(
        ("adamw_bnb_8bit", "adamw_8bit", "adamw8bit", "adam8bit", "adamw_torch_8bit"), "adamw_8bit"
    ),
    **dict.fromkeys(
        ("paged_adamw_8bit", "paged_adamw8bit", "pagedadamw8bit", "paged_adam_8bit"),
        "paged_adamw_8bit",
    ),
    **dict.fromkeys(
        ("paged_adamw", "paged_adamw_32bit", "paged_adamw32bit", "pagedadamw32bit", "pagedadamw"),
        "paged_adamw_32bit",
    ),
}
OPTIMIZER_KEYS = frozenset({"optim", "optimizer_name", "optimizer_type", "optim_type"})
_NO_OPTIMIZER = "choose optimizer=adamw, adamw_8bit, paged_adamw_8bit or paged_adamw_32bit"

_NF4 = "choose tuning=qlora, or set tuning.quantize=nf4 with any other method"
_NO_8BIT = f"8-bit weights are not there; {_NF4} (4 bits)"
_ALWAYS_NF4 = f"leave it out: NF4 with double quantisation and bfloat16 is what is used; {_NF4}"
_PISSA = "choose tuning=lora tuning.init=pissa"
_PATTERN = "choose tuning=full and set tuning.train, a regular expression of parameter names: "
BIT_KEYS = frozenset({"quantization_bit", "quant_bits", "bits", "quant_bit"})

# Spellings without a key of the same meaning -> what to do.
TUNING_EXPLAINED: dict[str, str] = {
    **dict.fromkeys(METHOD_KEYS, _NO_METHOD),
    **dict.fromkeys(OPTIMIZER_KEYS, _NO_OPTIMIZER),
    **dict.fromkeys(BIT_KEYS, _NF4),
    "load_in_4bit": _NF4,
    "load_in_8bit": _NO_8BIT,
    **dict.fromkeys(("use_peft", "use_lora"), "choose tuning=lora, or another method"),
    **dict.fromkeys(
        ("quantization_method", "quant_method", "quantization_type", "bnb_4bit_quant_type"),
        _ALWAYS_NF4,
    ),
    **dict.fromkeys(
        (
            *("bnb_4bit_use_double_quant", "use_double_quant", "use_bnb_nested_quant"),
            *("double_quantization", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
        ),
        _ALWAYS_NF4,
    ),
    "pissa_init": _PISSA,
    **dict.fromkeys(
        ("init_lora_weights", "init_weights", "lora_init", "peft_init_lora_weights"),
        "set tuning.init=zero_b (the default) or pissa",
    ),
    **dict.fromkeys(
        ("pissa_iter", "pissa_niter"),
        "leave it out: tuning.init=pissa takes the exact singular vectors",
    ),
    "pissa_convert": "leave it out: `posttrain export` offers the plain LoRA",
    "lora_target_linear": "leave it out: tuning.targets=all-linear is the default of tuning=lora",
    "lora_fan_in_fan_out": "leave it out: the layers of the model say it",
    **dict.fromkeys(
        ("peft_layers_to_transform", "layers_to_transform"),
        "set tuning.targets to a regular expression of module names: "
        "'model.layers.(30|31)[.].*_proj'",
    ),
    **dict.fromkeys(("lora_bias", "bias"), "leave it out: LoRA trains no bias here"),
    **dict.fromkeys(
        ("freeze_trainable_layers", "num_layer_trainable", "name_module_trainable"),
        f"{_PATTERN}'model.layers.(30|31)[.].*' are the last two of 32 layers",
    ),
    "freeze_trainable_modules": f"{_PATTERN}'.*[.]mlp[.].*' are the MLPs",
    "freeze_extra_modules": f"{_PATTERN}'model.layers.31[.].*|lm_head.*' has the head, too",
    **dict.fromkeys(
        ("freeze_parameters", "freeze_parameters_ratio", "trainable_parameters"),
        f"{_PATTERN}what it does not match is frozen",
    ),
    "loraplus_lr_embedding": "leave it out: tuning.lr_ratio_b is of the B matrices alone",
    "create_new_adapter": "leave it out: tuning.init_from continues the adapter that it names",
    "tuner_backend": "leave it out: adapters are those of PEFT",
    "prompt_tuning_init": "set tuning.init_text=<text> with tuning=prompt; null: random words",
    "prefix_projection": "leave it out: a prefix is trained without a projection",
    "resize_vocab": "leave it out: the embeddings have rows for model.add_tokens",
    "merge_lora": "leave it out: `posttrain export RUN OUT --merge` merges after the run",
    **dict.fromkeys(
        ("use_galore", "use_apollo", "use_badam", "use_muon", "use_adam_mini"),
        f"is not there; for less memory {_NO_OPTIMIZER}, or tuning=lora",
    ),
}
# Keys whose value decides the advice.
VALUED = METHOD_KEYS | OPTIMIZER_KEYS | BIT_KEYS | {"init_lora_weights", "pissa_init"}


def tuning_advice(leaf: str, value: str | None) -> str | None:
    """What to do about the last part of a key; None if it is of something else.

    Args:
        value: that was typed with it; None: it is not known.
    """
    name = None if value in (None, "<value>") else _plain(str(value))
    if leaf in METHOD_KEYS and name in METHODS:
        return f"choose {METHODS[name]}"
    if leaf in OPTIMIZER_KEYS and name in OPTIMIZERS:
        return f"choose optimizer={OPTIMIZERS[name]}"
    if name is not None and leaf in METHOD_KEYS | OPTIMIZER_KEYS:
        return f"{value} is not there; {TUNING_EXPLAINED[leaf]}"
    if leaf in BIT_KEYS and name is not None and name != "4":
        return _NO_8BIT if name == "8" else f"{value} bits are not there; {_NF4}"
    if leaf == "init_lora_weights" and name is not None and name.startswith("pissa"):
        return _PISSA
    if leaf == "pissa_init" and name == "false":
        return "leave it out: tuning.init=zero_b is the default"
    if leaf in TUNING_KEYS:
        option, key = TUNING_KEYS[leaf]
        return f"write tuning={option} {key}={value or '<value>'} (those are the names here)"
    return TUNING_EXPLAINED.get(leaf)


def foreign_option(group: str, name: str) -> str | None:
    """What to write for an option of `tuning` or `optimizer` that another program calls `name`."""
    if group == "tuning":
        return METHODS.get(_plain(name))
    found = OPTIMIZERS.get(_plain(name)) if group == "optimizer" else None
    return None if found is None else f"optimizer={found}"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
