"""The run folder: made ours before a run, what it says of a run, and the marker that a run leaves at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fbitrain import environment, resume
from fbitrain.base.errors import UserError, passing
from fbitrain.base.files import lock_folder, write_json, write_text
from fbitrain.checkpoint_check import with_shared_look
from fbitrain.checkpoint_files import TrainerState, trainer_state
from fbitrain.checkpoint_folders import (
    Look,
    abandon_newer,
    discard_unfinished,
    newest_of_own,
    note_followed,
    step_of,
    strangers,
)
from fbitrain.config import Config, to_yaml
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.loading.tokenizer_folder import keep_tokenizer
from fbitrain.ranks import say


@contextmanager
def writable(run_dir: Path) -> Iterator[None]:
    """Turns an OSError of what is done inside into a UserError that names the run folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the run folder {run_dir} cannot be written: {reason}; free space or choose another") from None


def finished(config: Config) -> str:
    """A sentence if the run has nothing left to train, found out before anything is loaded; else empty.

    Raises UserError if the finished run is of another configuration.
    """

    def told(look: Look) -> str:
        latest = newest_of_own(config)
        # By its name first: to look for damage is to read the whole checkpoint, and `choose` will do that again.
        if latest is None or step_of(latest) < config.train.total_steps or look(latest):
            return ""
        if not config.train.total_steps and not (config.run_dir / "FINISHED.json").is_file():
            return ""  # saved, as its first act, and perhaps killed before it was evaluated
        state = trainer_state(latest)
        resume.require_same_config(latest, config)
        write_finished(config, state)  # again, in case the run was killed between its last checkpoint and its marker
        return f"nothing to do: {config.run_dir} is trained to step {state.step}, see {latest}"

    return with_shared_look(told)


def write_finished(config: Config, state: TrainerState) -> None:
    """The marker of a run that reached its last step; launchers do not pass exit codes on faithfully."""
    _write_end(config, "FINISHED.json", state, "finished")


def write_stopped(config: Config, state: TrainerState, reason: str) -> None:
    """The marker of a run that was told to stop and saved."""
    _write_end(config, "STOPPED.json", state, reason)


def _write_end(config: Config, marker: str, state: TrainerState, reason: str) -> None:
    with writable(config.run_dir):
        write_json(config.run_dir / marker, {"step": state.step, "tokens": state.tokens, "reason": reason})


def prepare_run_dir(config: Config) -> None:
    """Makes the folder ours, prints the resolved configuration, clears what interrupted saves left. Rank 0."""
    run_dir = config.run_dir
    with writable(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        if not lock_folder(run_dir):
            raise passing(  # the other may be what is left of a launch before
                f"{run_dir} is being trained by another process; wait for it or end it, or choose another run.name"
            )
        for leftover in discard_unfinished(run_dir):
            say(f"removed {leftover}, left by an interrupted save or removal")
        for sentence in strangers(run_dir):
            say(sentence)
    print(to_yaml(config), flush=True)


def record_start(
    config: Config, world_size: int, state: TrainerState, tokenizer: Tokenizer, resume_from: Path | None
) -> None:
    """Saves configuration, environment and tokenizer; sets aside checkpoints that this run leaves behind. Rank 0."""
    run_dir = config.run_dir
    with writable(run_dir):
        abandon_newer(run_dir, state.step)
        note_followed(config, resume_from, state.step)
        write_text(run_dir / "config.yaml", to_yaml(config))
        write_json(run_dir / "environment.json", environment.describe(world_size))
        keep_tokenizer(tokenizer, run_dir)
        for marker in ("FINISHED.json", "STOPPED.json"):
            (run_dir / marker).unlink(missing_ok=True)
