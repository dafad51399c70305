"""`posttrain <verb> ...`: finds the verb. Imports nothing heavy, so that help is quick."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.logs import unfailing_output


@dataclass(frozen=True, slots=True)
class Verb:
    """One row of the table below."""

    what: str
    example: str
    module: str  # below posttrain_launch.commands
    hydra: bool = False  # takes overrides, and is a Hydra application


VERBS: dict[str, Verb] = {
    "train": Verb(
        "fine-tune a model; without arguments, the demo",
        "posttrain train model.path=/models/M data.train=/data/chat.jsonl cluster=ray engine=zero3",
        "run.train",
        hydra=True,
    ),
    "plan": Verb(
        "say what fits where: memory, time and disk of a run, before anything starts",
        "posttrain plan model.path=shape:llama3-70b hardware=h100x8 cluster.nodes=4",
        "cluster.plan",
        hydra=True,
    ),
    "prepare": Verb(
        "tokenise and check the data now, so that a run starts at once; writes data_report.html",
        "posttrain prepare model.path=/models/M data.train=/data/chat.jsonl",
        "data.prepare",
        hydra=True,
    ),
    "inspect": Verb(
        "show what would be trained on: rows, supervised tokens, packs",
        "posttrain inspect data.train=/data/chat.jsonl",
        "data.inspect",
        hydra=True,
    ),
    "evaluate": Verb(
        "held-out loss of a model, and of adapters on it, for every channel",
        "posttrain evaluate model.path=outputs/demo/20260101-120000/export",
        "quality.evaluate",
        hydra=True,
    ),
    "submit": Verb(
        "send a training to Slurm (--dry-run: only write the job)",
        "posttrain submit engine=zero3 cluster.nodes=2 cluster.gpus_per_node=8 cluster.time=1-00",
        "cluster.submit",
        hydra=True,
    ),
    "status": Verb(
        "where runs stand: state, step, loss, speed, time left, restarts and why",
        "posttrain status --watch",
        "cluster.status",
    ),
    "cancel": Verb(
        "end a run so that it saves first and does not come back; --now: at once",
        "posttrain cancel outputs/demo/20260101-120000",
        "cluster.cancel",
    ),
    "logs": Verb(
        "show the logs of a run, the first failing rank's first; --follow as they grow",
        "posttrain logs outputs/demo/20260101-120000",
        "cluster.logs",
    ),
    "run": Verb(
        "go on with the run of a run folder, or start a frozen one",
        "posttrain run outputs/demo/20260101-120000",
        "run.run",
    ),
    "chat": Verb(
        "talk to a model folder or to what a run made; --adapter NAME=FOLDER switches adapters",
        "posttrain chat outputs/demo/20260101-120000",
        "quality.chat",
    ),
    "export": Verb(
        "write the newest checkpoint of a run as a Hugging Face or adapter folder",
        "posttrain export outputs/demo/20260101-120000 /models/mine",
        "run.export",
    ),
    "combine": Verb(
        "several LoRA adapters of one base model as one: a weighted sum, TIES, DARE",
        "posttrain combine /adapters/both /adapters/a:0.7 /adapters/b:0.3 --method ties "
        "--density 0.5",
        "quality.combine",
    ),
    "report": Verb(
        "write report.html of a run, finished or not",
        "posttrain report outputs/demo/20260101-120000",
        "run.report",
    ),
    "init": Verb(
        "write a commented YAML to start from",
        "posttrain init my_run",
        "run.init",
    ),
    "doctor": Verb(
        "look at this machine: what works, what is missing",
        "posttrain doctor",
        "cluster.doctor",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line; the exit code: 0, 1 failed, 2 wrong input, 130 stopped.

    Output that cannot be written (`| head`, a terminal that hung up, a full disk) is left out and
    changes nothing else.
    """
    with unfailing_output():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> int:
    _set_environment()
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if arguments[0] == "--version":
        from posttrain_dist import __version__

        print(f"posttrain {__version__}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        return _unknown(name)
    verb = VERBS[name]
    from posttrain_dist.errors import refuse_undecoded
    from posttrain_launch.failures import BAD_CONFIG, FAILED, STOPPED, is_bad_config, print_error

    try:
        refuse_undecoded([*rest, str(Path.cwd())])
        command: Callable[[list[str], bool], int]
        command = importlib.import_module(f"posttrain_launch.commands.{verb.module}").command
        return command(rest, debug)
    except KeyboardInterrupt:
        return STOPPED
    except SystemExit as left:  # why was printed: by argparse, by Hydra, or by compose_command
        return left.code if isinstance(left.code, int) else BAD_CONFIG if left.code else 0
    except Exception as error:
        print_error(error, debug=debug)
        return BAD_CONFIG if verb.hydra and is_bad_config(error) else FAILED


def help_text() -> str:
    """What `posttrain --help` prints."""
    width = max(map(len, VERBS))
    lines = [
        "posttrain: post-training of large language models, from one GPU to a Slurm cluster.",
        "",
        "usage: posttrain <verb> [arguments]       posttrain <verb> --help",
        "",
    ]
    for name, verb in VERBS.items():
        lines += [f"  {name:<{width}}  {verb.what}", f"  {'':<{width}}    {verb.example}"]
    lines += [
        "",
        "train, plan, inspect, evaluate and submit take key=value, group=option and Hydra's flags.",
        "--debug, with any verb, shows the stack trace of an error.",
    ]
    return "\n".join(lines)


def _unknown(name: str) -> int:
    import difflib

    near = difflib.get_close_matches(name, VERBS, n=1)
    fix = f"did you mean `posttrain {near[0]}`?" if near else f"verbs: {', '.join(VERBS)}"
    if "=" in name:
        fix = f"give the verb first: posttrain train {name}"
    print(f"error: there is no verb {name}\n  fix: {fix}", file=sys.stderr)
    return 2


def _set_environment() -> None:
    """No telemetry, and whole errors from Hydra, which we word ourselves."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
