"""An export renders what was trained: template, variables, end tokens and network."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from posttrain_launch.cli import main
from served_exports import config_of, prompt_of, served_of, tokenizer_of, write

from posttrain_dist.checkpoint import store
from posttrain_dist.checkpoint.manifest import MANIFEST, read_manifest
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.errors import CheckpointError
from posttrain_dist.export import export_checkpoint
from posttrain_dist.files import read_object
from posttrain_dist.models.folder import network_of
from posttrain_dist.prepare import prepare
from posttrain_dist.run import run
from posttrain_dist.train import train

CHATML = {
    "<|system|>": "<|im_start|>",
    "<|user|>": "<|im_end|>",
    "<|assistant|>": "<|x|>",
    "<|end|>": "<|endoftext|>",
}
# Another text than the tokenizer's own template, which two variables change.
OTHER = (
    "\n{%- if mood is defined %}<|system|>{{ mood.names | join(',') }} {{ tone }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MOOD = {"mood": {"names": ["é", 'a "quoted" one']}, "tone": True}
SAID = '<|system|>é,a "quoted" one True<|end|>'


@pytest.fixture(scope="module")
def base_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: no chat template, and tokens of ChatML that nothing but a template uses."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for old, new in CHATML.items():
            text = text.replace(old, new)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def rows(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [dict(row) for row in builders.rows(40)]
    made[::3] = [{**row, "check": "exact"} for row in made[::3]]
    system = {"role": "system", "content": "be brief"}
    for row in made[::2]:
        row["messages"].insert(0, system)
    return builders.write(tmp_path_factory.mktemp("rows") / "rows.jsonl", made)


# ------------------------------------------------------------------------- from end to end


@pytest.fixture(scope="module")
def finished(base_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the base model with template=chatml, to its end."""
    config = config_of(base_model, rows, name="chatml")
    config.eval.generate_rows, config.eval.samples, config.eval.max_new_tokens = 1, 2, 4
    folder = tmp_path_factory.mktemp("run") / "run"
    assert run(config, folder, progress=False).completed
    return folder


def greedy(model: Path, tokenizer: Any, text: str, ends: set[int], steps: int = 4) -> str:
    """The reference: the most probable tokens, one forward over the whole row each."""
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.inference_mode():
        while len(ids) < start + steps and not (len(ids) > start and ids[-1] in ends):
            ids.append(int(causal_lm(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_a_base_model_is_trained_asked_and_exported_with_the_chosen_template(
    finished: Path, base_model: Path
) -> None:
    assert (finished / "FINISHED").is_file()
    tokenizer = tokenizer_of(finished / "export")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    said = prompt_of(tokenizer, messages)
    assert said == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "chat_template" not in read_object(finished / "export" / "tokenizer_config.json")
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")]
    generation = read_object(finished / "export" / "generation_config.json")
    assert generation["eos_token_id"] == ends  # that of turns first
    assert read_manifest(store.whole_checkpoints(finished)[-1]).lineage["end_token_ids"] == ends[:1]
    # The base model was asked with the same text, though it has no template of its own.
    found = json.loads((finished / "answers.json").read_text())
    assert found["exact_match"].keys() == {"before", "after"}
    lines = (finished / "prepared" / "heldout_records.jsonl").read_text().splitlines()
    asked = {row["messages"][-1]["content"]: row["messages"] for row in map(json.loads, lines)}
    assert len(found["samples"]) == 2
    for sample in found["samples"]:
        text = "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
            for m in asked[sample["reference"]][:-1]
        )
        for side, model in (("before", base_model), ("after", finished / "export")):
            answer = greedy(model, tokenizer, text + "<|im_start|>assistant\n", set(ends))
            assert sample[side] == answer != ""


def test_chat_talks_to_its_own_run(
    finished: Path, base_model: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("copy abc\n"))
    assert main(["chat", str(finished), "--max-new-tokens", "4"]) == 0
    tokenizer = tokenizer_of(finished / "export")
    ends = set(read_object(finished / "export" / "generation_config.json")["eos_token_id"])
    text = "<|im_start|>user\ncopy abc<|im_end|>\n<|im_start|>assistant\n"
    answer = greedy(finished / "export", tokenizer, text, ends)
    assert capsys.readouterr().out == answer.strip().replace("\n", "\\n") + "\n"
    assert main(["chat", str(base_model)]) == 1
    said = capsys.readouterr().err
    assert "the tokenizer has no chat template" in said and "template=chatml" in said


@pytest.mark.parametrize("given", ["[1]", "{a: 1", "a", "{tools: 1}", "{1: 2}"])
def test_variables_of_a_chat_are_names_and_values(finished: Path, given: str, capsys: Any) -> None:
    assert main(["chat", str(finished), "--variables", given]) == 1
    assert capsys.readouterr().err.startswith("error: --variables: ")


def test_a_wrong_template_is_found_and_nothing_is_left(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = sorted(path.name for path in (folder / "export").iterdir())
    file = folder / "prepared" / "served.json"
    text = file.read_text()
    asks, refuses = "<|im_start|>assistant\\n' }}\n{%- endif", "{{- raise_exception('no') }}"
    for old, new, said in (
        (asks, asks.replace("assistant", "Assistant"), r"on the export gives 'A.*'assistant\\n'"),
        ("{%- for", refuses + "{%- for", "refuses the prompt of training row 1: no"),
    ):
        values = json.loads(text)
        source = values["templates"]["default"]
        assert old in source
        values["templates"]["default"] = source.replace(old, new)
        file.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=said) as caught:
            export_checkpoint(folder)
        assert caught.value.where == str(folder / "export")
        assert not (folder / "export.partial").exists()
    assert sorted(path.name for path in (folder / "export").iterdir()) == before
    file.write_text(text)
    assert export_checkpoint(folder) == folder / "export"


def test_a_changed_network_does_not_go_on_and_the_trained_one_is_exported(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base_model, model)
    config = config_of(model, rows, name="chatml")
    config.train.steps, config.checkpoint.export = 2, False
    prepare(config, tmp_path / "run" / "prepared")
    (tmp_path / "run" / "STOP").touch()
    train(config, tmp_path / "run")
    (tmp_path / "run" / "STOP").unlink()
    trained = json.loads((model / "config.json").read_text())
    theta = trained["rope_parameters"]["rope_theta"]
    other = {**trained, "rope_parameters": {**trained["rope_parameters"], "rope_theta": 5000.0}}
    harmless = {"use_cache": False, "transformers_version": "9"}
    (model / "config.json").write_text(json.dumps({**other, **harmless, "new": 1}))
    with pytest.raises(CheckpointError, match=r"config\.json of the model changed") as caught:
        train(config, tmp_path / "run")
    assert f"new: nothing -> 1; rope_parameters.rope_theta: {theta} -> 5000.0" in caught.value.what
    assert "use_cache" not in caught.value.what and "version" not in caught.value.what
    exported = read_object(export_checkpoint(tmp_path / "run") / "config.json")
    assert network_of(exported) == network_of(trained)
    assert exported["use_cache"] is False
    (model / "config.json").write_text(json.dumps({**trained, **harmless}))
    train(config, tmp_path / "run")
    assert read_object(tmp_path / "run" / "logs" / "outcome.json")["outcome"] == "completed"


def test_a_checkpoint_of_an_earlier_format_is_exported_as_it_was(
    finished: Path, tmp_path: Path
) -> None:
    """No template was kept then; of a run that keeps one, it is missed."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "prepared" / "served.json").unlink()
    with pytest.raises(CheckpointError, match=r"served\.json: is gone"):
        export_checkpoint(folder, tmp_path / "out")
    summary = folder / "prepared" / "summary.json"
    values = read_object(summary)
    values["inputs"]["format"] = 6  # a run that was begun goes on with the data that it has
    summary.write_text(json.dumps(values))
    assert export_checkpoint(folder, tmp_path / "begun").is_dir()
    checkpoint = store.whole_checkpoints(folder)[-1]
    values = read_object(checkpoint / MANIFEST)
    del values["digest"], values["recipe"]["model"]
    values |= {"format": 4, "lineage": {"end_token_id": 7}}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
    (checkpoint / MANIFEST).write_text(json.dumps({**values, "digest": digest}))
    out = export_checkpoint(folder, tmp_path / "out")
    assert read_object(out / "generation_config.json")["eos_token_id"][0] == 7
    assert not (out / "chat_template.jinja").exists()


# -------------------------------------------------------------------------------- templates


def test_another_template_and_its_variables_replace_the_old_one(
    tiny_llama: Path, rows: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "other.jinja").write_text(OTHER)
    config = config_of(tiny_llama, rows, name=str(tmp_path / "other.jinja"), variables=MOOD)
    served = served_of(config, tmp_path)
    assert len(served.rows) == 3
    out = write(tiny_llama, tmp_path, served)
    tokenizer = tokenizer_of(out)
    messages = [{"role": "user", "content": "hi"}]
    said = prompt_of(tokenizer, messages)
    assert said == f"{SAID}<|user|> hi<|end|><|assistant|> "
    other = prompt_of(tokenizer, messages, mood={"names": ["b"]}, tone=None)
    assert other == "<|system|>b None<|end|><|user|> hi<|end|><|assistant|> "
    for given, text in (("{}", said), ("{mood: {names: [b]}, tone: null}", other)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
        assert main(["chat", str(out), "--max-new-tokens", "4", "--variables", given]) == 0
        answer = greedy(out, tokenizer, text, {0})
        assert capsys.readouterr().out == answer.strip().replace("\n", "\\n") + "\n"
    # Prepared again from the export alone, the same rows give the same tokens.
    again = config_of(out, rows)
    prepare(again, tmp_path / "again")
    first, second = (Examples.open(tmp_path / name, "train") for name in ("prepared", "again"))
    assert len(first) == len(second) > 30
    for i in range(len(first)):
        assert first[i].input_ids_L.tolist() == second[i].input_ids_L.tolist()
        assert first[i].weight_L.tolist() == second[i].weight_L.tolist()


def test_the_rows_that_check_an_export_are_trained_on(
    tiny_llama: Path, builders: Any, tmp_path: Path
) -> None:
    """What quotes a control token or lost its answer is left out, and each kind is there."""
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    long = builders.chat("long " + "x y z " * 60, "ok", "t")
    quoting = builders.chat("what is <|end|> for?", "an end", "t")
    plain = [builders.chat(f"say {i}", f"{i}", "t") for i in range(5)]
    with_tool = {**builders.chat("call", "no", "t"), "tools": [tool]}
    two = [*plain[1]["messages"], *plain[2]["messages"]]
    rows = [quoting, long, {**plain[0], "messages": two}, *plain, with_tool]
    file = builders.write(tmp_path / "rows.jsonl", rows)
    own = (tiny_llama / "chat_template.jinja").read_text()
    shown = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}" + own
    (tmp_path / "shown.jinja").write_text(shown)
    config = config_of(tiny_llama, file, name=str(tmp_path / "shown.jinja"))
    config.data.eval_fraction, config.template.strict = 0.0, False
    served = served_of(config, tmp_path)
    asked = [
        ([message["content"] for message in row.prompt.messages], len(row.prompt.tools))
        for row in served.rows
    ]
    assert asked == [(["say 1", "1", "say 2"], 0), (["call"], 1), (["say 0"], 0)]
    tokenizer = tokenizer_of(tiny_llama)
    text = "<|user|>say 1<|end|><|assistant|>1<|end|><|user|>say 2<|end|><|assistant|>"
    assert served.rows[0].token_ids == tokenizer(text)["input_ids"]
    write(tiny_llama, tmp_path, served)


def test_named_templates_are_all_served(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    own = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    settings = read_object(model / "tokenizer_config.json")
    named = {"default": "old", "tool_use": "tools", "spaced": "{{ tone }}" + own}
    settings["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    config = config_of(model, rows, variant="spaced", variables={"tone": "low"})
    out = write(model, tmp_path, served_of(config, tmp_path))
    tokenizer = tokenizer_of(out)
    assert sorted(tokenizer.chat_template) == ["default", "spaced"]
    messages = [{"role": "user", "content": "hi"}]
    for tools in (None, [{"name": "f"}]):
        said = prompt_of(tokenizer, messages, tools=tools)
        assert said == "low<|user|>hi<|end|><|assistant|>"
    (tmp_path / "plain").mkdir()
    named["default"] = own
    settings["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    served = served_of(config_of(model, rows), tmp_path / "plain")
    out = write(model, tmp_path / "plain", served)
    assert tokenizer_of(out).chat_template == named
    assert {path.name for path in (out / "additional_chat_templates").iterdir()} == {
        "tool_use.jinja", "spaced.jinja",
    }  # fmt: skip


def test_the_summary_of_a_run_names_its_ends(finished: Path) -> None:
    tokenizer = tokenizer_of(finished / "export")
    ends = Summary.read(finished / "prepared").end_token_ids
    assert [tokenizer.convert_ids_to_tokens(token) for token in ends] == ["<|im_end|>"]
