"""Tokens that a run adds: in the tokenizer, the prepared data, the embeddings, and the export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from posttrain_kernels import linear_cross_entropy, linear_logprob
from small_configs import small_config

from posttrain_dist.config import (
    DataConfig,
    Dtype,
    ModelConfig,
    RunConfig,
    TrainConfig,
    complete,
    problems,
)
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.errors import ConfigError
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.models.architectures.known import TRAINED
from posttrain_dist.models.embeddings.added_tokens import (
    add_rows,
    added_token_ids,
    train_added_rows,
)
from posttrain_dist.models.folder import load_tokenizer, read_shape
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.models.tokenizer.new_tokens import write_tokens
from posttrain_dist.prepare import prepare
from posttrain_dist.prepare.fingerprint import fingerprint
from posttrain_dist.train import train
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.prompt_tuning import Prompt

TOKENS = ["<tool>", "</tool>", "brown fox"]


def build(model_type, changes=None, dtype=torch.float32):
    torch.manual_seed(0)
    config = small_config(model_type, changes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def mean_of(matrix, rows) -> torch.Tensor:
    return torch.stack([row.double() for row in matrix[:rows]]).sum(0).div(rows).to(matrix.dtype)


@pytest.mark.parametrize(
    ("model_type", "changes", "dtype"),
    [
        ("llama", {}, torch.float32),  # a head of its own
        ("gemma2", None, torch.bfloat16),  # tied, and scaled behind
        ("phi", None, torch.float32),  # a head with a bias
    ],
)
def test_new_rows_are_the_mean_of_the_old_ones_which_stay(model_type, changes, dtype):
    model = build(model_type, changes, dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    size = model.config.vocab_size
    add_rows(model, [size, size + 1, size + 2])
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    grown = [name for name in before if before[name].shape != after[name].shape]
    assert len(grown) == (1 if tied else 3 if model_type == "phi" else 2)
    for name in before:
        assert torch.equal(after[name][: len(before[name])], before[name])
        assert after[name].dtype == dtype and after[name].requires_grad
    for name in grown:
        expected = mean_of(before[name], size)
        assert all(torch.equal(row, expected) for row in after[name][size:])
        assert len(after[name]) == size + 3
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert added_token_ids(model) == [size, size + 1, size + 2]
    # As transformers grows a model, for every input.
    own = build(model_type, changes, dtype)
    own.resize_token_embeddings(size + 3, mean_resizing=False)
    own.load_state_dict(after, strict=not tied)
    ids = torch.tensor([[5, size, 7, size + 2]])
    assert torch.equal(model(ids).logits, own(ids).logits)
    assert model.config.vocab_size == own.config.vocab_size == size + 3


def test_rows_that_no_token_used_are_taken_first():
    model = build("llama", {"vocab_size": 64})
    before = model.get_input_embeddings().weight.detach().clone()
    add_rows(model, [60, 61])
    after = model.get_input_embeddings().weight
    assert torch.equal(after[:60], before[:60]) and torch.equal(after[62:], before[62:])
    assert torch.equal(after[60], mean_of(before, 60)) and torch.equal(after[61], after[60])
    assert model.config.vocab_size == 64


def test_a_model_with_other_tables_of_tokens_is_refused():
    with pytest.raises(ConfigError, match="tables of tokens of their own"):
        add_rows(build("gemma4_text"), [220])


# ---------------------------------------------------------------------------------- the tokenizer


def test_the_tokenizer_is_that_of_transformers_with_these_tokens(tiny_llama):
    own = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    plain = load_tokenizer(tiny_llama)
    size = len(own)
    tokens = [transformers.AddedToken(t, normalized=False, special=False) for t in TOKENS]
    assert own.add_tokens(tokens) == 3
    grown = load_tokenizer(tiny_llama, None, TOKENS)
    text = "the <tool>brown fox</tool> jumps<tool>"
    ids = own(text, add_special_tokens=False).input_ids
    assert ids == grown.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert [i for i in ids if i >= size] == [size, size + 2, size + 1, size]
    assert grown.decode(ids) == own.decode(ids) == text
    assert grown.all_special_tokens == plain.all_special_tokens
    # Who asks without them gets them not.
    assert load_tokenizer(tiny_llama).backend_tokenizer.token_to_id("<tool>") is None
    # The model has three rows that no token uses.
    more = ["<a>", "<b>"]
    sizes = [read_shape(str(tiny_llama), t).vocab_size for t in ([], TOKENS, TOKENS + more)]
    assert sizes == [size + 3, size + 3, size + 5]


def test_a_token_that_is_there_is_refused_and_named(tiny_llama):
    with pytest.raises(ConfigError, match=r"has '<\|user\|>' \(3\) already") as error:
        load_tokenizer(tiny_llama, None, ["<new>", "<|user|>"])
    assert error.value.where == "model.add_tokens"


@pytest.mark.parametrize("form", ["plain", "decoder", "class", "slow"])
def test_files_of_a_folder_get_them(tiny_llama, tmp_path, form):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = json.loads((folder / "tokenizer.json").read_text())
    if form == "decoder":
        settings["added_tokens_decoder"] = {
            str(each["id"]): {k: v for k, v in each.items() if k != "id"}
            for each in own["added_tokens"]
        }
    if form == "class":
        settings["tokenizer_class"] = "Qwen2Tokenizer"
    if form == "slow":
        settings["tokenizer_class"] = "GPT2Tokenizer"
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(own["model"]["vocab"]))
        merges = [" ".join(m) if isinstance(m, list) else m for m in own["model"]["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    before = transformers.AutoTokenizer.from_pretrained(folder)
    write_tokens(folder, TOKENS)
    after = transformers.AutoTokenizer.from_pretrained(folder)
    new = [after.convert_tokens_to_ids(token) for token in TOKENS]
    assert new == list(range(len(before), len(before) + 3))
    assert after("a<tool>b").input_ids == [
        *before("a").input_ids,
        new[0],
        *before("b").input_ids,
    ]
    assert after.all_special_tokens == before.all_special_tokens
    assert load_tokenizer(folder).convert_tokens_to_ids("brown fox") == new[2]


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture
def config(tiny_llama, tmp_path, builders) -> RunConfig:
    words = ["one", "two three", "four", "five six seven"] * 6
    rows = [builders.chat(f"say {w} {i}", f"<tool>{w}</tool>", "tool") for i, w in enumerate(words)]
    return complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama), add_tokens=[*TOKENS, "<a>", "<b>"]),
            data=DataConfig(train=str(builders.write(tmp_path / "rows.jsonl", rows))),
            optimizer=AdamW(lr=3e-3),
            train=TrainConfig(steps=3, batch_size=2, dtype=Dtype.float32),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


def test_prepared_data_has_them_and_is_not_that_of_other_tokens(config, tmp_path):
    size = len(transformers.AutoTokenizer.from_pretrained(config.model.path))

    def prepared(tokens, name):
        model = replace(config.model, add_tokens=tokens)
        chosen = replace(config, model=model)
        prepare(chosen, tmp_path / name)
        examples = Examples.open(tmp_path / name, "train")
        ids = [i for k in range(len(examples)) for i in examples[k].input_ids_L.tolist()]
        return fingerprint(chosen, only_heldout=False).key, sum(i >= size for i in ids), len(ids)

    key, num_new, num = prepared(TOKENS[:2], "both")
    plain_key, plain_new, plain_num = prepared([], "none")
    other_key, other_new, _ = prepared(["<tool>"], "one")
    assert len({key, plain_key, other_key}) == 3
    assert plain_new == 0 and num_new == 2 * other_new > 0 and num < plain_num


def test_a_run_trains_them_and_exports_a_model_that_has_them(config, tmp_path, tiny_llama):
    prepare(config, tmp_path / "run" / "prepared")
    train(config, tmp_path / "run")
    export = tmp_path / "run" / "export"
    own = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = transformers.AutoModelForCausalLM.from_pretrained(export).requires_grad_(False)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [len(own) + i for i in range(3)]
    assert model.config.vocab_size == len(own) + 5 > 296  # rows of the base
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    for old, new in (
        (base.get_input_embeddings(), model.get_input_embeddings()),
        (base.lm_head, model.lm_head),
    ):
        assert new.weight.shape == (len(own) + 5, 32)
        moved = (new.weight[len(own) :] - mean_of(old.weight.detach(), len(own))).abs().max(1)[0]
        # Three steps of Adam, of at most 3e-3 each; the head moves the row of every token.
        assert float(moved[:2].min()) > 1e-3 and float(moved.max()) < 1e-2
        # Nothing was trained on "brown fox".
        assert (float(moved[2]) < 1e-6) == (new is model.get_input_embeddings())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert {"special_token_loss/tool", "special_token_loss/end_tool"} <= rows[-1].keys()


def test_embeddings_that_would_not_be_trained_are_refused(config, tiny_llama):
    def load(pattern):
        return load_model(
            config.model,
            tiny_llama,
            dtype=torch.float32,
            seed=0,
            materialise=SingleEngine(AdamW(), torch.device("cpu")).materialise(),
            attach=Full(train=pattern).attach,
        )

    assert added_token_ids(load(".*embed_tokens.*")) == [293, 294, 295, 296, 297]
    with pytest.raises(ConfigError, match="adds 5 tokens, and their embeddings would never"):
        load("model.layers.*")
    found = problems(replace(config, tuning=Prompt()))
    assert [each.where for each in found] == ["model.add_tokens"]
    twice = replace(config, model=replace(config.model, add_tokens=["<a>", "<a>"]))
    assert [each.where for each in problems(twice)] == ["model.add_tokens"]


@pytest.mark.slow
def test_two_workers_equal_one(tiny_llama, run_workers):
    """Also bottleneck adapters, and noise on the embeddings: one start of DeepSpeed for all."""
    outputs = run_workers("step_extras.py", 2, tiny_llama, fresh=True)
    told = [
        json.loads(next(line for line in out.splitlines() if line.startswith("TOLD "))[5:])
        for out in outputs
    ]
    for name, case in told[0].items():
        assert case["sharded"]["losses"] == pytest.approx(case["single"]["losses"], rel=1e-6), name
        assert case["sharded"]["norms"] == pytest.approx(case["single"]["norms"], rel=1e-5), name
        assert case["began"] == 0 and case["distance"] <= 1e-5 * case["size"], name
        assert case["moved"] > 1e-2 * case["size"] or "tokens" in name, name
        assert case["moved"] > 100 * case["distance"], name
    # 298 rows of 32 in embeddings and head, instead of 296
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    grown = sum(p.numel() for p in model.parameters()) + 2 * 2 * 32
    assert told[0]["tokens zero3"]["elements"] == grown


SAMPLE = {"gpt2", "biogpt", "phi"}
OWN_TABLES = {"gemma4_text", "gemma4_unified_text"}


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(t, marks=() if t in SAMPLE else pytest.mark.slow)
        for t in sorted(TRAINED - OWN_TABLES)
    ],
)
def test_trained_rows_are_as_if_they_stood_in_the_matrix(model_type):
    ids = torch.tensor([[5, 221, 7, 220, 222, 9]])
    logits = []
    for apart in (False, True):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            small_config(model_type), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        add_rows(model, [220, 221, 222])
        model.requires_grad_(False)
        if apart:
            train_added_rows(model, lambda name: False)
            kernels = HeadKernels(linear_cross_entropy, linear_logprob)
            Policy(model, kernels, 1)  # whose head reads the rows
        matrices = {
            id(m.weight): m for m in (model.get_input_embeddings(), model.get_output_embeddings())
        }
        for module in matrices.values():
            rows = module.token_adapter.trainable_tokens_delta if apart else module.weight[220:]
            rows.detach().copy_(torch.arange(rows.numel()).reshape(rows.shape).sin())
        logits.append(model(ids, use_cache=False).logits.detach())
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-6, atol=1e-6)
    assert logits[0].std() > 1e-3
