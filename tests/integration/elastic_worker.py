"""A trainer that takes step after step until the file `stop` is in its run directory. Argument: its configuration."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rpp.config.load import load_config
from megatron_rpp.observability.logs import setup_logging
from megatron_rpp.session import open_session
from megatron_rpp.train import train_on_one_batch


def main() -> None:
    config = load_config([sys.argv[1]], [])
    setup_logging(config.run.dir, 0)
    with open_session(config, resume="no") as session:
        step = 0
        while not (Path(config.run.dir) / "stop").exists():
            train_on_one_batch(session, step)
            step += 1


if __name__ == "__main__":
    main()
