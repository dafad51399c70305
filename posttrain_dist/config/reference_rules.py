"""Which reference a run has, by its config alone; and what must hold for it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain_dist.config.run_config import RunConfig
from posttrain_dist.errors import ConfigError, PosttrainError, Rule
from posttrain_dist.flow import By
from posttrain_dist.models import Weights
from posttrain_dist.models.folder import check_folder, load_tokenizer, read_shape, resolve
from posttrain_dist.objectives.reference_choice import Reference, Referenced
from posttrain_dist.tuning.auto import AutoTuning
from posttrain_dist.tuning.base import Quantize

_KEY, _MODEL = "objective.reference", "objective.reference_model"
_OTHERS = "use objective.reference=auto, precomputed or frozen"


def chosen_reference(config: RunConfig) -> Reference:
    """How the run has the log-probabilities of its reference; `auto` is settled.

    The reference of `auto` is the model that training starts with: the base by switching the
    adapter off, where that is the same to the last bit, else by a pass before step 1.
    """
    objective, tuning = config.objective, config.tuning
    assert isinstance(objective, Referenced)
    if objective.reference is not Reference.auto:
        return objective.reference
    named = objective.reference_model is not None and not _names_start(config)
    if not named and tuning.begins_as_base and not _unrestorable(config):
        return Reference.adapter_off
    return Reference.precomputed


def is_start(config: RunConfig) -> bool:
    """Whether the reference is the model that training starts with."""
    objective = config.objective
    assert isinstance(objective, Referenced)
    if chosen_reference(config) is Reference.adapter_off:
        return config.tuning.begins_as_base
    return objective.reference_model is None or _names_start(config)


def _names_start(config: RunConfig) -> bool:
    """Whether `reference_model` is the model folder, and training starts with what it holds."""
    objective, model = config.objective, config.model
    assert isinstance(objective, Referenced)
    if objective.reference_model is None or model.weights is Weights.random or model.add_tokens:
        return False
    quantize = getattr(config.tuning, "quantize", Quantize.none)
    same = Path(objective.reference_model).resolve() == Path(model.path).resolve()
    return same and config.tuning.begins_as_base and quantize is Quantize.none


def reference_line(config: RunConfig) -> str:
    """Which reference is meant and how it is had, for the first lines of a run."""
    objective, choice = config.objective, chosen_reference(config)
    assert isinstance(objective, Referenced)
    base = config.model.path
    continued = getattr(config.tuning, "init_from", None)
    if not is_start(config) and objective.reference_model is not None:
        what = f"{objective.reference_model}, not what training starts with"
    elif choice is Reference.adapter_off:
        what = f"the base model {base}"
        if not config.tuning.begins_as_base:
            what += (
                ", not what training starts with"
                if continued is None
                else (f" without the adapter {continued} that training starts with")
            )
    elif continued is not None:
        what = f"{base} with the adapter {continued}, which training starts with"
    else:
        what = f"{base}, which training starts with"
    how = {
        Reference.precomputed: "by a pass over the samples before step 1",
        Reference.adapter_off: "by switching the adapter off in every step",
        Reference.frozen: "by a second copy in every step",
    }[choice]
    return f"the reference is {what}; its log-probabilities come {how} ({_KEY}={choice.name})"


def reference_rules(config: RunConfig) -> list[Rule]:
    """What must hold between the reference and the rest of a run."""
    objective, tuning = config.objective, config.tuning
    if not isinstance(objective, Referenced):
        return []
    off = objective.reference is Reference.adapter_off
    unrestorable = _unrestorable(config)
    continued = getattr(tuning, "init_from", None)
    return [
        Rule(
            not (off and unrestorable),
            _KEY,
            f"is adapter_off, and this tuning {unrestorable}: without it the base model is not "
            "there",
            _OTHERS,
        ),
        Rule(
            objective.reference_model is None or objective.reference_model != continued,
            _MODEL,
            f"is {objective.reference_model}, the adapter that is trained on: it cannot be its own "
            "reference",
            "leave it out: with objective.reference=auto the reference is what training starts "
            "with, that adapter as it is now; objective.reference=adapter_off is the base without "
            "it",
        ),
        Rule(
            tuning.copies == 1,
            "tuning.ensemble",
            f"is {tuning.copies}, and objective={objective.name} compares one policy with its "
            "reference",
            "set tuning.ensemble=1",
        ),
    ]


def reference_alone_problems(config: RunConfig) -> list[PosttrainError]:
    """Why a model folder cannot be evaluated by the objective of a config, without a training."""
    needed = [field.name for field in config.objective.extra if field.by is By.model]
    if not needed:
        return []
    return [
        ConfigError(
            f"{config.objective.name} compares a model with its reference ({needed[0]}), and of a "
            "model folder alone nobody knows which that is",
            where="objective",
            fix="read eval/... in metrics.jsonl of the run that trained it, or evaluate with an "
            "objective without a reference, such as objective=simpo on the same rows",
        )
    ]


def _run_of(adapter: Path) -> str:
    """The run folder that an adapter lies in, where it does."""
    return str(adapter.parent) if (adapter.parent / "config.yaml").is_file() else "RUN"


def check_named_reference(config: RunConfig) -> None:
    """See that the reference that is named, if one is, is a model with the policy's tokens.

    Raises:
        ConfigError: it is an adapter, or has another tokenizer.
        ModelError: it has no tokenizer.
    """
    objective = config.objective
    if not isinstance(objective, Referenced) or objective.reference_model is None:
        return
    continued = getattr(config.tuning, "init_from", None)
    if objective.reference_model == continued:
        return  # `reference_rules` refuses it
    folder = Path(objective.reference_model).expanduser()
    if (folder / "adapter_config.json").is_file():
        own = continued is not None and Path(continued).resolve() == folder.resolve()
        raise ConfigError(
            f"{folder} is an adapter"
            + (", the one that is trained on: it cannot be its own reference" if own else ""),
            where=_MODEL,
            fix="leave it out: the reference is then what training starts with"
            if own
            else f"make one model of it and its base first: posttrain export {_run_of(folder)} OUT "
            "--merge, then objective.reference_model=OUT",
        )
    named = resolve(objective.reference_model)
    check_folder(named)
    own_ids = _ids(resolve(config.model.path), config.model.add_tokens)
    ids = _ids(named, ())
    if ids != own_ids:
        every = {**ids, **own_ids}
        differ = [token for token in every if ids.get(token) != own_ids.get(token)]
        differ.sort(key=lambda token: (every[token], token))
        raise ConfigError(
            f"{named} has another tokenizer than the policy: {len(differ)} tokens differ, such as "
            f"{differ[0]!r}, {_said(own_ids.get(differ[0]))} of the policy and "
            f"{_said(ids.get(differ[0]))} of the reference",
            where=_MODEL,
            fix="name a model with the same tokenizer, such as the one that the policy was made of",
        )
    vocab_size = read_shape(str(named)).vocab_size
    if own_ids and max(own_ids.values()) >= vocab_size:
        raise ConfigError(
            f"{named} has a vocab_size of {vocab_size}, and the tokenizer gives ids up to "
            f"{max(own_ids.values())}",
            where=_MODEL,
            fix="name a model that has embeddings of all of these tokens",
        )


def _ids(folder: Path, add_tokens: Sequence[str]) -> dict[str, int]:
    """Token -> id of a tokenizer, of its special ones too."""
    backend = load_tokenizer(folder, add_tokens=add_tokens).backend_tokenizer
    found: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    return found


def _said(token_id: int | None) -> str:
    return "no token" if token_id is None else f"id {token_id}"


def _unrestorable(config: RunConfig) -> str:
    """Why the policy without its adapter is not the base model; empty if it is."""
    if isinstance(config.tuning, AutoTuning):
        return "is chosen later (tuning=auto)"
    if not config.tuning.unrestorable and config.model.add_tokens:
        return "trains the rows of added tokens (model.add_tokens)"
    return config.tuning.unrestorable
