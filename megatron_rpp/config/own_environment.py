"""What this process has put into its environment for itself, and other programs must not inherit as a user's setting.

`rpp train` looks at the model in the process that then starts the ranks: what it has set would come to them as if the
user had, and from them to the servers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

SET_HERE: dict[str, str] = {}
"""Of os.environ, what is no setting of the user's; other programs are started without it."""


def set_own(variables: Mapping[str, str]) -> None:
    """Puts `variables` into os.environ, but for those that the user has set."""
    SET_HERE.update({name: value for name, value in variables.items() if name not in os.environ})
    os.environ.update(SET_HERE)


def inherited() -> dict[str, str]:
    """os.environ as this process was given it."""
    return {name: value for name, value in os.environ.items() if SET_HERE.get(name) != value}
