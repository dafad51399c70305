"""`posttrain plan` as it is typed: answers, exit codes, files, refusals; auto before a run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from planned_runs import OFFLOAD, WIDE, needs, room, wide_model
from posttrain_launch.cli import main

from posttrain_dist.config import RunConfig

NODE = ["hardware=h100x8", "data.max_length=2048", "train.batch_size=16"]
SMALL = [*NODE, "hardware.gpus_per_node=4"]


def model():
    return f"model.path={wide_model()}"


def plan(*words):
    return main(["plan", model(), *words])


def asked_json(capsys, *words):
    code = plan(*words, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_what_was_not_typed_is_the_first_that_fits(capsys):
    second = [*SMALL, f"hardware.gpu_memory_gib={room('full ZeRO-2')['gib']}"]
    assert plan(*second) == 0
    shown = capsys.readouterr().out
    first, reason = shown.splitlines()[:2]
    assert first == "full ZeRO-2: the first fallback that fits"
    assert reason.startswith("  not full ZeRO-1: ") and " GiB are missing on a GPU of " in reason
    # The command trains the same: it is planned as itself, and fits with the same bytes.
    command = shown.splitlines()[-1].split()
    assert command[:2] == ["posttrain", "train"] and "cluster=ray" in command
    assert "tuning=full" in command and "engine=zero2" in command
    _, auto = asked_json(capsys, *second)
    assert main(["plan", *command[2:], "--json"]) == 0
    named = json.loads(capsys.readouterr().out)["plan"]
    assert named["device"] == auto["plan"]["device"]


def test_the_exit_code_says_whether_it_fits(capsys):
    full = [*SMALL, "tuning=full", "engine=zero1"]
    assert plan(*full, "hardware.gpu_memory_gib=20") == 0
    assert plan(*full, f"hardware.gpu_memory_gib={room(OFFLOAD)['gib']}") == 1
    shown = capsys.readouterr().out
    assert "what fits is full ZeRO-3 + CPU offload\n  posttrain train " in shown
    assert plan(*SMALL, "hardware.gpu_memory_gib=1.5") == 1
    assert "no fallback fits; nearest is QLoRA + paged optimizer" in capsys.readouterr().err


def test_all_fallbacks_stand_in_one_table(capsys):
    words = [
        *SMALL,
        f"hardware.gpu_memory_gib={room(OFFLOAD)['gib']}",
        "tuning=full",
        "engine=zero1",
    ]
    assert plan(*words, "--all") == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].startswith("full, ZeRO-1") and " no " in rows[1]
    assert [row for row in rows if row.startswith("full ZeRO-3 +") and " chosen " in row]
    assert [row for row in rows if row.startswith("QLoRA") and " fits " in row]


def test_an_inverse_answer_comes_with_its_command(capsys):
    words = [
        *SMALL,
        f"hardware.gpu_memory_gib={2 * needs()['LoRA']}",
        "tuning=lora",
        "engine=zero1",
    ]
    assert plan(*words, "--largest", "data.max_length") == 0
    shown = capsys.readouterr().out
    command = shown.splitlines()[-1].split()
    (typed,) = [word for word in command if word.startswith("data.max_length=")]
    assert main(["plan", *command[2:]]) == 0
    length = int(typed.partition("=")[2])
    longer = [w.replace(typed, f"data.max_length={length + 128}") for w in command[2:]]
    assert main(["plan", *longer]) == 1
    capsys.readouterr()
    assert plan(*NODE, "tuning=full", "engine=zero3", "--fewest=gpus", "--json") == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["value"] == answer["plan"]["workers"] == 1


def test_a_page_and_json_are_written_where_they_are_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan(*SMALL, "--html", "--json", "out.json") == 0
    assert "full ZeRO-1: the first fallback that fits" in capsys.readouterr().out
    assert "<html" in (tmp_path / "plan.html").read_text()
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["plan"]["fits"] and content["choice"]["chosen"] == "full ZeRO-1"
    assert plan(*SMALL, "--html", "both.html", "--json") == 0
    assert json.loads(capsys.readouterr().out) and (tmp_path / "both.html").is_file()
    assert plan(*SMALL, "--html", "no/such/folder.html") == 2
    assert "no/such/folder.html: cannot be written" in capsys.readouterr().err


def test_nodes_are_those_of_a_job(capsys):
    code, found = asked_json(capsys, *NODE, "cluster.nodes=2", "train.batch_size=32")
    assert code == 0 and (found["plan"]["workers"], found["plan"]["nodes"]) == (16, 2)
    assert plan(*NODE, "cluster.nodes=2", "train.batch_size=32") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["posttrain", "submit"]


BAD = {
    "no GPU": (["hardware.gpus_per_node=0"], "hardware.gpus_per_node: is 0"),
    "an unknown GPU": (["hardware.gpu=h9000"], "hardware.gpu: is h9000"),
    "too long": (["data.max_length=131072"], "data.max_length: lets through samples of 131072"),
    "no question": (["--largest", "optimizer.lr"], "--largest: optimizer.lr is not among"),
    "no value": (["--fewest"], "--fewest: needs a value"),
    "no count": (["--fewest", "nodes"], "--fewest: nodes is not what can be counted"),
    "two questions": (["--fewest", "gpus", "--largest", "tuning.rank"], "--fewest: stands beside"),
    "a page": (["--fewest=gpus", "--html", "a.html"], "--html: draws one plan, and no answers"),
    "no shape": (["model.path=shape:gpt-9"], "no shape has the name 'gpt-9'"),
    "GPUs of nothing": (
        ["hardware=cpu", "hardware.gpus_per_node=4"],
        "hardware.gpus_per_node: is 4",
    ),
    "its memory": (["hardware=cpu", "hardware.gpu_memory_gib=8"], "hardware.gpu_memory_gib: is"),
    "no rank": (["tuning=full", "--largest=tuning.rank"], "--largest: asks for the rank of full"),
    "one process": (["engine=single", "cluster.nodes=2"], "engine: single runs in one process"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_exit_code_2(case, capsys):
    words, message = BAD[case]
    assert plan(*NODE, *words) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "\n  fix: " in shown.err and not shown.out
    assert shown.err.count("error: ") == 1


def test_a_plan_wants_a_model(capsys):
    assert main(["plan", *NODE]) == 2
    shown = capsys.readouterr().err
    assert "model.path: is not set" in shown and shown.count("error: ") == 1


def test_a_plan_that_breaks_does_not_say_that_the_run_does_not_fit(monkeypatch, capsys):
    def breaks(*args, **kwargs):
        raise AttributeError("of the program")

    monkeypatch.setattr("posttrain_launch.commands.cluster.plan.find_machine", breaks)
    assert plan(*NODE) == 2
    assert "AttributeError: of the program" in capsys.readouterr().err


def test_where_nothing_fits_nothing_is_chosen(capsys):
    assert plan(*SMALL, "hardware.gpu_memory_gib=1.5", "--all") == 1
    shown = capsys.readouterr().out
    assert " no " in shown and "chosen" not in shown and " fits " not in shown.splitlines()[1]


def test_the_command_of_a_job_has_all_that_a_job_wants(capsys):
    words = [*NODE, "tuning=full", "engine=zero3", "train.steps=10"]
    assert plan(*words, "cluster.nodes=2") == 0
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:2] == ["posttrain", "submit"] and "cluster.time=1:00:00" in command
    assert plan(*words, "cluster.nodes=2", "cluster.time=8:00:00") == 0
    typed = capsys.readouterr().out.splitlines()[-1].split()
    assert [word for word in typed if word.startswith("cluster.time")] == ["cluster.time=8:00:00"]
    # More GPUs than a node has are those of a job, though none was typed.
    few = ["hardware.gpus_per_node=1", "hardware.gpu_memory_gib=7", "data.max_length=512"]
    assert plan(*words, *few, "--fewest=gpus") == 0
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:2] == ["posttrain", "submit"] and "cluster=slurm" in command
    assert [word for word in command if word.startswith("cluster.time=")]


WARNED = {
    "idle workers": (["train.batch_size=2"], "2 packs for 4 workers: 2 only wait"),
    "uneven": (["train.batch_size=5"], "5 packs of a step do not divide by 4 workers"),
    "a micro-batch": (["train.micro_batch_size=16"], "micro_batch_size is 16, and a rank has 4 of"),
    "one GPU of four": (["cluster=local", "engine=single"], "1 of 4 GPUs works"),
    "nodes of nobody": (["cluster=ray", "cluster.workers=8"], "8 workers take more nodes than"),
    "a CPU": (["hardware=cpu", "engine=single", "cluster=local"], "times are rough"),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_is_wasted_is_said(case, capsys):
    words, warning = WARNED[case]
    node = [word for word in SMALL if case != "a CPU" or not word.startswith("hardware")]
    typed = words if "engine=single" in words else [*words, "engine=zero1"]
    _, found = asked_json(capsys, *node, "tuning=lora", *typed)
    warnings = found["plan"]["warnings"]
    assert [each for each in warnings if warning in each], warnings


CONFIGS = {
    "MoE": ({"num_local_experts": 8}, "is a mixture-of-experts model (num_local_experts)"),
    "multimodal": ({"vision_config": {"a": 1}}, "is a multimodal model (vision_config)"),
    "no size": ({"hidden_size": None}, "has no hidden_size"),
    "classifier": ({"architectures": ["LlamaForTokenClassification"]}, "is not a causal LM"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights, by gptq"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_model_that_cannot_be_planned_is_named(case, tmp_path, capsys):
    change, message = CONFIGS[case]
    values = {key: value for key, value in {**WIDE, **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["plan", f"model.path={tmp_path}", *NODE]) == 2
    shown = capsys.readouterr().err
    assert message in shown and str(tmp_path / "config.json") in shown


def test_a_plan_needs_neither_torch_nor_transformers():
    """Nor any file of the model but config.json."""
    program = (
        "import json, sys\nfrom posttrain_launch.cli import main\n"
        "codes = [main(words) for words in json.loads(sys.argv[1])]\n"
        "names = ('torch', 'transformers', 'peft', 'deepspeed', 'numpy')\n"
        "heavy = [name for name in names if name in sys.modules]\n"
        "assert (set(codes), heavy) == ({0}, []), (codes, heavy)\n"
    )
    base = ["plan", model(), *NODE]
    asked = [[*base, *more] for more in ([], ["--all"], ["--html", "/dev/null"])]
    command = [sys.executable, "-c", program, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------- before a run


@pytest.fixture
def job(tmp_path, rows_file, tiny_llama, capsys):
    """submit(*words): the exit code and what a dry run printed."""
    words = ["submit", f"model.path={tiny_llama}", f"data.train={rows_file}", "data.max_length=64"]
    words += [f"output_root={tmp_path / 'out'}", "cluster.nodes=1", "cluster.time=1:00:00"]

    def submit(*more):
        code = main([*words, *more, "--dry-run"])
        return code, capsys.readouterr()

    submit.folders = lambda: sorted((tmp_path / "out" / "run").glob("2*"))
    return submit


def test_a_job_that_cannot_fit_is_refused_unless_it_is_forced(job):
    words = ["hardware=h100x8", "hardware.gpu_memory_gib=0.5", "tuning=full", "engine=zero1"]
    code, shown = job(*words)
    assert code == 2 and not job.folders()
    assert "tuning: full, ZeRO-1 cannot fit: " in shown.err and "on a GPU of 0.5" in shown.err
    assert "--force" in shown.err
    code, shown = job(*words, "--force")
    assert code == 0 and "#SBATCH --gpus-per-node=8" in shown.out
    assert len(job.folders()) == 1


def test_auto_is_forced_too(job):
    words = ["hardware=h100x8", "hardware.gpu_memory_gib=0.4", "tuning=auto", "engine=auto"]
    code, shown = job(*words)
    assert code == 2 and "no fallback fits" in shown.err and not job.folders()
    code, _ = job(*words, "--force")
    assert code == 0 and len(job.folders()) == 1


def test_a_job_of_unknown_nodes_goes_on_and_says_so(job):
    code, shown = job("cluster.gpus_per_node=8", "engine=zero1")
    assert code == 0 and "not planned: hardware does not say what the nodes have" in shown.err


def test_auto_is_settled_before_the_job_is_written(job):
    words = ["tuning=auto", "engine=auto", "optimizer.lr=3e-6", "hardware=h100x8"]
    code, shown = job(*words)
    assert code == 0 and "planned: full ZeRO-1 (tuning=full " in shown.err
    (folder,) = job.folders()
    config = RunConfig.from_yaml((folder / "config.yaml").read_text())
    assert (config.engine.stage, config.optimizer.lr, config.train.rehearse) == (1, 3e-6, True)
    assert "tuning: auto" in (folder / "config.yaml").read_text()  # of the choices, for readers
    lineage = json.loads((folder / "run.json").read_text())["plan"]
    assert lineage["chosen"] == "full ZeRO-1" and lineage["reasons"] == []
    assert json.loads((folder / "plan.json").read_text())["plan"]["fits"]


def test_auto_without_a_machine_to_plan_for_is_refused(job):
    code, shown = job("tuning=auto", "engine=auto", "cluster.gpus_per_node=8")
    assert code == 2 and "hardware: does not say what the nodes have" in shown.err


def test_a_job_is_planned_with_the_data_that_is_prepared_as_plan_does(
    job, tiny_llama, rows_file, capsys
):
    """A named tuning and engine too: rows of many short samples hold more virtual tokens."""
    words = [f"model.path={tiny_llama}", f"data.train={rows_file}", "data.max_length=64"]
    words += ["hardware=h100x8", "tuning=prompt", "tuning.tokens=64", "engine=zero1"]
    words += ["cluster=slurm", "cluster.nodes=1", "cluster.time=1:00:00"]
    assert main(["prepare", *words[:3]]) == 0
    capsys.readouterr()
    assert main(["plan", *words, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["plan"]
    assert job(*words[3:])[0] == 0
    (folder,) = job.folders()
    frozen = json.loads((folder / "plan.json").read_text())["plan"]
    assert frozen["device"] == planned["device"]
