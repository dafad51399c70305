"""`posttrain init`: a commented YAML that runs as it is and shows what to change."""

from __future__ import annotations

from pathlib import Path

from posttrain_dist.errors import ConfigError
from posttrain_launch.commands.arguments import parser_of

STARTER = """\
# @package _global_
# posttrain train --config-dir {folder} +experiment={name}
#
# A run of your own. It runs as it is (a small model, a small data set, this process); change
# what you need. Only differences from the defaults stand here: `posttrain train --cfg job`
# lists every key, `posttrain train --help` every option.
defaults:
  - override /objective: sft      # sft | pretrain | dpo | simpo | orpo | kto | reward
  - override /template: tokenizer # the model's own | chatml | llama3 | qwen | ...
  - override /engine: single      # single | zero0 | zero1 | zero2 | zero3 | zero3_offload
  - override /cluster: local      # local | ray; `posttrain submit` takes slurm

name: {name}                      # the run folder is outputs/{name}/<time>

model:
  path: tiny_base                 # a Hugging Face folder: /models/Llama-3.1-8B-Instruct

data:
  # One JSON object a line:
  #   {{"messages": [{{"role": "user", "content": "..."}},
  #                 {{"role": "assistant", "content": "..."}}], "task_type": "my_channel"}}
  # ShareGPT, Alpaca and others are recognised too; parquet, csv, .gz and .zst are read. To
  # compare answers: {{"prompt": "...", "chosen": "...", "rejected": "..."}}
  # `posttrain prepare` or `inspect` shows what would be trained on, before anything is.
  train: embedded                 # a file, folder or glob: /data/train/*.jsonl
  # sources:                      # instead of `train`: several, by weight
  #   chat: {{path: /data/chat, weight: 3.0}}
  #   code: {{path: /data/code, weight: 1.0, max_passes: 2}}
  # mix_by: tokens                # what the weights share out: rows | tokens (supervised)
  # eval: /data/heldout.jsonl     # left out: a share of the training rows
  max_length: 512                 # tokens of a pack, and of a row
  # long_rows: drop               # rows above it: truncate (cut and counted) | split | drop

optimizer:
  lr: 1.0e-3                      # for a model of billions of parameters: 1.0e-5
  # warmup_steps: 100             # or warmup_ratio: 0.03, the share of all steps

train:
  steps: 20                       # or epochs: 1, or tokens: 1_000_000
  # batch_size: 8                 # packs an optimizer step, over all workers
  # micro_batch_size: 1           # packs a forward pass, on each worker; the rest accumulates
  # eval_every: 10
  # save_every: 100               # Ctrl-C saves too; `posttrain run <run folder>` goes on

# With cluster: ray, the number of processes:
# cluster:
#   workers: 8
"""


def command(arguments: list[str], debug: bool) -> int:
    """Write `<dir>/experiment/<name>.yaml`; never over a file that is there."""
    parser = parser_of("init")
    parser.add_argument("name", nargs="?", default="my_run", help="default: my_run")
    parser.add_argument("--dir", type=Path, default=Path(), help="default: this folder")
    given = parser.parse_args(arguments)
    path = write_starter(given.name, given.dir)
    print(f"wrote {path}\nrun it: posttrain train --config-dir {given.dir} "
          f"+experiment={given.name}")  # fmt: skip
    return 0


def write_starter(name: str, folder: Path) -> Path:
    """Write the starter YAML and return its path.

    Raises:
        ConfigError: the file is there already, the name is no file's name, or the folder cannot
            be written to.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(
            f"{name!r} is no name for an experiment", where="name", fix="use letters, digits, - _"
        )
    path = folder / "experiment" / f"{name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            stream.write(STARTER.format(name=name, folder=folder))
    except FileExistsError as error:
        raise ConfigError(
            "is already there, and is left as it is",
            where=str(path),
            fix="give another name: posttrain init NAME",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            fix="choose a folder with --dir",
        ) from error
    return path
