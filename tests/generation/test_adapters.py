"""Several adapters on one loaded base: each answers as in plain `peft`, and the base stays itself.

The adapters are made by plain `peft`.
"""

from __future__ import annotations

import json
import runpy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from posttrain_dist.data.chat.rendering.served import Prompt
from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.generation.adapter_places import find_adapters
from posttrain_dist.generation.base import Sampling
from posttrain_dist.generation.local import LocalGenerator

byte_llama = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("byte_llama.py"))))
CONVERSATIONS = byte_llama.CONVERSATIONS
PROMPTS = [Prompt(messages) for messages in CONVERSATIONS]
NEW = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_llama.save(tmp_path_factory.mktemp("base"))


def write_adapter(base: Path, folder: Path, config: Any, seed: int) -> Path:
    """A random adapter of `peft`, saved by `peft`."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

    root, task = tmp_path_factory.mktemp("adapters"), {"task_type": "CAUSAL_LM"}
    configs = {
        "a": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **task),
        "b": LoraConfig(r=2, lora_alpha=8, use_dora=True, target_modules=["down_proj"], **task),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, **task),
        "prefix": PrefixTuningConfig(num_virtual_tokens=2, **task),
    }
    return {
        name: write_adapter(base, root / name, config, seed)
        for seed, (name, config) in enumerate(configs.items())
    }


def by_peft(base: Path, folder: Path | None) -> tuple[list[str], list[float]]:
    """Greedy answers, one row at a time, and the log-probs of a text: by plain `peft`."""
    from peft import PeftModel

    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.generation_config.repetition_penalty = None
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    tokenizer = byte_llama.build_tokenizer()
    texts = []
    with torch.no_grad():
        for messages in CONVERSATIONS:
            ids = torch.tensor([byte_llama.prompt_ids(tokenizer, messages)])
            new = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW,
                eos_token_id=sorted(byte_llama.ENDS),
                pad_token_id=0,
            )[0, ids.shape[1] :]
            texts.append(tokenizer.decode(new, skip_special_tokens=True))
        logits = model(input_ids=torch.tensor([TEXT]), use_cache=False).logits[0, -len(TEXT) :]
    log_probs = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(TEXT[1:])[:, None])[:, 0]
    return texts, log_probs.tolist()


TEXT = [7, 20, 100, 33, 8, 61]


def test_every_adapter_answers_as_in_plain_peft_and_the_base_as_before(
    base: Path, adapters: dict[str, Path]
) -> None:
    sampling = Sampling(max_new_tokens=NEW)
    generator = LocalGenerator.load(base, adapters=adapters)
    assert sorted(generator.adapters) == sorted(adapters)
    alone = LocalGenerator.load(base)
    before = alone.reply(PROMPTS, sampling), alone.score([TEXT]), alone.generate([TEXT], sampling)
    answers = {}
    for name in [*adapters, "none", *reversed(adapters)]:
        texts, log_probs = by_peft(base, adapters.get(name))
        asked = Sampling(max_new_tokens=NEW, adapter=name)
        replies = generator.reply(PROMPTS, asked)
        assert [reply.text for reply in replies] == texts, name
        # The streamed one follows the same adapter.
        stream = generator.stream(PROMPTS[1], asked)
        assert "".join(stream) == replies[1].text, name
        generator.adapter = name
        assert generator.score([TEXT, TEXT[:3]])[0] == pytest.approx(log_probs, abs=2e-5), name
        # With a cache of keys and values it is the distribution of one forward.
        (new,) = generator.generate([TEXT], asked)
        assert generator.score([TEXT + new.token_ids])[0][-len(new.token_ids) :] == pytest.approx(
            new.log_probs, abs=2e-4
        ), name
        answers[name] = tuple(texts)
    assert len(set(answers.values())) == len(answers), "adapters that change nothing prove nothing"
    # Switched back, the base is itself, bit for bit.
    generator.adapter = "none"
    after = (
        generator.reply(PROMPTS, sampling),
        generator.score([TEXT]),
        generator.generate([TEXT], sampling),
    )
    assert after == before


def test_an_adapter_folder_is_answered_by_its_adapter(
    base: Path, adapters: dict[str, Path]
) -> None:
    generator = LocalGenerator.load(adapters["a"], adapters={"other": adapters["b"]})
    assert generator.adapter == "adapter" and generator.adapters == ["adapter", "other"]
    asked = {
        name: [r.text for r in generator.reply(PROMPTS, Sampling(max_new_tokens=NEW, adapter=name))]
        for name in (None, "adapter", "other", "none")
    }
    assert asked[None] == asked["adapter"] == by_peft(base, adapters["a"])[0]
    assert asked["other"] == by_peft(base, adapters["b"])[0]
    assert asked["none"] == by_peft(base, None)[0]
    with pytest.raises(ModelError, match="there are adapters on the model"):
        generator.update([], 1)


def test_the_tokenizer_of_an_adapter_speaks_for_it(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    own = copied(adapters["a"], tmp_path / "own")
    tokenizer = byte_llama.build_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}<|assistant|>"
    tokenizer.eos_token = "<|system|>"
    tokenizer.save_pretrained(own)
    generator = LocalGenerator.load(base, adapters={"own": own, "a": adapters["a"]})
    sampling = Sampling(max_new_tokens=NEW, adapter="own")
    plain = generator.reply([Prompt([{"role": "user", "content": "ab"}])], sampling)
    ids = tokenizer("ab<|assistant|>", add_special_tokens=False)["input_ids"]
    (completion,) = generator.generate([ids], sampling)
    assert plain[0].text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    # Where all but one token are ruled out, only the adapter whose end token it is stops there.
    end = byte_llama.SPECIAL.index("<|system|>")
    generator.model.lm_head.bias = torch.nn.Parameter(torch.zeros(generator.model.vocab_size))
    with torch.no_grad():
        generator.model.lm_head.bias[end] = 1000.0
    new = [generator.generate([ids], replace(sampling, adapter=name))[0] for name in ("own", "a")]
    assert [len(completion.token_ids) for completion in new] == [1, NEW]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no other format"),
        (lambda folder: edit(folder, target_modules=["nothing"]), "is it an adapter of this base"),
        (lambda folder: edit(folder, r=8), "8 faults, first of them: size mismatch[^\n]*\n  fix"),
        (lambda folder: edit(folder, peft_type=None), "a method that peft does not know"),
        (lambda folder: edit(folder, peft_type="SORCERY"), "cannot be loaded onto"),
        (lambda folder: edit(folder, megatron_config={"a": 1}), "names a Python module"),
        (lambda folder: rewrite(folder, lambda t: t * float("nan")), "holds NaN or infinity"),
        (lambda folder: drop_one(folder), "missing adapter keys"),
        # peft takes what fits of these, and says nothing.
        (lambda folder: edit(folder, target_modules=["q_proj"]), "4 tensors of the file have no"),
        (lambda folder: add_one(folder), "1 tensors of the file have no place.*first of them .*x_"),
    ],
)
def test_a_folder_that_is_no_adapter_of_the_base_is_refused(
    base: Path, adapters: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    folder = copied(adapters["a"], tmp_path / "a")
    spoil(folder)
    with pytest.raises(ModelError, match=says):
        LocalGenerator.load(base, adapters={"a": folder})


def test_what_cannot_stand_together_is_refused(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    from peft import IA3Config

    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ia3 = IA3Config(task_type="CAUSAL_LM", **targets)
    write_adapter(base, tmp_path / "ia3", ia3, 5)
    generator = LocalGenerator.load(base, adapters={"a": adapters["a"]})
    with pytest.raises(ModelError, match="IA3 and one of LORA cannot share"):
        generator.add_adapter("ia3", tmp_path / "ia3")
    pissa = copied(adapters["a"], tmp_path / "pissa")
    edit(pissa, init_lora_weights="pissa")
    with pytest.raises(ModelError, match="begins with the base model's own weights"):
        generator.add_adapter("pissa", pissa)
    for name in ("a", "none", "a b"):
        with pytest.raises(ConfigError, match="no free name"):
            generator.add_adapter(name, adapters["b"])
    with pytest.raises(ConfigError, match="use one of: a, none"):
        generator.reply(PROMPTS, Sampling(adapter="zzz"))
    # Alone, a PiSSA adapter answers; the base that it has changed does not.
    alone = LocalGenerator.load(base, adapters={"pissa": pissa})
    alone.reply(PROMPTS[:1], Sampling(max_new_tokens=1, adapter="pissa"))
    with pytest.raises(ModelError, match="has changed the base model's weights"):
        alone.reply(PROMPTS[:1], Sampling(max_new_tokens=1, adapter="none"))


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_virtual_tokens_answer_without_a_warning(
    base: Path, adapters: dict[str, Path], name: str
) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        generator = LocalGenerator.load(adapters[name])
        generator.reply(PROMPTS[:1], Sampling(max_new_tokens=2))
    assert [str(each.message) for each in seen if "osition ids" in str(each.message)] == []


@pytest.mark.parametrize("order", ["ab_new", "new_ab", "a_new_b"])
def test_an_adapter_of_new_tokens_stands_beside_others_in_any_order(
    base: Path, adapters: dict[str, Path], tmp_path: Path, order: str
) -> None:
    from peft import LoraConfig, get_peft_model

    rows = {"embed_tokens": [261, 262], "lm_head": [261, 262]}
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows)
    torch.manual_seed(9)
    model = get_peft_model(grown_llama(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(tmp_path / "new", save_embedding_layers=False)
    folders = {"a": adapters["a"], "b": adapters["b"], "new": tmp_path / "new"}
    names = {"ab_new": ["a", "b", "new"], "new_ab": ["new", "a", "b"], "a_new_b": ["a", "new", "b"]}
    generator = LocalGenerator.load(base, adapters={n: folders[n] for n in names[order]})
    text = [*TEXT, 262, 3, 261]
    for name in ("new", "a", "none", "b", "new"):
        generator.adapter = name
        new = name == "new"
        expected = score_by_peft(grown_llama(base), folders.get(name), text if new else TEXT)
        # Of the others, the new tokens are two more to choose from.
        assert generator.score([text if new else TEXT])[0] == pytest.approx(expected, abs=2e-5)


def grown_llama(base: Path) -> Any:
    """As `posttrain` grows it: new tokens have the mean of all rows."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    size = model.vocab_size
    model.resize_token_embeddings(size + 2, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[size:] = table.weight[:size].mean(0)
    return model


def score_by_peft(model: Any, folder: Path | None, text: list[int]) -> list[float]:
    from peft import PeftModel

    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(text[1:])[:, None])[:, 0].tolist()


def test_tokens_whose_rows_are_saved_in_full_are_there(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The usual recipe for new tokens: both tables are trained whole, and have more rows."""
    from peft import LoraConfig, get_peft_model

    tables = ["embed_tokens", "lm_head"]
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=tables)
    torch.manual_seed(9)
    model = get_peft_model(grown_llama(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(tmp_path / "new")
    text = [*TEXT, 262, 3, 261]  # two of them are new
    expected = score_by_peft(grown_llama(base), tmp_path / "new", text)
    generator = LocalGenerator.load(base, adapters={"new": tmp_path / "new", "a": adapters["a"]})
    generator.adapter = "new"
    assert generator.score([text])[0] == pytest.approx(expected, abs=2e-5)
    # One for fewer tokens cannot stand beside it, nor one for more behind it.
    write_adapter(base, tmp_path / "old", config, 4)
    with pytest.raises(ModelError, match="of 261 tokens, and an adapter before added some"):
        generator.add_adapter("old", tmp_path / "old")
    behind = LocalGenerator.load(base, adapters={"old": tmp_path / "old"})
    with pytest.raises(ModelError, match="an adapter before stands in the embeddings"):
        behind.add_adapter("new", tmp_path / "new")


def test_a_base_whose_weights_an_adapter_brings_is_not_taken_for_itself(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """peft writes such tensors into the base: who asks for it gets the adapter's, unasked."""
    folder = copied(adapters["a"], tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.weight": torch.randn(261, 32)}
    save_file({**load_file(path), **head}, path)
    generator = LocalGenerator.load(base, adapters={"a": folder})
    with pytest.raises(ModelError, match="has changed the base model's weights"):
        generator.reply(PROMPTS[:1], Sampling(max_new_tokens=1, adapter="none"))
    with pytest.raises(ModelError, match="or holds some in place of them"):
        generator.add_adapter("b", adapters["b"])
    other = LocalGenerator.load(base, adapters={"b": adapters["b"]})
    with pytest.raises(ModelError, match="or holds some in place of them"):
        other.add_adapter("a", folder)


def test_a_moved_base_is_named_with_what_to_do(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(adapters["a"], tmp_path / "a")
    edit(folder, base_model_name_or_path="/models/gone")
    with pytest.raises(ModelError, match="base model is not there: /models/gone") as caught:
        LocalGenerator.load(folder)
    assert f"set base_model_name_or_path in {folder / 'adapter_config.json'}" in str(caught.value)


def test_a_run_and_an_ensemble_are_found(adapters: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in range(2):
        copied(adapters["prompt"], run / "adapter" / f"prompt-{number}")
    found = find_adapters("p", run)
    assert found == {f"p-{n}": run / "adapter" / f"prompt-{n}" for n in range(2)}
    generator = LocalGenerator.load(run / "adapter")
    assert generator.adapters == ["adapter-0", "adapter-1"] and generator.adapter == "adapter-0"
    copied(adapters["a"], tmp_path / "other" / "adapter")
    assert find_adapters("x", tmp_path / "other") == {"x": tmp_path / "other" / "adapter"}
    with pytest.raises(ModelError, match="holds no adapter"):
        find_adapters("x", tmp_path)


# ------------------------------------------------------------------------ making bad folders


def copied(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


def add_one(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "v_proj.lora_A" in name)
    save_file({**tensors, name.replace("v_proj", "x_proj"): tensors[name] + 1}, path)


def drop_one(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
