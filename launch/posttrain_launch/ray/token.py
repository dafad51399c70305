"""The token of a running Ray: Ray reads it from the environment or a file, and nothing else does.

RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token. It is in no config, no
command line and no log; a run's own Ray has one of its own (`child.py`).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from posttrain_dist.errors import ClusterError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
# What Ray says of a token that is missing or wrong: gRPC's words, those of HTTP, its exceptions.
_REFUSALS = ("unauthenticated", "invalidauthtoken", "authentication", "unauthorized", "forbidden")


def use_given_token(environment: MutableMapping[str, str] = os.environ) -> None:
    """Turn token authentication on where a token is given and nobody says whether to use it.

    Only for one in the environment, which was given for this cluster: that of ~/.ray/auth_token
    may be another's, and a cluster that asks for none would be shown it.
    """
    if MODE not in environment and (environment.get(TOKEN) or environment.get(TOKEN_PATH)):
        environment[MODE] = "token"


def check_given_token(where: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Refuse a token that cannot be read, before Ray does without saying which.

    Raises:
        ClusterError: token authentication is on, and there is no token.
    """
    if environment.get(MODE, "").lower() != "token" or environment.get(TOKEN):
        return
    path = environment.get(TOKEN_PATH)
    file = Path(path).expanduser() if path else Path.home() / ".ray" / "auth_token"
    try:
        found = bool(file.read_text(encoding="utf-8").strip())
        problem = "" if found else "is empty"
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if problem:
        raise ClusterError(
            f"needs a token ({MODE}=token), and {file} {problem}",
            where=where,
            fix=f"set {TOKEN_PATH} to a 0600 file with the token of the cluster, or {TOKEN} to it",
        )


def refusal(text: str, where: str) -> ClusterError | None:
    """The error of a token that is missing or wrong, if that is what Ray's text means."""
    plain = text.lower().replace(" ", "")
    if not any(each in plain for each in _REFUSALS):
        return None
    off = os.environ.get(MODE, "").lower() != "token"
    what = "asks for a token, and none was sent" if off else "refuses the token"
    turn_on = f"set {MODE}=token, and " if off else ""
    return ClusterError(
        what,
        where=where,
        fix=f"{turn_on}give the token that its nodes were started with: {TOKEN_PATH}=<a 0600 "
        f"file>, {TOKEN}, or ~/.ray/auth_token",
    )
