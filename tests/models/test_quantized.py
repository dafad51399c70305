"""A base in NF4: the weights that it stands for, what must be put right, what is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_configs import small_config

from posttrain_dist.build import build_policy
from posttrain_dist.config import Full, Lora, ModelConfig, Quantize, RunConfig, complete, problems
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.errors import ModelError
from posttrain_dist.models import Weights, quantized
from posttrain_dist.models.architectures.known import TRAINED
from posttrain_dist.models.finite import refuse_nonfinite
from posttrain_dist.models.folder import check_folder
from posttrain_dist.models.layers import decoder_layers
from posttrain_dist.models.load import load_model
from posttrain_dist.models.network.build_network import build_network
from posttrain_dist.models.quantized import load_nf4
from posttrain_dist.preflight import input_problems

UP = "model.layers.1.mlp.up_proj.weight"
# The 16 values of NF4, of the appendix of arXiv:2305.14314, to four places.
BELOW = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
ABOVE = (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
NF4 = torch.tensor([*BELOW, 0.0, *ABOVE])


def load(folder, dtype=torch.float32, **options):
    config = ModelConfig(path=str(folder))
    return load_model(config, folder, dtype=dtype, seed=0, materialise=nullcontext(), **options)


def four_bit(model):
    import bitsandbytes

    linear = bitsandbytes.nn.Linear4bit
    return {n: m for n, m in model.named_modules() if isinstance(m, linear)}


def dequantised(linear):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def run_on(model, ids):
    """Logits of one sample, by the attention of packed rows."""
    bounds = [0, len(ids)]
    return model(
        input_ids=ids[None],
        position_ids=torch.arange(len(ids))[None],
        cu_seqlens=bounds,
        bounds_S=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=len(ids),
        parent_S=[-1],
        use_cache=False,
    ).logits[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_layers_are_the_nearest_of_nf4_and_no_others_change(nf4_llama, dtype):
    saved = load_file(nf4_llama / "model.safetensors")
    model = load(nf4_llama, dtype, nf4=True)
    linears = four_bit(model)
    assert len(linears) == 2 * 7
    for name, linear in linears.items():
        # Blocks of 64 weights, each divided by its largest; the scales are rounded to 8 bits.
        blocks = saved.pop(f"{name}.weight").to(dtype).float().reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = NF4[((blocks / scale)[..., None] - NF4).abs().argmin(-1)] * scale
        own = dequantised(linear).float().reshape(-1, 64)
        assert float((own - nearest).norm() / nearest.norm()) < 0.01, name
        assert float((own - blocks).norm() / blocks.norm()) < 0.11  # 0.09 of a normal
        assert linear.weight.dtype == dtype == linear.compute_dtype
        assert linear.weight.nbytes == blocks.numel() // 2
    for name, tensor in saved.items():
        assert torch.equal(model.get_parameter(name), tensor.to(dtype)), name


def test_the_model_is_the_one_of_the_dequantised_weights(nf4_llama):
    model = load(nf4_llama, nf4=True).eval()
    own = transformers.AutoModelForCausalLM.from_pretrained(nf4_llama).eval()
    ids = torch.arange(5, 45)
    with torch.no_grad():
        unquantised = own(ids[None]).logits[0]
        for name, linear in four_bit(model).items():
            own.get_submodule(name).weight.copy_(dequantised(linear))
        found, expected = run_on(model, ids), own(ids[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((unquantised - expected).abs().max()) > 0.1


def test_gpt2_is_quantised_along_the_right_side(tmp_path):
    """Its matrices lie the other way round in the files."""
    config = small_config("gpt2", {"n_embd": 64, "n_inner": 128, "n_head": 4, "n_layer": 1})
    own = transformers.AutoModelForCausalLM.from_config(config)
    own.save_pretrained(tmp_path)
    for name, linear in four_bit(load(tmp_path, nf4=True)).items():
        weight = own.get_submodule(name).weight.detach().T
        error = float((dequantised(linear) - weight).norm() / weight.norm())
        assert error < 0.11, (name, error)


def test_evaluating_in_between_does_not_change_what_is_trained(nf4_llama):
    """On a CPU with AVX512_BF16 bitsandbytes would repack the weights in evaluation."""
    from bitsandbytes.functional import has_avx512bf16

    model = load(nf4_llama, torch.bfloat16, nf4=True)
    linears = four_bit(model)
    assert [m.support_avx512bf16_for_cpu for m in linears.values()] == [False] * len(linears)
    ids = torch.arange(5, 45)

    def step(train):
        """The loss, and in training the gradient behind all layers."""
        model.train(train)
        with torch.set_grad_enabled(train):
            logits = run_on(model, ids)[:-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[1:])
        model.zero_grad()
        if train:
            loss.backward()
        return loss.detach(), model.model.embed_tokens.weight.grad

    loss, gradient = step(True)
    assert step(False)[0] == loss
    again, gradient_again = step(True)
    assert again == loss and torch.equal(gradient_again, gradient)
    if has_avx512bf16():  # what the flag is for: its packed product has no gradient
        for linear in linears.values():
            linear.support_avx512bf16_for_cpu = True
        step(False)
        changed = step(True)[1]
        assert float((changed - gradient).norm() / gradient.norm()) > 0.1


def test_what_says_that_a_kernel_is_missing_is_silent():
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


# ------------------------------------------------------------------------- folders in NF4


@pytest.fixture(scope="module")
def stored(nf4_llama, tmp_path_factory):
    """The same model, quantised by another program: storage in bytes, computed in float16."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    folder = shutil.copytree(nf4_llama, tmp_path_factory.mktemp("stored") / "model")
    (folder / "model.safetensors").unlink()
    transformers.AutoModelForCausalLM.from_pretrained(
        nf4_llama, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("asked", [False, True])
def test_a_folder_in_nf4_is_loaded_as_it_is(stored, nf4_llama, asked):
    model, own = load(stored, nf4=asked), load(nf4_llama, nf4=True)
    ids = torch.arange(5, 45)
    assert torch.equal(run_on(model, ids), run_on(own, ids))
    for linear in four_bit(model).values():
        assert linear.weight.dtype == torch.float32 == linear.compute_dtype
        assert not linear.support_avx512bf16_for_cpu
    assert not hasattr(model.model.layers[0], "_hf_hook")


def test_full_tuning_of_a_folder_in_nf4_is_refused(stored):
    config = complete(RunConfig(model=ModelConfig(path=str(stored))))
    (problem,) = [p for p in input_problems(config, "inspect") if "NF4" in str(p)]
    assert "holds weights in NF4" in str(problem) and "tuning=lora" in str(problem)
    assert problem.where == str(stored / "config.json")
    with pytest.raises(ModelError, match="cannot be trained themselves"):
        build_policy(config, SingleEngine(AdamW(), torch.device("cpu")), torch.float32, ["all"])
    lora = replace(config, tuning=Lora())
    assert not [p for p in input_problems(lora, "inspect") if "NF4" in str(p)]
    random = replace(lora, model=ModelConfig(path=str(stored), weights=Weights.random))
    (problem,) = [p for p in input_problems(random, "inspect") if "NF4" in str(p)]
    assert "model.weights is random" in str(problem)
    with pytest.raises(ModelError, match=r"layers.0.self_attn.q_proj.weight is stored in NF4"):
        load(stored, attach=lambda model: Full().attach(model))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"quant_method": "gptq", "bits": 4}, "weights, by gptq"),
        ({"quant_method": "awq", "bits": 4}, "weights, by awq"),
        ({"quant_method": "fp8"}, "weights, by fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "in fp4"),
        ({"bits": 4}, "a method that it does not name"),
        (["nf4"], "is not a JSON object"),
    ],
)
def test_other_quantised_weights_are_refused(stored, tmp_path, settings, part):
    folder = shutil.copytree(stored, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ModelError, match=part) as caught:
        check_folder(folder)
    assert caught.value.where == str(folder / "config.json")


def test_random_weights_are_not_quantised():
    config = RunConfig(tuning=Lora(quantize=Quantize.nf4))
    config.model.weights = Weights.random
    (problem,) = [p for p in problems(config) if p.where == "tuning.quantize"]
    assert "model.weights is random" in str(problem)
    config.model.weights = Weights.load
    assert not [p for p in problems(config) if p.where == "tuning.quantize"]


def test_layers_that_would_stay_as_they_are_are_refused():
    config = small_config("falcon", {"hidden_size": 64, "num_attention_heads": 4})
    with pytest.raises(ModelError, match=r"computes by FalconLinear, .*: [\d,]+ of [\d,]+ weights"):
        load_nf4.refuse_unquantisable(config, Path("folder"), torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(TRAINED))
def test_every_architecture_that_is_trained_can_be_quantised(model_type):
    config = small_config(model_type)
    taken = load_nf4.refuse_unquantisable(config, Path("folder"), torch.device("cuda"))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    matrices = [p for layer in decoder_layers(model) for p in layer.parameters() if p.ndim >= 2]
    assert 0.95 * sum(p.numel() for p in matrices) <= taken <= sum(p.numel() for p in matrices)


def test_rows_that_a_cpu_reads_wrongly_are_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr("posttrain_dist.models.load._read_weights", None)
    with pytest.raises(ModelError, match="rows have 32, 48 weights") as caught:
        load(tiny_llama, nf4=True)
    assert "multiple of 64" in str(caught.value) and "GPU" in str(caught.value)
    config = transformers.AutoConfig.from_pretrained(tiny_llama)
    load_nf4.refuse_unquantisable(config, tiny_llama, torch.device("cuda"))


# ------------------------------------------------------------------------------ not finite


def test_a_weight_that_is_no_number_is_named_though_it_is_quantised(nf4_llama, tmp_path):
    folder = shutil.copytree(nf4_llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[UP].view(-1)[7] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 of its 21 tensors hold NaN or infinity: {UP}"):
        load(folder, nf4=True)


def test_packed_bytes_are_no_numbers_and_scales_are(nf4_llama):
    model = load(nf4_llama, torch.bfloat16, nf4=True)
    weight = model.get_parameter(UP)
    assert not weight.isfinite().all()  # some pairs of bytes are NaN as bfloat16
    refuse_nonfinite(model, nf4_llama)
    weight.quant_state.state2.absmax[0] = float("inf")
    with pytest.raises(ModelError, match=f"1 of its 21 tensors hold NaN or infinity: {UP}"):
        refuse_nonfinite(model, nf4_llama)


# ---------------------------------------------------------------------------------- memory


def test_bytes_are_foretold_and_what_does_not_fit_is_refused(builders, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    folder = builders.model(tmp_path / "model", **sizes)
    network = build_network(json.loads((folder / "config.json").read_text()))
    held = 0
    for parameter in load(folder, torch.bfloat16, nf4=True).parameters():
        state = getattr(parameter, "quant_state", None)
        held += parameter.nbytes
        if state is not None:
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            held += sum(part.nbytes for part in parts)
    assert quantized.nf4_bytes(network, 2) == held
    big = build_network(
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
            "vocab_size": 128256,
        }
    )
    room = {"bytes_per_value": 2, "world": 4}
    quantized.check_fits(big, folder, free_bytes=80 * 10**9, **room)
    with pytest.raises(ModelError) as caught:
        quantized.check_fits(big, folder, free_bytes=24 * 10**9, **room)
    assert "39.5 GB in NF4 on every rank" in str(caught.value)
    assert "23.5 GB on each of 6 ranks" in str(caught.value)  # 141.1 GB in 16 bits


@pytest.mark.slow
def test_the_host_never_holds_the_model(tmp_path, builders, run_workers):
    """Many shards: what is private to the process is NF4, and one matrix on its way."""
    size = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 72, "head_dim": 128}
    config = transformers.LlamaConfig(**builders.size | size, vocab_size=300)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="15MB")
    whole = sum(p.nbytes for p in model.parameters())
    assert whole > 400e6 and len(list(tmp_path.glob("*.safetensors"))) > 25
    del model
    stored = tmp_path / "stored"
    for folder, save_to in ((tmp_path, stored), (stored, "")):
        (output,) = run_workers("load_nf4.py", 1, folder, save_to, fresh=True)
        seen = json.loads(re.search(r"MEMORY (.*)", output).group(1))
        print(f"host memory of loading {folder.name}, {whole / 1e6:.0f} MB in bfloat16: {seen}")
        assert seen["held"] < 0.27 * whole
        assert seen["peak"] < seen["held"] + 0.15 * whole, (seen, whole)
