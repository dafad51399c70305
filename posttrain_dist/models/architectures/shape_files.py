"""Sizes of well-known models that come with the package: `model.path=shape:llama3-70b`.

assets/shapes/NAME/config.json holds facts alone: no weights, no tokenizer. Imports no torch.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from posttrain_dist.errors import ModelError

PREFIX = "shape:"
_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "shapes"


def shape_names() -> list[str]:
    """What may stand behind `shape:`."""
    return sorted(folder.name for folder in _FOLDER.iterdir() if folder.is_dir())


def shape_folder(path: str) -> Path:
    """The folder of `shape:NAME`.

    Raises:
        ModelError: no shape has the name; the message has the nearest one and all there are.
    """
    name, names = path.removeprefix(PREFIX), shape_names()
    if name in names:
        return _FOLDER / name
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]
    raise ModelError(
        f"no shape has the name {name!r}",
        where="model.path",
        fix=f"did you mean {PREFIX}{near}? there are {', '.join(names)}; any other model is "
        "planned from a folder with its config.json",
    )


def refuse_shape(folder: Path, lacks: str) -> ModelError | None:
    """Why a folder cannot be trained, if it is a shape.

    Args:
        lacks: what was looked for in it.
    """
    if folder.parent != _FOLDER:
        return None
    return ModelError(
        f"{PREFIX}{folder.name} is the sizes of a model alone: it has no {lacks}",
        where="model.path",
        fix="use it with `posttrain plan`; to train, set model.path to a folder with config.json, "
        "tokenizer.json and *.safetensors",
    )
