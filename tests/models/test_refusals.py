"""What is wrong with an architecture is found in config.json alone, and dies by name elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_models_page
import pytest
import torch
import transformers
from small_configs import small_config

from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.models.architectures import native_types, refusals
from posttrain_dist.models.architectures.failures import named_failures
from posttrain_dist.models.architectures.known import LEARNED_POSITIONS, REFUSED, TRAINED
from posttrain_dist.models.architectures.positions import check_row_length
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.preflight import input_problems
from posttrain_dist.run import run

# The heads divide by those of keys that each type takes by itself.
SIZES = {
    "hidden_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 160,
    "intermediate_size": 8,
    "vocab_size": 8,
}
FILE = Path("folder/config.json")


def problems(**config: Any) -> list[str]:
    return [str(problem) for problem in refusals.architecture_problems({**SIZES, **config}, FILE)]


@pytest.fixture
def never_asked(monkeypatch):
    def native(model_type):
        raise AssertionError(f"transformers was asked for {model_type}")

    monkeypatch.setattr(refusals, "native", native)


def test_the_page_is_what_the_tool_writes():
    names = make_models_page.class_names()
    assert make_models_page.PAGE.read_text() == make_models_page.page(names)
    assert set(names) >= TRAINED | REFUSED.keys()
    assert not TRAINED & REFUSED.keys()


def test_the_table_decides_without_transformers(never_asked):
    for model_type in TRAINED:
        assert problems(model_type=model_type, architectures=["XForCausalLM"]) == []
    for model_type, reason in REFUSED.items():
        (problem,) = problems(model_type=model_type, architectures=["XForCausalLM"])
        assert problem.startswith(f"{FILE}: {model_type} {reason}\n  fix: use a dense text-only")


def test_what_transformers_writes_of_a_trained_type_is_accepted(never_asked):
    for model_type in sorted(TRAINED):
        config = small_config(model_type)
        shape = ModelShape.of(config.to_dict())
        assert refusals.architecture_problems(config.to_dict(), FILE) == [], model_type
        assert (shape.hidden_size, shape.num_layers, shape.num_heads) == (32, 2, 4), model_type


def test_a_check_of_a_folder_imports_no_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "gptj"}))
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from posttrain_dist.models.folder import check_folder\n"
        "try:\n    check_folder(Path(sys.argv[1]), need_weights=False)\n"
        "except Exception as error:\n    print(error)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "gptj computes attention by code of its own" in printed
    assert printed.splitlines()[-1] == "False False"


def test_other_types_are_those_that_transformers_has(monkeypatch):
    import transformers.models.auto.modeling_auto as table

    found = native_types.native("trocr")
    assert found == native_types.Native(True, True, transformers.__version__)
    monkeypatch.delitem(sys.modules, table.__name__)  # a process of its own says the same
    native_types.native.cache_clear()
    assert native_types.native("trocr") == found
    monkeypatch.undo()
    assert problems(model_type="trocr") == []  # in neither part of the table
    assert problems(model_type="trocr", auto_map={"AutoConfig": "x.Y"}) == []
    (problem,) = problems(model_type="clip")
    assert "transformers has none of the type clip" in problem
    (problem,) = problems(model_type="chatglm")
    assert f"transformers {transformers.__version__} has no model type chatglm" in problem
    assert "update transformers" in problem
    own = {"auto_map": {"AutoConfig": "x.Y"}, "architectures": ["ChatGLMModel"]}
    (problem,) = problems(model_type="chatglm", **own)
    assert "needs Python code of its own (auto_map)" in problem and "never run" in problem


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({"logit_scale": "large"}, "holds a size that is none: could not convert"),
        ({"per_layer_config": [1]}, "holds a size that is none: 'list' object"),
        ({"architectures": ["LlamaModel"]}, "not a causal LM: its architecture is LlamaModel"),
        ({"use_bidirectional_attention": True}, "attends in both directions"),
    ],
)
def test_sizes_and_settings_of_a_known_type_are_read(change, part, never_asked):
    (problem,) = problems(model_type="llama", **change)
    assert problem.startswith(f"{FILE}: ") and part in problem


def test_code_in_the_folder_of_a_known_type_is_left_alone(tmp_path, tiny_llama):
    from contextlib import nullcontext

    from posttrain_dist.models.load import load_model

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "was_run"
    (folder / "own.py").write_text(
        f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    options: dict[str, Any] = {"dtype": torch.float32, "seed": 0, "materialise": nullcontext()}
    model = load_model(ModelConfig(path=str(folder)), folder, **options)
    assert type(model) is transformers.LlamaForCausalLM
    assert not marker.exists()


# --------------------------------------------------------------------------------- longest rows


@pytest.mark.parametrize(
    ("config", "limit", "why"),
    [
        ({"model_type": "gpt2", "n_positions": 1024}, 1024, "learned 1024 positions"),
        ({"model_type": "opt", "max_position_embeddings": 64}, 64, "learned 64 positions"),
        (
            {
                "model_type": "phi3",
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0]},
            },
            4096,
            "longrope positions change with the longest sample of a pack",
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 512,
                "rope_parameters": {"full_attention": {"rope_type": "dynamic"}},
            },
            512,
            "dynamic positions change",
        ),
    ],
)
def test_rows_that_the_positions_do_not_reach_are_refused(config, limit, why):
    check_row_length(config, limit)
    with pytest.raises(ConfigError, match=f"is {limit + 1}, and .*{why}") as caught:
        check_row_length(config, limit + 1)
    assert (caught.value.where, caught.value.fix) == (
        "data.max_length",
        f"set data.max_length={limit} or less",
    )


def test_only_some_kinds_of_rope_end_at_a_length():
    """The same config, with a kind that changes with the length of a row and one that does not."""
    found = {}
    for kind in ("yarn", "dynamic"):
        rope = {"rope_type": kind, "factor": 2.0}
        config = {"model_type": "llama", "max_position_embeddings": 64, "rope_scaling": rope}
        try:
            check_row_length(config, 65)
            found[kind] = "any"
        except ConfigError as error:
            found[kind] = error.fix
    assert found == {"yarn": "any", "dynamic": "set data.max_length=64 or less"}


@pytest.mark.parametrize("model_type", sorted(LEARNED_POSITIONS))
def test_learned_positions_are_as_many_as_the_key_says(model_type):
    config = small_config(model_type)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    longest = getattr(config, LEARNED_POSITIONS[model_type])

    def runs(length: int) -> torch.Tensor:
        return model(input_ids=torch.full((1, length), 7), use_cache=False).logits

    assert bool(runs(longest).isfinite().all())
    with pytest.raises(IndexError):
        runs(longest + 1)


# ----------------------------------------------------------------------------- before a run folder


def config_of(folder: Path, rows_file: Path, tmp_path: Path, **data: Any) -> RunConfig:
    data = {"max_length": 64, "cache": str(tmp_path / "cache"), **data}
    return RunConfig(
        model=ModelConfig(path=str(folder)),
        data=DataConfig(train=str(rows_file), **data),
        train=TrainConfig(steps=1, batch_size=2),
        logging=LoggingConfig(wandb=WandbMode.off),
    )


@pytest.fixture
def gptj(tmp_path: Path, builders: Any) -> Path:
    folder = tmp_path / "gptj"
    builders.tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_config(small_config("gptj"))
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    return folder


def test_a_refused_architecture_leaves_nothing_behind(gptj, rows_file, tmp_path):
    config = config_of(gptj, rows_file, tmp_path)
    with pytest.raises(ModelError, match="gptj computes attention by code of its own"):
        run(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    (problem,) = input_problems(config)  # what a command looks at first
    assert "gptj computes attention" in str(problem)


def test_rows_that_are_too_long_leave_nothing_behind(tiny_llama, rows_file, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    pairs = config["hidden_size"] // config["num_attention_heads"] // 2
    factors = {name: [1.0] * pairs for name in ("short_factor", "long_factor")}
    config["rope_scaling"] = {
        "type": "longrope",
        "original_max_position_embeddings": 16,
        **factors,
    }
    (folder / "config.json").write_text(json.dumps(config))
    given = config_of(folder, rows_file, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.max_length: is 64, and above 16 tokens"):
        run(given, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    (problem,) = input_problems(given)
    assert "data.max_length: is 64" in str(problem)


def test_an_unknown_architecture_that_dies_is_named(gptj, rows_file, tmp_path, monkeypatch):
    monkeypatch.delitem(REFUSED, "gptj")
    with pytest.raises(ModelError, match=r"GPTJForCausalLM cannot be loaded: ValueError: GPTJ"):
        run(config_of(gptj, rows_file, tmp_path), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_failures_of_files_and_memory_keep_their_names():
    for error in (torch.OutOfMemoryError("full"), FileNotFoundError("gone"), ModelError("bad")):
        with pytest.raises(type(error)) as caught, named_failures("X", "loaded"):
            raise error
        assert caught.value is error
    died = pytest.raises(ModelError, match="X cannot be loaded: KeyError: 'size'")
    with died as found, named_failures("X", "loaded"):
        raise KeyError("size")
    assert found.value.where == "model.path" and isinstance(found.value.__cause__, KeyError)
