"""Fixtures: a small model of a real architecture, small data, and several processes."""

from __future__ import annotations

import atexit
import html
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forkserver
import pytest
import schedule
from xdist.remote import Producer

# Two cores: one thread a process keeps several ranks from fighting for them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Ray's workers are started nice 15, and would hardly run beside tests that compute.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  its name in Ray
# Some images forbid it; here hundreds of processes read the same sources, which are compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Triton looks at this when it is first imported, by whichever test: its kernels run on the CPU.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="posttrain-tests-")  # prepared data
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> schedule.Groups:
    return schedule.Groups(config, log)


def pytest_report_header() -> list[str]:
    return schedule.report(user=os.geteuid())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        place = {file: schedule.group_of(file)[0] for file in {item.path for item in items}}
        items.sort(key=lambda item: place[item.path])


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_model(folder: Path, architecture: str = "Llama", seed: int = 0, **changes) -> Path:
    """A random model of a real architecture, float32, with a tokenizer."""
    import torch
    import transformers

    make_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = getattr(transformers, f"{architecture}Config")(
        **{
            **SIZE,
            "vocab_size": len(tokenizer) + 3,
            "eos_token_id": 0,
            "pad_token_id": 1,
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():  # far from zero, so that a forgotten cap or scale shows
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(user: str, assistant: str, task: str) -> dict:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages, "task_type": task}


def make_rows(count: int = 90, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        word = "".join(draw.choices("abcdefgh", k=draw.randint(1, 9)))
        task = ("copy", "reverse", "upper")[i % 3]
        answer = {"copy": word, "reverse": word[::-1], "upper": word.upper()}[task]
        rows.append(chat(f"{task} {word} {i}", answer, task))
    return rows


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def nf4_llama(tmp_path_factory) -> Path:
    """One whose rows are of whole blocks of 64, which NF4 on a CPU needs."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return make_model(tmp_path_factory.mktemp("nf4"), **sizes)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", make_rows())


@pytest.fixture(scope="session")
def builders():
    """The functions above, for tests that build their own (tests/ is no package)."""

    class Builders:
        model = staticmethod(make_model)
        tokenizer = staticmethod(make_tokenizer)
        rows = staticmethod(make_rows)
        write = staticmethod(write_rows)
        chat = staticmethod(chat)
        size = SIZE

    return Builders


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def run_workers(tmp_path_factory) -> Callable[..., list[str]]:
    """Run tests/workers/<name>.py in `world` processes; returns their outputs.

    They are forks with everything imported; with `fresh` each is an interpreter of its own.
    """

    def run(
        name: str, world: int, *args: object, timeout_s: float = 300, fresh: bool = False
    ) -> list[str]:
        script = Path(__file__).parent / "workers" / name
        port = free_port()
        folder = tmp_path_factory.mktemp("ranks")
        outputs = [folder / f"{rank}.log" for rank in range(world)]
        launch = forkserver.start_fresh if fresh else forkserver.start
        started = [
            launch(script, *map(str, (rank, world, port, *args)), output=output)
            for rank, output in enumerate(outputs)
        ]
        try:
            end = time.monotonic() + timeout_s
            codes = [process.wait(end - time.monotonic()) for process in started]
        finally:
            for process in started:
                process.kill()
        texts = [output.read_text() for output in outputs]
        assert codes == [0] * world, "\n".join(text[-3000:] for text in texts)
        return texts

    return run


@pytest.fixture(scope="session")
def chromium() -> Callable[..., str]:
    """chromium(profile_folder, *arguments): run headless Chromium once; its standard output."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync hide-scrollbars"
    flags += " disable-background-networking disable-component-update"

    def run(profile: Path, *arguments: str) -> str:
        command = [program, *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={profile}"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture
def probed(chromium: Callable[..., str], tmp_path: Path) -> Callable[[str], Any]:
    """probed(page): show a page that stands in tmp_path; the JSON that it made its title."""

    def show(page: str) -> Any:
        (tmp_path / "outer.html").write_text(page, encoding="utf-8")
        flags = ("--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom")
        dom = chromium(tmp_path / "profile", *flags, f"file://{tmp_path}/outer.html")
        title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
        assert title, dom[:2000]
        return json.loads(html.unescape(title.group(1)))

    return show
