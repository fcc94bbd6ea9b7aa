"""Checkpoints of a run, from which it goes on bit by bit as it would have.

All that a run changes is in two trees: arrays, the state of the agent, which Orbax
writes; and plain numbers, of engine, environments and meters, as JSON. Both are data:
to load a checkpoint executes nothing. A checkpoint is complete or does not count, so a
run may be killed at any moment.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from loop import Engine
from orbax.checkpoint import args

# Flags that say where a run goes and what it shows, not what it is.
FREE = {"out", "checkpoint_dir", "checkpoint_every", "render"}
IDENTITY = {"script", "env", "seed", "environments"}  # that make another run of it


class Checkpoints:
    """Saves a run, and takes it up again.

    Args:
        folder: where the checkpoints are; the last two are kept.
        flags: of this run, plain values by name, and the name of the script.
    """

    def __init__(self, folder: Path, flags: dict[str, Any]) -> None:
        self._flags = {name: flags[name] for name in flags if name not in FREE}
        folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, engine: Engine) -> None:
        """Saves a run as it is after an event, unless it has taken no step since."""
        if engine.steps == self._manager.latest_step():
            return
        state = engine.events.state
        plain = {
            "flags": self._flags,
            "shapes": shapes(state),
            "engine": engine.save(),
        }
        items = {"state": args.StandardSave(state), "plain": args.JsonSave(plain)}
        self._manager.save(engine.steps, args=args.Composite(**items), force=True)

    def restore(self, engine: Engine) -> dict[str, Any] | None:
        """Takes a run up from the last checkpoint, if there is one.

        Returns:
            The flags that have another value now, with the value they had; None if
            there is no checkpoint.

        Raises:
            ValueError: if the checkpoint is of another run, or of another agent.
        """
        step, events = self._manager.latest_step(), engine.events
        if step is None:
            return None
        try:
            plain = self._restore(step, plain=args.JsonRestore()).plain
        except (KeyError, ValueError) as error:
            folder = self._manager.directory
            raise ValueError(f"{folder} holds no checkpoints of a run") from error
        before = plain["flags"]
        names = sorted(before.keys() | self._flags.keys())
        changed = {
            name: before.get(name)
            for name in names
            if before.get(name) != self._flags.get(name)
        }
        if plain["shapes"] != shapes(events.state) or IDENTITY & changed.keys():
            told = ", ".join(
                f"{name} was {old} and is {self._flags.get(name)}"
                for name, old in changed.items()
            )
            raise ValueError(
                f"cannot resume from {self._manager.directory}: "
                f"{told or 'it was saved by another agent'}"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, events.state)
        events.state = self._restore(step, state=args.StandardRestore(abstract)).state
        engine.load(plain["engine"])
        return changed

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=args.Composite(**items))


def shapes(tree: Any) -> dict[str, str]:
    """Returns the dtype and shape of each array, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype.name}{list(leaf.shape)}"
        for path, leaf in leaves
    }
