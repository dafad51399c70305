"""`posttrain chat`: a conversation with a model folder, streamed.

Of several adapters on one base, a line `/adapter NAME` chooses who answers from then on.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import ConfigError, ModelError, PosttrainError
from posttrain_dist.generation.adapter_places import BASE
from posttrain_launch.commands.arguments import add_adapters, named_folders, parser_of
from posttrain_launch.failures import print_error

if TYPE_CHECKING:
    from posttrain_dist.generation.base import Reply
    from posttrain_dist.generation.local import LocalGenerator


def command(arguments: list[str], debug: bool) -> int:
    """Answer lines from standard input until it ends; at a terminal, with a prompt."""
    parser = parser_of("chat")
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH|RUN",
        help="a Hugging Face folder, an adapter folder, or a run with export/ or adapter/",
    )
    add_adapters(parser, "that answers, until a line /adapter NAME, or /adapter none for the base")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of each reply")
    parser.add_argument("--system", help="a system message")
    parser.add_argument(
        "--variables",
        metavar="YAML",
        default="{}",
        help="what the chat template reads, such as '{enable_thinking: false}'",
    )
    given = parser.parse_args(arguments)
    variables = _variables(given.variables)
    folder, adapters = model_folder(given.path), named_folders(given.adapter)
    from posttrain_dist.data.chat.rendering.jinja_environment import with_thoughts
    from posttrain_dist.data.chat.rendering.served import Prompt
    from posttrain_dist.evaluation.chat_generator import load_generator
    from posttrain_dist.generation.base import Sampling

    notices: list[str] = []
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        generator = load_generator(folder, adapters, notices.append)
    for notice in notices:
        print(notice, file=sys.stderr)
    sampling = Sampling(max_new_tokens=given.max_new_tokens)
    first = [{"role": "system", "content": given.system}] if given.system else []
    messages = list(first)
    talks = sys.stdin.isatty()
    if talks:
        print("an empty line starts over, Ctrl-D ends")
        if generator.adapters:
            print(f"/adapter NAME chooses of: {', '.join([*generator.adapters, BASE])}")
    while (text := _next_line(talks)) is not None:
        if not text.strip() or not talks:
            messages = list(first)  # from a pipe, every line is a conversation of its own
        if not text.strip():
            continue
        if text.split()[0] == "/adapter" and generator.adapters:
            _choose(generator, text.split()[1:])
            continue
        messages.append({"role": "user", "content": text})
        stream = generator.stream(Prompt(messages, variables=variables), sampling)
        reply = _told(stream, aloud=talks)
        # From a pipe: one reply per line.
        print("" if talks else reply.text.strip().replace("\n", "\\n"), flush=True)
        turn = {"role": "assistant", "content": reply.text}
        if reply.thoughts:
            turn["reasoning_content"] = reply.thoughts
        messages += with_thoughts([turn])
        if getattr(sys.stdout, "lost", False):  # `| head`: nobody reads the answers
            break
    return 0


def _choose(generator: LocalGenerator, words: list[str]) -> None:
    """Have another adapter answer from now on; a name that is none changes nothing."""
    name = " ".join(words)
    try:
        generator.choose(name)
    except PosttrainError as error:
        print_error(error, debug=False)
    else:
        print(f"{'the base model' if name == BASE else name} answers", file=sys.stderr)


def _told(stream: Generator[str, None, Reply], *, aloud: bool) -> Reply:
    """The whole of an answer, which is printed as it comes if `aloud`."""
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            reply: Reply = end.value
            return reply
        if aloud:
            print(piece, end="", flush=True)


def _next_line(talks: bool) -> str | None:
    try:
        return input("> " if talks else "")
    except EOFError:
        return None


def _variables(text: str) -> dict[str, Any]:
    """Variables of the chat template, from YAML.

    Raises:
        ConfigError: it is no mapping, or one of its names is taken.
    """
    import yaml

    from posttrain_dist.data import RESERVED_VARIABLES

    fix = "give names and values, such as --variables '{enable_thinking: false}'"
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("is not valid YAML", where="--variables", fix=fix) from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"is {text!r}, no mapping of names", where="--variables", fix=fix)
    if taken := sorted(RESERVED_VARIABLES & values.keys()):
        raise ConfigError(
            f"{taken[0]} is no variable of a template", where="--variables", fix="leave it out"
        )
    return values


def model_folder(path: Path) -> Path:
    """The model behind a path: the folder itself, or what a run made: its export or adapter.

    Raises:
        ModelError: neither is there.
    """
    from posttrain_dist.models.folder import TINY_BASE, resolve

    if str(path) == TINY_BASE:
        return resolve(TINY_BASE)
    if (path / "metrics.jsonl").is_file() or (path / "run.json").is_file():
        made = [path / name for name in ("export", "adapter") if (path / name).is_dir()]
        if not made:
            raise ModelError(
                "this run has no export yet",
                where=str(path),
                fix=f"posttrain export {path} writes one from its newest checkpoint",
            )
        return made[0].absolute()
    return path.absolute()
