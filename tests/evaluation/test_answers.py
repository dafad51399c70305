"""Generation in batches and streams, exact match, and answers.json, on a tiny random Llama."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import DataError, ModelError
from posttrain_dist.evaluation import answers
from posttrain_dist.models import ModelConfig, Weights

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|text_end|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
ASK = [
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "what is the sum of twelve and thirty?"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sort c b a"}],
    [{"role": "user", "content": "reverse: stone"}],
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; texts end with <|text_end|>, turns with <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|text_end|>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose answers depend strongly on the prompt."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    # What a real folder may bring and a comparison must not use.
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=1.9)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def greedy(folder: Path, messages: list[dict[str, str]], steps: int) -> str:
    """The reference: argmax, one unpadded forward over the whole row per token."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages) + "<|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    ends = {SPECIAL.index("<|text_end|>"), SPECIAL.index("<|end|>")}
    with torch.inference_mode():
        while len(ids) < start + steps:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_batched_answers_equal_the_greedy_answer_of_each_row_alone(folder: Path) -> None:
    expected = [greedy(folder, messages, 12) for messages in ASK]
    assert len(set(expected)) == len(ASK), "the fixture's model must not ignore its prompt"
    for batch_size in (1, 3, 32):
        got = answers.generate(folder, ASK, max_new_tokens=12, batch_size=batch_size)
        assert got == expected


def test_an_answer_stops_at_the_templates_end_of_turn(folder: Path) -> None:
    model, tokenizer = answers.load(folder)
    end, text_end = tokenizer.convert_tokens_to_ids(["<|end|>", "<|text_end|>"])
    assert set(model.generation_config.eos_token_id) == {end, text_end}
    # <|end|> is in no config of this folder. Make it the favourite from the second token on:
    # its logit then beats any other, whatever the prompt.
    prompt = answers._prompt(tokenizer, ASK[0])
    length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def favour_end(_module, _inputs, logits_BTV):
        favoured = logits_BTV.clone()
        seen.append(logits_BTV.shape[1])
        if len(seen) > 1:
            favoured[..., end] = 1e9
        return favoured

    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(favour_end)
    (answer,) = answers._answer(model, tokenizer, [ASK[0]], 50, 1)
    hook.remove()
    assert len(seen) == 2, f"generation went on after the end of turn (prompt of {length})"
    assert answer == greedy(folder, ASK[0], 1)


def test_streamed_pieces_make_the_whole_reply(folder: Path) -> None:
    model, tokenizer = answers.load(folder)
    for messages in ASK:
        pieces = list(answers.stream_reply(model, tokenizer, messages, 12))
        assert "".join(pieces) == greedy(folder, messages, 12)


def test_closing_a_stream_stops_its_generation(folder: Path) -> None:
    model, tokenizer = answers.load(folder)
    forwards = []
    never = list(model.generation_config.eos_token_id)
    model.generation_config.suppress_tokens = never  # an answer that never ends by itself
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    stream = answers.stream_reply(model, tokenizer, ASK[0], 20_000)
    next(stream)
    stream.close()
    hook.remove()
    assert 0 < len(forwards) < 2_000


def test_a_failure_while_streaming_reaches_the_reader(folder: Path) -> None:
    model, tokenizer = answers.load(folder)

    def fail(*_):
        raise RuntimeError("broken forward")

    model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken forward"):
        list(answers.stream_reply(model, tokenizer, ASK[0], 4))


def row(channel: str, prompt: str, answer: str, check: str | None) -> dict:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "task_type": channel, "check": check}


def test_exact_match_counts() -> None:
    rows = [
        row("add", "1+1", "2", "exact"),
        row("add", "1+2", "3", "exact"),
        row("add", "2+2", "4", "exact"),
        row("sort", "b a", "a b", "exact"),
        row("prose", "write", "x", None),
    ]
    rows[0]["messages"] = [*rows[1]["messages"], *rows[0]["messages"]]  # the LAST turn counts
    given = [" 2\n", "3.", "4", "A B", "x"]
    assert answers.exact_match(rows, given) == {
        "add": {"right": 2, "of": 3},
        "sort": {"right": 0, "of": 1},
    }


@pytest.fixture
def run_folder(tmp_path: Path, folder: Path) -> Path:
    """Held-out rows of three channels; the export answers as the base does."""
    rows = [row("add", f"{i}+{i}", str(2 * i), "exact") for i in range(4)]
    rows[1]["messages"][1]["content"] = greedy(folder, rows[1]["messages"][:1], 8)
    rows += [row("doc", f"doc {i}\u2028", f"d{i}", None) for i in range(3)]
    rows += [row("tale", f"tale {i}", f"t{i}", None) for i in range(3)]
    rows.append({"messages": [], "task_type": "text", "check": None})
    (tmp_path / "prepared").mkdir()
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / "prepared" / "heldout_records.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "export").symlink_to(folder)
    return tmp_path


def test_compare_asks_base_and_export(run_folder: Path, folder: Path) -> None:
    config = RunConfig(model=ModelConfig(path=str(folder)))
    config.eval.generate_rows, config.eval.samples, config.eval.max_new_tokens = 3, 3, 8
    found = answers.compare(config, run_folder)
    assert found == json.loads((run_folder / "answers.json").read_text(encoding="utf-8"))
    assert found["exact_match"] == {
        "before": {"add": {"right": 1, "of": 3}},
        "after": {"add": {"right": 1, "of": 3}},
    }
    order = [(s["channel"], s["prompt"], s["reference"]) for s in found["samples"]]
    assert order == [
        ("doc", "doc 0\u2028", "d0"),
        ("tale", "tale 0", "t0"),
        ("doc", "doc 1\u2028", "d1"),
    ]
    for sample in found["samples"]:
        said = greedy(folder, [{"role": "user", "content": sample["prompt"]}], 8)
        assert sample["before"] == sample["after"] == said


def test_compare_with_random_weights_has_no_before(run_folder: Path) -> None:
    config = RunConfig(model=ModelConfig(path="nowhere", weights=Weights.random))
    config.eval.generate_rows, config.eval.samples, config.eval.max_new_tokens = 2, 1, 2
    found = answers.compare(config, run_folder)
    assert found["exact_match"] == {"before": {}, "after": {"add": {"right": 0, "of": 2}}}
    assert [s["before"] for s in found["samples"]] == [""]


def test_missing_parts_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"heldout_records\.jsonl.*held-out"):
        answers.compare(RunConfig(), tmp_path)
    with pytest.raises(ModelError, match=r"nothing.*config\.json"):
        answers.load(tmp_path / "nothing")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).symlink_to(folder / name)
    with pytest.raises(ModelError, match=r"bare.*chat template"):
        answers.load(bare)
