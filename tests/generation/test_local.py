"""Generation by plain transformers: batches, streams, log-probs, scores, weight updates."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from posttrain_dist.data.chat.rendering.served import Prompt
from posttrain_dist.errors import ConfigError, DataError, ModelError
from posttrain_dist.generation import local
from posttrain_dist.generation.base import Completion, Sampling, StopReason
from posttrain_dist.generation.local import LocalGenerator
from posttrain_dist.generation.weight_digest import weight_digest

byte_llama = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("byte_llama.py"))))
greedy, CONVERSATIONS, ENDS = byte_llama.greedy, byte_llama.CONVERSATIONS, byte_llama.ENDS
END = byte_llama.SPECIAL.index("<|end|>")
PROMPTS = [Prompt(messages) for messages in CONVERSATIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_llama.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def generator(folder: Path) -> LocalGenerator:
    return LocalGenerator.load(folder, batch_size=3)


def prompts(generator: LocalGenerator) -> list[list[int]]:
    return [byte_llama.prompt_ids(generator.tokenizer, messages) for messages in CONVERSATIONS]


def test_an_answer_ends_where_learned_positions_do(generator: LocalGenerator) -> None:
    config = GPT2Config(
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=1,
        vocab_size=400,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    own = LocalGenerator(GPT2LMHeadModel(config).eval(), generator.tokenizer)
    own.end_ids = []
    (short,) = own.generate([[7] * 10], Sampling(max_new_tokens=6))
    (cut,) = own.generate([[7] * 10], Sampling(max_new_tokens=50))
    assert cut == short and len(cut.token_ids) == 6 and cut.stop_reason is StopReason.length
    with pytest.raises(ModelError, match="has learned 16 positions, and a prompt has 16 tokens"):
        own.generate([[7] * 16], Sampling(max_new_tokens=1))


# ------------------------------------------------------------------------------------ text


def test_batched_replies_equal_the_greedy_answer_of_each_row_alone(folder: Path) -> None:
    expected = [greedy(folder, messages, 12) for messages in CONVERSATIONS]
    assert len(set(expected)) == len(CONVERSATIONS), "the model must not ignore its prompt"
    for batch_size in (1, 3, 32):
        generator = LocalGenerator.load(folder, batch_size=batch_size)
        replies = generator.reply(PROMPTS, Sampling(max_new_tokens=12))
        assert [reply.text for reply in replies] == expected


def test_a_reply_stops_at_the_templates_end_of_turn(
    folder: Path, generator: LocalGenerator
) -> None:
    assert set(generator.end_ids) == ENDS
    forwards: list[int] = []

    # <|end|> is in no config of this folder. Make it the favourite from the second token on:
    # its logit then exceeds any other, whatever the prompt.
    def favour_end(_module, _inputs, logits_BTV):
        favoured = logits_BTV.clone()
        forwards.append(logits_BTV.shape[1])
        if len(forwards) > 1:
            favoured[..., END] = 1e9
        return favoured

    generator.model.lm_head.register_forward_hook(favour_end)
    (reply,) = generator.reply(PROMPTS[:1], Sampling(max_new_tokens=50))
    assert len(forwards) == 2, "generation went on after the end of turn"
    assert reply.text == greedy(folder, CONVERSATIONS[0], 1)
    assert reply.stop_reason is StopReason.end_token


def test_streamed_pieces_make_the_whole_reply(folder: Path, generator: LocalGenerator) -> None:
    for messages in CONVERSATIONS:
        pieces = list(generator.stream(Prompt(messages), Sampling(max_new_tokens=12)))
        assert "".join(pieces) == greedy(folder, messages, 12)


def test_closing_a_stream_stops_its_generation(generator: LocalGenerator) -> None:
    forwards = []
    # A reply that never ends by itself.
    generator.model.generation_config.suppress_tokens = sorted(ENDS)
    generator.model.register_forward_hook(lambda *_: forwards.append(1))
    stream = generator.stream(PROMPTS[0], Sampling(max_new_tokens=20_000))
    next(stream)
    stream.close()
    assert 0 < len(forwards) < 2_000


def test_a_failure_while_streaming_reaches_the_reader(generator: LocalGenerator) -> None:
    def fail(*_):
        raise RuntimeError("broken forward")

    generator.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken forward"):
        list(generator.stream(PROMPTS[0], Sampling(max_new_tokens=4)))


def test_each_row_is_asked_with_its_own_tools_and_variables(
    folder: Path, generator: LocalGenerator
) -> None:
    reads = "{{ mood }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
    generator.tokenizer.chat_template = reads + byte_llama.TEMPLATE
    ask = CONVERSATIONS[0]
    rows = [
        Prompt(ask, variables={"mood": "low"}),
        Prompt(ask, tools=[{"name": "f"}, {"name": "g"}]),
        Prompt(ask, [{"name": "h"}], {"mood": "high"}),
    ]
    texts = [f"{start}<|user|>a<|end|><|assistant|>" for start in ("low", "fg", "highh")]
    expected = [greedy(folder, text, 6) for text in texts]
    replies = generator.reply(rows, Sampling(max_new_tokens=6))
    assert [reply.text for reply in replies] == expected
    assert len(set(expected)) == 3, "the model must not ignore its prompt"
    streamed = ["".join(generator.stream(row, Sampling(max_new_tokens=6))) for row in rows]
    assert streamed == expected


def test_a_conversation_that_the_template_refuses_is_an_error_of_the_user(
    generator: LocalGenerator,
) -> None:
    template = "{{ raise_exception('only two roles') if messages[0].role == 'system' }}"
    generator.tokenizer.chat_template = template + byte_llama.TEMPLATE
    with pytest.raises(DataError, match="refuses this conversation: only two roles"):
        generator.reply(PROMPTS, Sampling(max_new_tokens=1))


def test_a_template_that_refuses_a_plain_answer_names_no_end(folder: Path) -> None:
    tokenizer = byte_llama.build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    generator = LocalGenerator.load(folder, tokenizer=tokenizer, end_token_ids=[9])
    assert generator.end_ids == [byte_llama.SPECIAL.index("<|text_end|>"), 9]
    tokenizer.chat_template = {"tool_use": byte_llama.TEMPLATE}  # none for rows without tools
    assert LocalGenerator.load(folder, tokenizer=tokenizer).end_ids == generator.end_ids[:1]


# ---------------------------------------------------------------------------------- tokens


def forward_log_probs(model: LlamaForCausalLM, ids: list[int]) -> list[float]:
    """The reference: one unpadded forward, log_softmax, the label's entry."""
    with torch.inference_mode():
        table_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(table_TV[i, token]) for i, token in enumerate(ids[1:])]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
def test_log_probs_of_completions_are_those_of_a_forward_pass(
    generator: LocalGenerator, temperature: float
) -> None:
    sampling = Sampling(max_new_tokens=10, temperature=temperature, top_k=40, top_p=0.95, seed=5)
    given = prompts(generator)
    found = generator.generate(given, sampling)
    scores = generator.score([p + c.token_ids for p, c in zip(given, found, strict=True)])
    for prompt, completion, score in zip(given, found, scores, strict=True):
        assert 1 <= len(completion.token_ids) <= 10
        expected = forward_log_probs(generator.model, prompt + completion.token_ids)
        assert score == pytest.approx(expected, abs=1e-4)
        assert completion.log_probs == pytest.approx(expected[len(prompt) - 1 :], abs=1e-4)
        ended = completion.token_ids[-1] in ENDS
        assert (completion.stop_reason is StopReason.end_token) == ended
        assert ended or len(completion.token_ids) == 10
        assert not ENDS & set(completion.token_ids[:-1])


def test_greedy_completions_are_the_tokens_of_the_greedy_replies(
    folder: Path, generator: LocalGenerator
) -> None:
    found = generator.generate(prompts(generator), Sampling(max_new_tokens=12))
    texts = [generator.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in found]
    assert texts == [greedy(folder, messages, 12) for messages in CONVERSATIONS]


def test_samples_follow_the_distribution_and_the_seed(generator: LocalGenerator) -> None:
    prompt = prompts(generator)[0]
    with torch.inference_mode():
        logits_V = generator.model(torch.tensor([prompt])).logits[0, -1]

    def draw(count: int, **settings: float) -> list[Completion]:
        sampling = Sampling(max_new_tokens=1, **settings)
        generator.batch_size = 500
        return generator.generate([prompt] * count, sampling)

    drawn = draw(2000, temperature=1.5, seed=3)
    counts_V = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=261)
    expected_V = (logits_V / 1.5).softmax(-1)
    # 2000 draws: a share of p is known to sqrt(p (1 - p) / 2000), at most 0.011.
    assert (counts_V / 2000 - expected_V).abs().max() < 0.05
    best = logits_V.topk(2).indices.tolist()
    two = {c.token_ids[0] for c in draw(200, temperature=1.5, top_k=2, seed=3)}
    assert two == set(best)
    nucleus = {c.token_ids[0] for c in draw(50, temperature=1.5, top_p=1e-6, seed=3)}
    assert nucleus == {best[0]}
    before = torch.get_rng_state()
    again = draw(2000, temperature=1.5, seed=3)
    assert again == drawn
    assert draw(2000, temperature=1.5, seed=4) != drawn
    assert torch.equal(torch.get_rng_state(), before)  # a seed leaves torch's state alone


@pytest.mark.parametrize("most", [1, 30, 4096])
def test_scores_do_not_depend_on_the_batch(
    generator: LocalGenerator, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "SCORED_TOKENS", most)
    rows = [[7], [7, 9, 200], *prompts(generator)]
    for ids, score in zip(rows, generator.score(rows), strict=True):
        assert score == pytest.approx(forward_log_probs(generator.model, ids), abs=1e-4)
    assert generator.generate([], Sampling()) == generator.score([]) == []


# ---------------------------------------------------------------------------------- updates


def scaled(generator: LocalGenerator, factor: float) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in generator.model.named_parameters():
        yield name, tensor.detach() * factor


def test_an_update_changes_what_is_served_and_its_digest(
    folder: Path, generator: LocalGenerator
) -> None:
    ids = prompts(generator)[1]
    same = generator.update(scaled(generator, 1.0), version=1)
    assert same == weight_digest(LlamaForCausalLM.from_pretrained(folder).named_parameters())
    other = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3, 4] += 0.5
    changed = generator.update(reversed(list(other.named_parameters())), version=7)
    assert changed != same
    assert generator.score([ids])[0] == pytest.approx(forward_log_probs(other, ids), abs=1e-4)
    (completion,) = generator.generate([ids], Sampling(max_new_tokens=1))
    assert completion.version == 7
    assert generator.update(LlamaForCausalLM.from_pretrained(folder).named_parameters(), 8) == same


def test_a_digest_sees_values_names_dtypes_and_shapes() -> None:
    base = torch.arange(6, dtype=torch.float32)
    kinds = {
        "value": [("a", base), ("b", base + 1)],
        "name": [("a", base), ("c", base)],
        "swapped": [("a", base + 1), ("b", base)],
        "dtype": [("a", base), ("b", base.view(torch.int32))],
        "shape": [("a", base), ("b", base.view(2, 3))],
        "scalar": [("a", base), ("b", base[0])],
        "bfloat16": [("a", base), ("b", base.bfloat16())],
        "same": [("a", base), ("b", base)],
    }
    digests = {kind: weight_digest(tensors) for kind, tensors in kinds.items()}
    assert len(set(digests.values())) == len(kinds)
    transposed = base.view(2, 3).T.contiguous().T  # the same values in another memory layout
    assert weight_digest([("b", transposed), ("a", base)]) == digests["shape"]


def test_the_digest_is_of_the_dtype_that_is_served(generator: LocalGenerator) -> None:
    sent = [(name, tensor.detach().clone()) for name, tensor in generator.model.named_parameters()]
    generator.model.bfloat16()
    digest = generator.update(iter(sent), version=1)
    assert digest == weight_digest((name, tensor.bfloat16()) for name, tensor in sent)
    assert digest != weight_digest(sent)


def test_tied_weights_are_updated_by_either_name(tmp_path: Path) -> None:
    tied = LocalGenerator.load(byte_llama.save(tmp_path, tie_word_embeddings=True))
    named = dict(scaled(tied, 1.5))
    assert "lm_head.weight" not in named
    digest = tied.update(named.items(), version=1)
    embedding = named.pop("model.embed_tokens.weight")
    assert tied.update([*named.items(), ("lm_head.weight", embedding)], version=2) == digest
    assert torch.equal(tied.model.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda named: named.pop("model.norm.weight"), r"1 weights are missing.*model\.norm"),
        (lambda named: named.update(extra=torch.zeros(1)), "has no weight extra"),
        (
            lambda named: named.update({"model.norm.weight": torch.zeros(1)}),
            r"model\.norm\.weight has the shape \(1,\), the model's is \(32,\)",
        ),
    ],
)
def test_a_refused_update_serves_nothing_until_a_whole_one(
    generator: LocalGenerator, change, says: str
) -> None:
    ids, good = prompts(generator)[0], dict(scaled(generator, 1.0))
    wrong = dict(good)
    change(wrong)
    with pytest.raises(ModelError, match=says):
        generator.update(wrong.items(), version=2)
    for serve in (
        lambda: generator.generate([ids], Sampling()),
        lambda: generator.score([ids]),
        lambda: list(generator.stream(PROMPTS[0], Sampling())),
    ):
        with pytest.raises(ModelError, match="refused halfway"):
            serve()
    generator.update(good.items(), version=3)
    (completion,) = generator.generate([ids], Sampling(max_new_tokens=1))
    assert completion.version == 3


# ---------------------------------------------------------------------------------- refusals


def test_folders_that_cannot_be_used_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing.*config\.json"):
        LocalGenerator.load(tmp_path / "nothing")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).symlink_to(folder / name)
    with pytest.raises(ModelError, match=r"bare.*chat template"):
        LocalGenerator.load(bare)
    text_end = byte_llama.SPECIAL.index("<|text_end|>")
    assert LocalGenerator.load(bare, needs_template=False).end_ids == [text_end]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
    ],
)
def test_sampling_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^{name}: is .*, must be "):
        Sampling(**wrong)
