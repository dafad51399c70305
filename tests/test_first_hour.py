"""The first hour: the commands of the README, and the mistakes that are typed most.

Each mistake gets ONE message, which says what is wrong, where, and what to write instead; nothing
is trained and no run folder is left.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from posttrain_launch.cli import VERBS, main

README = (Path(__file__).parent.parent / "README.md").read_text()
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "a23456789", "function": {"name": "f", "arguments": {}}}
USES_TOOLS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "a23456789", "name": "f"},
    {"role": "assistant", "content": "four"},
]

# What is typed behind `posttrain train` -> where, what, the beginning of the fix.
TYPED = {
    "--learning_rate 1e-5": (
        "--learning_rate",
        "is no flag; keys are given as key=value, without dashes",
        "write optimizer.lr=1e-5 (that is the name here)\n",
    ),
    "learning_rate=1e-5": (
        "learning_rate",
        "unknown key",
        "write optimizer.lr (that is the name here)\n",
    ),
    "--config my.yaml": (
        "--config",
        "is no flag",
        "settings of your own are DIR/experiment/my.yaml, with `# @package _global_` as the first "
        "line: posttrain train --config-dir DIR +experiment=my;",
    ),
    "optimizer.lr = 1e-5": (
        "optimizer.lr",
        "key and value are one word, and 1e-5 stands apart",
        "write optimizer.lr=1e-5\n",
    ),
    "model.path=meta-llama/Llama-3.1-8B": (
        f"{Path.cwd()}/meta-llama/Llama-3.1-8B",
        "there is no such model folder",
        "set model.path to a folder with config.json, tokenizer.json and *.safetensors, or to "
        "tiny_base; a model of the hub is not downloaded: `hf download OWNER/NAME --local-dir",
    ),
    "data.train=/no/such.jsonl": (
        "/no/such.jsonl",
        "no file has this name",
        "give a JSONL, JSON, parquet or CSV file",
    ),
    "data.train={d}/gr\udcf6sse.jsonl": (
        "data.train={d}/gr\ufffdsse.jsonl",
        "holds bytes that are no UTF-8",
        "rename it\n",
    ),
    "data=rows.jsonl": (
        "data",
        "is a group of keys, not one value",
        "write data.train=rows.jsonl\n",
    ),
    "data.train=[a.jsonl,b.jsonl]": (
        "data.train",
        "is one place, and several were given",
        "set data.train to a folder or a glob in quotes ('/data/*.jsonl'), or use data.sources\n",
    ),
    "gradient_accumulation_steps=4": (
        "gradient_accumulation_steps",
        "unknown key",
        "set train.batch_size (packs per step over all workers) and train.micro_batch_size; ",
    ),
    "lora_r=8": ("lora_r", "unknown key", "write tuning=lora tuning.rank=<value> (those are"),
    "warmup_steps=10": ("warmup_steps", "unknown key", "write optimizer.warmup_steps (that is"),
    "early_stopping_patience=3": (
        "early_stopping_patience",
        "unknown key",
        "set diagnose.early_stop=[overfitting] and diagnose.overfit_evals",
    ),
    "template=qwen3": ("template", "there is no option qwen3", "write template=qwen (that"),
    "chat_template=llama3": ("chat_template", "unknown key", "choose template=llama3\n"),
    "train.epochs=three": (
        "train.epochs",
        "'three' is not a number or null",
        "set train.epochs to a number or null\n",
    ),
    "train.epochs=1 train.steps=9": (
        "train.steps",
        "is set together with train.epochs or train.tokens",
        "set one of the three\n",
    ),
    "cluster.workers=2": (
        "cluster.workers",
        "unknown key",
        "this key belongs to cluster=ray or cluster=slurm: choose that",
    ),
    "engine=deepspeed": (
        "engine",
        "there is no option deepspeed",
        "use one of: auto, single, zero0,",
    ),
    "optimizer.lr=1e-5,3e-5": (
        "optimizer.lr",
        "1e-5,3e-5 means several values, one run for each",
        "for one value that holds such characters write 'optimizer.lr=\"1e-5,3e-5\"'; for several "
        "runs add -m\n",
    ),
    "eval.generate_rows=4 checkpoint.export=false": (
        "eval.generate_rows",
        "is 4, and answers come from the export, which checkpoint.export=false leaves out",
        "set checkpoint.export=true, or eval.generate_rows=0\n",
    ),
}

# The same for faults of the data and the model, which only reading them shows; {d} is their folder.
READ = {
    "data.train={d}/text.jsonl": (
        "{d}/text.jsonl:1",
        "these are text rows",
        "set objective=pretrain, which reads text rows; this objective reads rows such as\n",
    ),
    "objective=pretrain": (
        "{d}/rows.jsonl:1",
        "these are messages rows",
        "set objective=sft, which reads messages rows; this objective reads rows such as\n",
    ),
    "data.train={d}/long.jsonl": (
        "{d}/long.jsonl:1, {d}/long.jsonl:3, {d}/long.jsonl:5, ...",
        "6 of 12 rows are longer than data.max_length=128, and 6 of them lose their end of turn "
        "where they are cut: a model that is not taught it never stops (check 'end_of_turn')",
        "set data.long_rows=drop (leaves such rows out) or split (makes several samples of each; "
        "truncate is what was done), or raise data.max_length; ",
    ),
    "model.path={d}/base": (
        "{d}/base",
        "the tokenizer has no chat template",
        "set template=chatml (or qwen, qwen3.5, zephyr: this tokenizer has their tokens), best the "
        "one of the model's instruct sibling; rows of prompt and completion as text need none\n",
    ),
    "data.train={d}/tools.jsonl": (
        "{d}/tools.jsonl:1",
        "2 rows, first at line 1: the chat template does not show the row's tools",
        "choose a template that knows tools, whose tokens this tokenizer has: that of the model's "
        "family, else template=chatml, llama3, mistral, qwen, qwen3.5, glm, granite, cohere, "
        "gemma4 or gpt-oss; or leave them out of the row\n",
    ),
    "data.train={d}/numbers.jsonl": (
        "{d}/numbers.jsonl:2 (byte {second})",
        "15 rows, first at line 2: messages[1].content is a number, expected text",
        "write it as a JSON string\n",
    ),
}


@pytest.fixture(scope="module")
def places(tiny_llama: Path, rows_file: Path, builders, tmp_path_factory) -> dict[str, str]:
    """A folder with a base model and rows of each kind."""
    d = tmp_path_factory.mktemp("first")
    shutil.copy(rows_file, d / "rows.jsonl")
    builders.write(d / "text.jsonl", [{"text": "the fox"}] * 3)
    builders.write(d / "pairs.jsonl", [{"prompt": "the ", "completion": f"{i}"} for i in range(9)])
    lengths = [300, 5] * 6
    builders.write(d / "long.jsonl", [builders.chat("q", "a" * n, "t") for n in lengths])
    builders.write(d / "tools.jsonl", [{"messages": USES_TOOLS, "tools": [TOOL]}] * 2)
    good, bad = builders.chat("q", "a", "t"), builders.chat("q", 5, "t")
    builders.write(d / "numbers.jsonl", [good, *[bad] * 15, good])
    shutil.copytree(tiny_llama, d / "base")
    (d / "base" / "chat_template.jinja").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        file = d / "base" / name
        values = json.loads(file.read_text())
        values.pop("chat_template", None)
        text = json.dumps(values).replace("<|pad|>", "<|im_start|>")
        file.write_text(text.replace("<|system|>", "<|im_end|>"))
    return {"d": str(d), "model": str(tiny_llama), "second": str(len(json.dumps(good)) + 1)}


def message_of(typed: str, places: dict[str, str], out: Path, capsys, verb: str = "train") -> str:
    """The one error that a command gives; it must leave nothing behind."""
    words = shlex.split(typed.replace("{d}", places["d"]))
    good = {"model.path": places["model"], "data.train": f"{places['d']}/rows.jsonl"}
    good |= {"output_root": str(out), "data.max_length": "128", "logging.wandb": "off"}
    given = {word.partition("=")[0] for word in words}
    command = [verb, *(f"{k}={v}" for k, v in good.items() if k not in given), *words]
    assert main(command) in (1, 2)
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    assert shown.err.count("error: ") == shown.err.count("  fix: ") == 1
    assert not list(out.rglob("*"))
    return shown.err


def expected(where: str, what: str, fix: str, places: dict[str, str]) -> str:
    text = f"error: {where}: {what}\n  fix: {fix}"
    for name, value in places.items():
        text = text.replace("{" + name + "}", value)
    return text


@pytest.mark.parametrize("typed", TYPED)
def test_a_mistake_in_the_command_has_one_message(typed, places, tmp_path, capsys):
    said = message_of(typed, places, tmp_path / "out", capsys)
    assert said.startswith(expected(*TYPED[typed], places))


@pytest.mark.parametrize("typed", READ)
def test_a_mistake_in_the_data_has_one_message(typed, places, tmp_path, capsys):
    said = message_of(typed, places, tmp_path / "out", capsys)
    assert said.startswith(expected(*READ[typed], places))
    assert said.endswith("\n  nothing was begun, and no run folder is left\n")


def test_a_job_that_says_too_little_has_one_message(places, tmp_path, capsys):
    typed = "engine=zero1 cluster.nodes=4"
    said = message_of(typed, places, tmp_path / "out", capsys, verb="submit")
    assert said.startswith("error: cluster.gpus_per_node: is not set, and has no default; nor is")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "error: there is no verb trian\n  fix: did you mean `posttrain train`?\n"),
        (["run"], "error: posttrain run: the following arguments are required: RUN\n  fix: "),
        (["run", "/no/run"], "error: /no/run: is no run folder: it has no config.yaml\n  fix: "),
    ],
)
def test_a_mistake_in_the_verb_has_one_message(words, said, capsys):
    assert main(words) in (1, 2)
    assert capsys.readouterr().err.startswith(said)


def test_a_base_model_needs_no_template_for_prompts_and_completions(places, tmp_path, capsys):
    words = [f"model.path={places['d']}/base", f"data.train={places['d']}/pairs.jsonl"]
    assert main(["prepare", *words, f"output_root={tmp_path}"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("pairs"))
    assert row.split()[1:3] == ["8", "8"]  # rows of the training split


def readme_commands() -> list[str]:
    """The commands of the README that compose: of its blocks, and of its table of verbs."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    table = re.findall(r"^\| `(posttrain \w+ [^`]*=[^`…]*)` \|", README.replace("… ", ""), re.M)
    found = [line.split("#")[0].strip() for line in blocks.splitlines()] + table
    return [line for line in found if line.startswith("posttrain ")]


def same(typed: str, shown: str) -> bool:
    """Whether a value is the one that was typed: numbers may be written otherwise."""
    try:
        return float(typed) == float(shown)
    except ValueError:
        return typed == shown


def test_the_commands_of_the_readme_compose(capsys):
    verbs = set()
    for command in readme_commands():
        verb, *words = shlex.split(command)[1:]
        if not VERBS[verb].hydra:
            continue
        if "-m" in words:  # a sweep has no page of its own: its first trial
            words = [word.partition(",")[0] for word in words if word != "-m"]
        assert main([verb, "--cfg", "job", *words]) == 0, command
        shown = capsys.readouterr().out
        for key, equals, value in (word.partition("=") for word in words):
            if "." in key and equals:
                values = re.findall(rf"^  {key.split('.')[-1]}: '?(.*?)'?$", shown, re.M)
                assert any(same(value, found) for found in values), (command, key)
        verbs.add(verb)
    assert verbs == {"train", "inspect", "plan", "prepare", "submit"}
