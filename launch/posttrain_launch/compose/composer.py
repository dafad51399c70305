"""From overrides on the command line to one RunConfig, by Hydra.

The dataclasses of `posttrain_dist.config` are the schemas; the YAML files of `conf/` choose
among them and hold differences only. Hydra composes and does nothing else.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from posttrain_dist.config import GROUPS, RunConfig
from posttrain_dist.errors import ConfigError
from posttrain_launch.compose.formulas.relations import resolve_relations, without_relations
from posttrain_launch.sweep.kinds import register_launchers
from posttrain_launch.sweep.search.options import register_sweepers

CONF = "pkg://posttrain_launch.conf"
CONF_FOLDER = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True, slots=True)
class Composed:
    """One configuration, with what it was made of."""

    config: RunConfig  # not yet completed: `posttrain_dist.config.complete` checks it
    choices: dict[str, str]  # group -> chosen option
    overrides: list[str]  # as typed
    sweeps: bool = False  # whether hydra.mode=MULTIRUN asks for several runs


def register_schemas(help_text: str = "") -> None:
    """Give Hydra the dataclasses, and the page of `posttrain <verb> --help`.

    Args:
        help_text: a template in which `$CONFIG` stands for the composed config.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=_schema(RunConfig))
    for group, options in GROUPS.items():
        for kind, option in options.items():
            store.store(group=f"schema/{group}", name=kind, node=_schema(option))
    page = {"app_name": "posttrain", "header": "", "footer": "", "template": help_text}
    store.store(group="hydra/help", name="posttrain", node=page)
    register_launchers()
    register_sweepers()


def _schema(option: type) -> DictConfig:
    """A dataclass as OmegaConf has it; a field that is a dict takes any key."""
    schema: DictConfig = OmegaConf.structured(option)
    _open_dicts(schema)
    return schema


def _open_dicts(node: DictConfig) -> None:
    for name in node:
        value = node._get_node(name)
        if isinstance(value, DictConfig):
            if OmegaConf.get_type(value) is dict:
                OmegaConf.set_struct(value, False)
            else:
                _open_dicts(value)


class _CachingLoader(ConfigLoaderImpl):
    """Composes the same request once, relations resolved: what is checked is shown, or run."""

    def __init__(self, path: ConfigSearchPath) -> None:
        super().__init__(path)
        self._request: tuple[Any, ...] = ()
        self._composed: DictConfig

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        request = (config_name, list(overrides), run_mode, from_shell, validate_sweep_overrides)
        if request != self._request:
            self._composed = self._load(request)
            self._request = request
        return copy.deepcopy(self._composed)  # those who show it take parts out

    def _load(self, request: tuple[Any, ...]) -> DictConfig:
        config_name, overrides, run_mode, *rest = request

        def compose(words: list[str]) -> DictConfig:
            loaded: DictConfig = super(_CachingLoader, self).load_configuration(
                config_name, words, run_mode, *rest
            )
            return loaded

        if run_mode is RunMode.RUN:
            return compose(resolve_relations(overrides, compose))
        # What a sweep has in common; its trials resolve what follows from their own values.
        plain = without_relations(overrides, compose)
        config = compose(plain)
        if plain != overrides:
            of_hydra = list(config.hydra.overrides.hydra)
            config.hydra.overrides.task = [word for word in overrides if word not in of_hydra]
        return config


class Composer:
    """Composes configurations in this process.

    Args:
        config_dir: the user's own folder of YAML.
        config_path: takes the place of our YAML (Hydra's --config-path).
        config_name: the file to begin with.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(
        self,
        config_dir: str | None = None,
        config_path: str | None = None,
        config_name: str | None = None,
    ) -> None:
        version.setbase("1.3")
        register_schemas()
        self.config_name = config_name or "config"
        self.config_dir = None if config_dir is None else Path(config_dir).absolute()
        path = create_automatic_config_search_path(None, __name__, config_path or CONF)
        if self.config_dir is not None:
            if not self.config_dir.is_dir():
                raise ConfigError(
                    f"there is no folder {self.config_dir}",
                    where="--config-dir",
                    fix="give a folder that holds your YAML, for instance the one with experiment/",
                )
            path.prepend("command-line", f"file://{self.config_dir}", SearchPathQuery("schema"))
        GlobalHydra.instance().clear()
        self.hydra = Hydra("posttrain", _CachingLoader(path))
        GlobalHydra.instance().initialize(self.hydra)

    def compose(self, overrides: list[str]) -> DictConfig:
        """The composed config, with Hydra's own part below `hydra`. Raises what Hydra raises."""
        return self.hydra.compose_config(
            config_name=self.config_name,
            overrides=list(overrides),
            run_mode=RunMode.RUN,
            with_log_configuration=False,
        )

    def options(self, group: str) -> list[str]:
        """The options of a group, those of the user's folder included."""
        loader = self.hydra.config_loader
        return sorted(loader.get_group_options(group))

    def groups(self) -> list[str]:
        """Every group that has an option, ours and the user's."""
        listed: list[str] = self.hydra.config_loader.list_groups("")
        return [g for g in sorted(listed) if g not in ("hydra", "schema") and self.options(g)]

    def file_of(self, group: str, option: str) -> Path | None:
        """The YAML file behind an option."""
        for folder in (self.config_dir, CONF_FOLDER, _source_conf()):
            if folder is not None and (path := folder / group / f"{option}.yaml").is_file():
                return path
        return None

    def close(self) -> None:
        """Leave Hydra as it was before."""
        GlobalHydra.instance().clear()

    def __enter__(self) -> Composer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _source_conf() -> Path | None:
    """The folder of the package `posttrain_launch.conf`, which an editable install maps away."""
    import importlib.util

    spec = importlib.util.find_spec("posttrain_launch.conf")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def without_hydra(config: DictConfig) -> DictConfig:
    """The part of a composed config that is ours."""
    with open_dict(config):
        config.pop("hydra", None)
    return config


def to_composed(config: DictConfig, hydra: DictConfig) -> Composed:
    """Turn what Hydra composed into dataclasses. Raises OmegaConf's errors."""
    chosen: dict[str, str] = OmegaConf.to_container(hydra.runtime.choices)  # type: ignore[assignment]
    choices = {k: v for k, v in chosen.items() if not k.startswith(("hydra", "schema"))}
    run_config: Any = OmegaConf.to_object(config)
    sweeps = hydra.mode is RunMode.MULTIRUN
    return Composed(run_config, choices, list(hydra.overrides.task), sweeps)
