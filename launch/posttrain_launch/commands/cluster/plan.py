"""`posttrain plan`: what fits where, how fast, and what else would; nothing is started."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain_dist.config import AutoEngine, AutoTuning, RunConfig, Single, Slurm, complete
from posttrain_dist.config.hardware import with_nodes
from posttrain_dist.config.rules import single_on_many
from posttrain_dist.data.sources import EMBEDDED
from posttrain_dist.errors import ConfigError
from posttrain_dist.files import write_atomic
from posttrain_dist.models.architectures.positions import check_planned_length
from posttrain_dist.models.folder import TINY_BASE, check_folder, has_tokenizer, resolve
from posttrain_dist.planner.fallbacks import (
    first_or_nearest,
    is_auto,
    nearest,
    nothing_fits,
    reasons,
    try_all,
    try_until_one_fits,
)
from posttrain_dist.planner.inverse import BOUNDS, GPUS, Answer, fewest, largest
from posttrain_dist.planner.job import DataFacts, Machine
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.plan import Choice, Plan, Tried
from posttrain_dist.planner.plan_file import file_content
from posttrain_launch.compose.command_line import CommandLine, typed_keys
from posttrain_launch.compose.composer import Composed
from posttrain_launch.compose.hydra_app import compose_command, read_command_line
from posttrain_launch.compose.paths import with_absolute_paths
from posttrain_launch.failures import BAD_CONFIG, FAILED, print_error

FITS = 0
TIME = "cluster.time="  # which no job goes without
_LONGEST_H, _SPARE = 24.0, 1.25  # of a job whose data nobody knows; of what it may take


def command(arguments: list[str], debug: bool) -> int:
    """Print the plan; the exit code: 0 it fits, 1 it does not, 2 wrong input."""
    line = read_command_line("plan", arguments, debug)
    composed = compose_command(line)
    try:
        return _answer(line, composed)
    except Exception as error:  # 1 would say that the run does not fit
        print_error(error, debug=debug)
        return BAD_CONFIG


def _answer(line: CommandLine, composed: Composed) -> int:
    config = complete(with_absolute_paths(composed.config))
    _check_named(config, line)
    machine = find_machine(config, plans_only=True)
    _check_workers(config)
    facts = _facts(config)
    questions = {"--largest", "--fewest"} & line.own.keys()
    if len(questions) > 1 or (questions and "--all" in line.own):
        raise ConfigError("stands beside another question", where=min(questions), fix="ask one")
    if questions and "--html" in line.own:
        fix = f"leave {min(questions)} out, or --html; --json has the answers too"
        raise ConfigError("draws one plan, and no answers", where="--html", fix=fix)
    if "--largest" in line.own:
        key = line.own["--largest"][-1]
        answers = largest(config, machine, key, facts, typed_keys(line.overrides))
        return _print_answers(line, _verb(config), f"largest {key}", answers, key)
    _check_length(config, facts)
    if "--fewest" in line.own:
        _check_counted(line.own["--fewest"][-1])
        answers = fewest(config, machine, facts, typed_keys(line.overrides))
        return _print_answers(line, _verb(config), "fewest GPUs", answers)
    return _print_plan(line, config, machine, facts)


def _check_named(config: RunConfig, line: CommandLine) -> None:
    if config.model.path == TINY_BASE and "model.path" not in typed_keys(line.overrides):
        raise ConfigError(
            "is not set: nothing says which model is planned",
            where="model.path",
            fix="set model.path=<a model folder, or one with a config.json alone>, or a shape that "
            "comes with the package, such as model.path=shape:llama3-8b",
        )


def _check_workers(config: RunConfig) -> None:
    """Refuse what `submit` refuses of one process on several GPUs."""
    cluster = with_nodes(config.cluster, config.hardware)
    if isinstance(config.engine, Single) and isinstance(cluster, Slurm) and not cluster.workers:
        workers = cluster.nodes * max(1, cluster.gpus_per_node or 0)
        if workers > 1:
            raise single_on_many(workers)


def _facts(config: RunConfig) -> DataFacts | None:
    """Of the user's own data, once it was prepared."""
    from posttrain_dist.prepare import find_prepared

    named = config.data.train != EMBEDDED or bool(config.data.sources)
    if not named or not has_tokenizer(resolve(config.model.path)):
        return None
    found = find_prepared(config)
    if found is None:
        print(
            "the data is not prepared: rows count as full, and time is for a billion tokens; "
            "`posttrain prepare` with the same words counts them",
            file=sys.stderr,
        )
    return None if found is None else DataFacts.read(found)


def _check_length(config: RunConfig, facts: DataFacts | None) -> None:
    folder = resolve(config.model.path)
    longest = config.data.max_length
    if facts is not None:
        longest = min(longest, facts.longest)
    check_planned_length(check_folder(folder, need_weights=False), longest)


def _check_counted(what: str) -> None:
    if what != GPUS:
        what = f"{what} is not what can be counted"
        raise ConfigError(what, where="--fewest", fix=f"write --fewest {GPUS}")


# ------------------------------------------------------------------------------------- one plan


def _print_plan(
    line: CommandLine, config: RunConfig, machine: Machine, facts: DataFacts | None
) -> int:
    typed = typed_keys(line.overrides)
    try_them = try_all if "--all" in line.own else try_until_one_fits
    tried = try_them(config, machine, facts, typed)
    if "--all" in line.own and not is_auto(config):
        free = dataclasses.replace(config, tuning=AutoTuning(), engine=AutoEngine())
        tried += try_all(free, machine, facts, typed)
    as_it_is = not is_auto(config) and "--all" not in line.own
    choice = Choice(tried, tried[0] if as_it_is else first_or_nearest(tried))
    plan = choice.chosen.plan
    if plan is None:
        raise nothing_fits(tried)
    fits = any(each.plan is not None and each.plan.fits for each in tried)
    if "--html" in line.own:
        _write_page(line, choice, _verb(config))
    if _wrote_json(line, file_content(choice)):
        return FITS if fits else FAILED
    if "--all" in line.own:
        _print_table(choice)
        return FITS if fits else FAILED
    if is_auto(config) and not fits:
        _print_table(choice)
        print_error(nothing_fits(tried))
        return FAILED
    _print_chosen(line, config, choice, plan)
    if not fits:
        _print_instead(line, _verb(config), nearest(config, machine, facts))
    return FITS if fits else FAILED


def _print_chosen(line: CommandLine, config: RunConfig, choice: Choice, plan: Plan) -> None:
    from posttrain_dist.report.plan.plan_text import plan_text

    if is_auto(config):
        print(f"{choice.chosen.name}: the first fallback that fits")
        for reason in reasons(choice):
            print(f"  not {reason}")
        print()
    words, verb = _words(line, plan), _verb(config)
    print(plan_text(plan.to_json(), words, verb=verb, width=_width(), color=_color()))


def _print_instead(line: CommandLine, verb: str, instead: Tried | None) -> None:
    if instead is None or instead.plan is None:
        print("\nno fallback fits; posttrain plan --all shows by how much each misses")
        return
    print(f"\nwhat fits is {instead.name}\n  {_command(line, verb, instead.plan)}")


def _print_table(choice: Choice) -> None:
    from posttrain_dist.planner.plan_file import choice_json
    from posttrain_dist.report.plan.plan_text import plan_table

    print(plan_table(choice_json(choice), width=_width(), color=_color()))


def _write_page(line: CommandLine, choice: Choice, verb: str) -> None:
    from posttrain_dist.report.plan.plan_page import write_plan_page

    content, plan = file_content(choice), choice.chosen.plan
    assert plan is not None
    path = Path((line.own["--html"] or ["plan.html"])[-1])
    words = _words(line, plan)
    written = _write(
        path, lambda: write_plan_page(path, content["plan"], content["choice"], words, verb)
    )
    print(f"page: {written}", file=sys.stderr)


# ------------------------------------------------------------------------------ inverse answers


def _print_answers(
    line: CommandLine, verb: str, title: str, answers: list[Answer], counted: str = GPUS
) -> int:
    from posttrain_dist.report.text_tables import text_table

    found = [each for each in answers if each.value is not None and each.plan is not None]
    content = [
        {**_plain(each), "plan": None if each.plan is None else each.plan.to_json()}
        for each in answers
    ]
    if _wrote_json(line, {"question": title, "answers": content}):
        return FITS if found else FAILED
    rows = [
        (
            each.name,
            "-" if each.value is None else f"{each.value:,}{'+' * each.bounded}",
            "-" if each.plan is None or each.value is None else _rate(each.plan),
        )
        for each in answers
    ]
    print(text_table(("fallback", title, "tokens/s"), rows))
    for each in answers:
        if each.refused:
            print(f"{each.name}: {each.refused}")
    if any(each.bounded for each in found):
        print(f"+ {BOUNDS[counted]}, whatever the memory")
    if not found:
        print("none of them fits with any value; posttrain plan --all shows what each misses")
        return FAILED
    first = found[0]
    assert first.plan is not None
    print(f"\n{first.name} with {title} {first.value:,}\n  {_command(line, verb, first.plan)}")
    return FITS


def _plain(answer: Answer) -> dict[str, Any]:
    """An answer in plain values, but for its plan."""
    names = ("name", "value", "bounded", "refused")
    return {name: getattr(answer, name) for name in names}


def _rate(plan: Plan) -> str:
    return f"{plan.speed.tokens_per_s:,.0f}"


# ---------------------------------------------------------------------------------- the output


def _words(line: CommandLine, plan: Plan) -> list[str]:
    """What was typed, and the cluster where several workers need one."""
    from posttrain_dist.report.plan.plan_figures import command_of

    left = ["tuning=auto", "engine=auto"]
    left += ["cluster=ray"] if plan.workers == 1 else []
    # Hydra writes `\\:` into the words of a sweep.
    typed = [word.replace("\\:", ":") for word in line.overrides if word not in left]
    if _is_job(typed) and not any(word.startswith(TIME) for word in typed):
        typed.append(_time_word(plan))
    return command_of({"overrides": []}, typed)


def _command(line: CommandLine, verb: str, plan: Plan) -> str:
    from posttrain_dist.report.plan.plan_figures import command_of

    words = command_of(plan.to_json(), _words(line, plan))
    verb = "submit" if _is_job(words) else verb
    if verb == "submit" and not any(word.startswith(TIME) for word in words):
        words.append(_time_word(plan))
    return shlex.join(["posttrain", verb, *words])


def _is_job(words: list[str]) -> bool:
    """Whether they choose Slurm, by one of its presets."""
    return any(word.startswith("cluster=slurm") for word in words)


def _time_word(plan: Plan) -> str:
    """Whole hours that a job may take, with some to spare."""
    hours = plan.speed.hours * _SPARE if plan.speed.tokens is not None else _LONGEST_H
    return f"{TIME}{min(9_999, math.ceil(hours))}:00:00"


def _verb(config: RunConfig) -> str:
    """What starts such a run."""
    return "submit" if isinstance(config.cluster, Slurm) else "train"


def _wrote_json(line: CommandLine, content: dict[str, Any]) -> bool:
    """Whether JSON was asked for on the terminal, instead of all else."""
    if "--json" not in line.own:
        return False
    text = json.dumps(content, indent=1) + "\n"
    if not line.own["--json"]:
        print(text, end="")
        return True
    path = Path(line.own["--json"][-1])
    print(f"JSON: {_write(path, lambda: write_atomic(path, text))}", file=sys.stderr)
    return False


def _write(path: Path, write: Callable[[], object]) -> Path:
    try:
        write()
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            fix="name a file in a folder that is there and can be written to",
        ) from error
    return path.absolute()


def _width() -> int:
    return max(72, min(110, shutil.get_terminal_size((88, 24)).columns))


def _color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
