"""A Hugging Face model folder on disk: found, and checked before anything is loaded. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from posttrain_dist.errors import ModelError, PosttrainError, raise_all
from posttrain_dist.models.architectures.refusals import architecture_problems
from posttrain_dist.models.architectures.shape_files import PREFIX, refuse_shape, shape_folder
from posttrain_dist.models.network.build_network import build_network
from posttrain_dist.models.network.tensors import Network
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.models.tokenizer import ModelTokenizer, read_tokenizer
from posttrain_dist.models.tokenizer.new_tokens import grown_vocab_size, new_ids, with_tokens

TINY_BASE = "tiny_base"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Of config.json, what changes no network: how it is stored, who wrote it, a cache of generation,
# code that is never run.
NO_NETWORK = frozenset(
    {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache", "auto_map"}
)

_CONVERT = (
    "convert them once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
)


def resolve(path: str) -> Path:
    """Absolute folder of a model; `tiny_base` and `shape:NAME` come with the package.

    Raises:
        ModelError: there is no such folder, or shape.
    """
    if path == TINY_BASE:
        return Path(__file__).resolve().parent.parent / "assets" / TINY_BASE
    if path.startswith(PREFIX):
        return shape_folder(path)
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise ModelError(
            "there is no such model folder",
            where=str(folder),
            fix="set model.path to a folder with config.json, tokenizer.json and *.safetensors, or "
            "to tiny_base; a model of the hub is not downloaded: `hf download OWNER/NAME "
            "--local-dir FOLDER` does that",
        )
    return folder


def check_folder(path: Path, need_weights: bool = True) -> dict[str, Any]:
    """The folder's config.json, after every check that needs no weight in memory.

    A folder is checked once a process, as long as no file of it changes; nobody may change the
    dict.

    Raises:
        ModelError, SeveralErrors: all that is wrong with the folder, together.
    """
    if not path.is_dir():
        raise ModelError(
            "there is no such model folder", where=str(path), fix="check the path of the model"
        )
    state = _state(path)
    config, found = _read_config(path, state)
    raise_all([*found, *(_weight_problems(path, state) if need_weights else [])])
    return config


def network_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a model's config.json decides the network."""
    return {key: value for key, value in sorted(config.items()) if key not in NO_NETWORK}


def read_shape(path: str, add_tokens: Sequence[str] = ()) -> ModelShape:
    """The sizes of the model that `model.path` names, from its config.json.

    Args:
        add_tokens: `model.add_tokens`, for which its vocabulary grows.

    Raises:
        ModelError, SeveralErrors: what is wrong with the folder, or the size that is missing.
        ConfigError: the tokenizer has one of the tokens.
    """
    folder = resolve(path)
    config = grown_config(folder, check_folder(folder, need_weights=False), add_tokens)
    return ModelShape.of(config, str(folder / "config.json"))


def read_network(path: str, add_tokens: Sequence[str] = ()) -> Network:
    """Every parameter of the model that `model.path` names, from its config.json.

    Args:
        add_tokens: `model.add_tokens`, for which its vocabulary grows. Without a tokenizer nobody
            knows how many rows of its embeddings are free: at worst none.

    Raises:
        ModelError, SeveralErrors: what is wrong with the folder, or the size that is missing.
        ConfigError: the tokenizer has one of the tokens.
    """
    folder = resolve(path)
    check_folder(folder, need_weights=False)
    return _build_network(folder, _state(folder), tuple(add_tokens))


@lru_cache(maxsize=2)  # the policy's, and a reference's
def _build_network(
    folder: Path, state: tuple[tuple[str, int, int], ...], add_tokens: tuple[str, ...]
) -> Network:
    """Of a folder that was checked: once, for who plans reads it many times."""
    config, where = check_folder(folder, need_weights=False), str(folder / "config.json")
    if has_tokenizer(folder):
        config = grown_config(folder, config, add_tokens)
    elif add_tokens:
        size = ModelShape.of(config, where).vocab_size + len(add_tokens)
        config = {**config, "vocab_size": size}
    return build_network(config, where)


def grown_config(
    folder: Path, config: dict[str, Any], add_tokens: Sequence[str], cache: Path | None = None
) -> dict[str, Any]:
    """A folder's config.json with the vocabulary that `model.add_tokens` makes of it."""
    if not add_tokens:
        return config
    size = ModelShape.of(config, str(folder / "config.json")).vocab_size
    ids = read_added_ids(folder, add_tokens, cache)
    return {**config, "vocab_size": grown_vocab_size(size, ids)}


def read_added_ids(folder: Path, add_tokens: Sequence[str], cache: Path | None = None) -> list[int]:
    """Ids of `model.add_tokens`."""
    if not add_tokens:
        return []
    return new_ids(load_tokenizer(folder, cache, add_tokens), add_tokens)


def load_tokenizer(
    folder: Path, cache: Path | None = None, add_tokens: Sequence[str] = ()
) -> ModelTokenizer:
    """The tokenizer of a model folder, from its files alone.

    It is read once a process, as long as no file of the folder changes; nobody may change it.

    Args:
        folder: of the model.
        cache: folder where what transformers makes of the files is kept; null: it is not kept.
        add_tokens: `model.add_tokens`, which are added to it.

    Raises:
        ModelError: there is none, or it needs code of its own.
        ConfigError: it has one of the tokens already.
    """
    if refusal := refuse_shape(folder, "tokenizer, and no weights"):
        raise refusal
    state = _state(folder)
    if not add_tokens:
        return _read_tokenizer(folder, state, cache)
    return _read_grown_tokenizer(folder, state, cache, tuple(add_tokens))


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has files of a tokenizer: a plan does without."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return any((folder / name).is_file() for name in names)


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files: equal as long as nothing in it changes."""
    try:
        stats = sorted((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
    except OSError:  # who reads the files says what is wrong
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@lru_cache(maxsize=1)
def _read_tokenizer(
    folder: Path, state: tuple[tuple[str, int, int], ...], cache: Path | None
) -> ModelTokenizer:
    try:
        return read_tokenizer(folder, cache)
    except Exception as error:  # tokenizers raise bare Exception on a damaged file
        cause = f"the tokenizer cannot be loaded: {error}"
        if not (folder / "tokenizer.json").is_file():
            cause = f"has no tokenizer.json, and {cause.splitlines()[0]}"
        raise ModelError(
            cause,
            where=str(folder),
            fix="get tokenizer.json and tokenizer_config.json of this model",
        ) from error


@lru_cache(maxsize=1)
def _read_grown_tokenizer(
    folder: Path,
    state: tuple[tuple[str, int, int], ...],
    cache: Path | None,
    add_tokens: tuple[str, ...],
) -> ModelTokenizer:
    return with_tokens(_read_tokenizer(folder, state, cache), add_tokens)


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer without end token or offsets; packed rows need no pad token.

    Raises:
        ModelError, SeveralErrors: what is missing, and where to set it.
    """
    where = str(folder / "tokenizer_config.json")
    found: list[PosttrainError] = []
    if tokenizer.eos_token_id is None:
        found.append(
            ModelError(
                "the tokenizer has no end token, so no answer could learn where to stop",
                where=where,
                fix='set "eos_token" to the token that ends a turn, e.g. "eos_token": "<|im_end|>"',
            )
        )
    if not tokenizer.is_fast:
        found.append(
            ModelError(
                "the tokenizer is not a fast one, and masks need its character offsets",
                where=str(folder),
                fix="add tokenizer.json: AutoTokenizer.from_pretrained(path).save_pretrained(path)",
            )
        )
    raise_all(found)


# ------------------------------------------------------------------------------- config.json


@lru_cache(maxsize=1)
def _read_config(
    folder: Path, state: tuple[tuple[str, int, int], ...]
) -> tuple[dict[str, Any], list[PosttrainError]]:
    """config.json, and what is wrong with the model that it describes."""
    file = folder / "config.json"
    fix = "the folder of a Hugging Face causal LM has one"
    if (folder / "export" / file.name).is_file():
        fix = f"this is a run; the model that it made is {folder / 'export'}"
    elif (folder / "adapter").is_dir() and (folder / "config.yaml").is_file():
        fix = (
            f"this is a run that trained an adapter; `posttrain export {folder} OUT --merge` makes "
            "a model of it, and tuning.init_from continues it"
        )
    elif (folder / "adapter_config.json").is_file():
        fix = "this is an adapter: set model.path to its base, and tuning.init_from to this folder"
    config = _read_object(file, fix)
    return config, architecture_problems(config, file)


def _read_object(file: Path, fix: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"has no {file.name}", where=str(file.parent), fix=fix) from error
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(file), fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"is not valid JSON: {error}", where=str(file), fix="get the file again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=str(file), fix="get the file again")
    return value


# ----------------------------------------------------------------------------------- weights


@lru_cache(maxsize=1)
def _weight_problems(folder: Path, state: tuple[tuple[str, int, int], ...]) -> list[PosttrainError]:
    if refusal := refuse_shape(folder, "weights, and no tokenizer"):
        return [refusal]
    try:
        return _weight_file_problems(folder)
    except OSError as error:
        place = str(error.filename or folder)
        what = f"cannot be read: {error.strerror}"
        return [ModelError(what, where=place, fix="check its permissions")]


def _weight_file_problems(folder: Path) -> list[PosttrainError]:
    if (folder / INDEX).is_file():
        return _index_problems(folder)
    if (folder / SINGLE).is_file():
        return _shard_problems(folder / SINGLE, set())
    other = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
    if other:
        what = f"has no *.safetensors; {other[0]} is not read (pickle can run code)"
        return [ModelError(what, where=str(folder), fix=_CONVERT)]
    what = f"has no weights: neither {SINGLE} nor {INDEX}"
    fix = "get the weights, or set model.weights=random to start from fresh ones"
    return [ModelError(what, where=str(folder), fix=fix)]


def _index_problems(folder: Path) -> list[PosttrainError]:
    file = folder / INDEX
    try:
        weight_map = _read_object(file, "get the folder again").get("weight_map")
    except ModelError as error:
        return [error]
    if not isinstance(weight_map, dict) or not weight_map:
        return [ModelError("has no weight_map", where=str(file), fix="get the file again")]
    tensors: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        tensors.setdefault(str(shard), set()).add(tensor)
    found: list[PosttrainError] = []
    for shard, names in sorted(tensors.items()):
        name = PurePosixPath(shard)
        # By its name only: in the Hugging Face cache a shard is a link to a folder of blobs.
        if name.is_absolute() or ".." in name.parts or "\\" in shard or ":" in shard:
            what = f"names a shard outside of the folder: {shard!r}"
            found.append(ModelError(what, where=str(file), fix="do not use this folder"))
        elif not (folder / shard).is_file():
            what = f"names a shard that is not there: {shard}"
            found.append(ModelError(what, where=str(file), fix="get the missing file"))
        else:
            found += _shard_problems(folder / shard, names)
    return found


def file_of_tensor(folder: Path, name: str) -> Path:
    """The file of a checked folder that has the weights of a tensor, as far as its index says."""
    if not (folder / INDEX).is_file():
        return folder / SINGLE
    weight_map = _read_object(folder / INDEX, "get the folder again").get("weight_map", {})
    return folder / str(weight_map.get(name, INDEX))


def _shard_problems(file: Path, expected: set[str]) -> list[PosttrainError]:
    """Compare a safetensors header with the size of its file and the tensors expected in it."""

    def refuse(what: str, fix: str = "get the file again") -> list[PosttrainError]:
        return [ModelError(what, where=str(file), fix=fix)]

    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if first.startswith(b"version "):
            return refuse("is a Git LFS pointer, not weights", "run `git lfs pull` in the folder")
        header_bytes = int.from_bytes(first, "little")
        if len(first) < 8 or size_bytes < 8 + header_bytes:
            return refuse(f"is truncated: {size_bytes} bytes do not hold its header")
        try:
            header = json.loads(stream.read(header_bytes))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            end = max((int(v["data_offsets"][1]) for v in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return refuse("is not a safetensors file: its header cannot be read")
    full_bytes = 8 + header_bytes + end
    if size_bytes < full_bytes:
        return refuse(f"is truncated: {size_bytes} bytes of {full_bytes}")
    if size_bytes > full_bytes:
        return refuse(f"is damaged: {size_bytes} bytes, its header tells of {full_bytes}")
    missing = sorted(expected - set(entries))
    if missing:
        return refuse(f"lacks {len(missing)} tensors that the index places in it: {missing[0]}")
    return []
