"""One question a module: `measure` on every node, `check` over their answers."""
