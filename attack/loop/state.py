"""How far an inversion is, and how it is saved and continued."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attack.loop.restarts import Restart, Starter
from core.errors import InputError
from core.optimizer_state import restore_optimizer
from core.processes import distributed
from core.records import BROKEN, check_types
from core.storage import load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from attack.matching.match import Matcher


@dataclass
class Progress:
    """What a resumed run needs beside the restarts.

    Attributes:
        iteration: Number of finished iterations.
        seconds: Wall-clock time so far; of targets that are attacked at once, each one's share.
        cpu_seconds: The same of the processor's time, over all threads.
        trace: One entry per printed iteration.
        events: Sentences about restarts that diverged.
        fusion: What group consistency pulls towards; n x C x H x W inputs.
        final_stage_from: First iteration of E2EGI's final stage; 0 before it.
        was_rough: Whether total variation has ever been above `target_tv`.
    """

    iteration: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    trace: list[dict[str, float]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    fusion: torch.Tensor | None = None
    final_stage_from: int = 0
    was_rough: bool = False

    @property
    def in_final_stage(self) -> bool:
        """Whether E2EGI has fused its restarts for good."""
        return self.final_stage_from > 0

    def restore(self, saved: Progress, device: torch.device) -> None:
        """Become what was saved."""
        self.iteration, self.seconds = saved.iteration, saved.seconds
        self.cpu_seconds = saved.cpu_seconds
        self.trace, self.events = saved.trace, saved.events
        self.final_stage_from, self.was_rough = saved.final_stage_from, saved.was_rough
        self.fusion = None if saved.fusion is None else saved.fusion.to(device)


class StateFile:
    """The file that a killed inversion continues from; one per process.

    Args:
        path: The file of a run on one process; others add their rank.
        problem: The target and how this process inverts it.
        matcher: Whose settled difference step is kept.
        starter: Makes the restored optimizers.
        progress: Is saved and restored.
    """

    def __init__(
        self,
        path: Path,
        problem: InversionProblem,
        matcher: Matcher,
        starter: Starter,
        progress: Progress,
    ) -> None:
        if distributed.world_size() > 1:
            path = path.with_suffix(f".rank{distributed.rank()}{path.suffix}")
        self.path, self.problem, self.matcher = path, problem, matcher
        self.starter, self.progress = starter, progress

    def save(self, restarts: list[Restart]) -> None:
        """Write the state down."""
        save_checkpoint(
            {
                "progress": vars(self.progress),
                "restarts": [_saved(restart) for restart in restarts],
                "matcher": self.matcher.state_dict(),
            },
            self.path,
        )

    def load(self, restarts: list[Restart]) -> list[Restart]:
        """Continue where all processes have a state of the same iteration.

        Args:
            restarts: The restarts to continue with if no state was saved.
        """
        saved = self._read(restarts) if self.path.exists() else None
        at = torch.tensor(float(saved.progress.iteration) if saved else -1.0)
        at = at.view(1).to(self.problem.device)
        everywhere = distributed.all_gather_rows(at, [1] * distributed.world_size())
        if saved is None or not (everywhere == at).all():
            return restarts
        with self._as_one_sentence():
            self.matcher.load_state_dict(saved.matcher)
        self.progress.restore(saved.progress, self.problem.device)
        return saved.restarts

    def _read(self, restarts: list[Restart]) -> _State:
        """The state in the file, every value of it checked.

        Args:
            restarts: What the run begins with: as many as there can be, and of the same shapes.

        Raises:
            InputError: The file is damaged, or is the state of another run.
        """
        raw = load_checkpoint(self.path, "--root")
        with self._as_one_sentence():
            return self._parsed(raw, restarts)

    @contextlib.contextmanager
    def _as_one_sentence(self) -> Iterator[None]:
        """Whatever values of other types lead to, said of the file."""
        try:
            yield
        except (InputError, *BROKEN) as error:
            reason = str(error) if isinstance(error, InputError) else f"{error!r:.200}"
            raise InputError(
                f"--root: {self.path} is not the state of this run ({reason}); remove it to begin "
                "anew"
            ) from None

    def _parsed(self, raw: dict[str, Any], restarts: list[Restart]) -> _State:
        progress = Progress(**raw["progress"])
        check_types(progress)
        shape = tuple(self.problem.inputs(restarts[0]).shape)
        _check_tensor(progress.fusion, shape, "the fusion", optional=True)
        times = (progress.seconds, progress.cpu_seconds)
        if progress.iteration < 0 or not all(0 <= time < math.inf for time in times):
            raise InputError("it has a negative number of iterations")
        if not 1 <= len(raw["restarts"]) <= len(restarts):
            raise InputError(f"it has {len(raw['restarts'])} restarts")
        restored = [self._restored(dict(saved), restarts[0], shape) for saved in raw["restarts"]]
        if not isinstance(raw["matcher"], dict):
            raise InputError("its matching is not by name")
        return _State(progress, restored, raw["matcher"])

    def _restored(self, state: dict[str, Any], like: Restart, shape: tuple[int, ...]) -> Restart:
        device, dtype = self.problem.device, self.problem.dtype
        generator = torch.Generator()
        generator.set_state(state.pop("generator"))
        variable, logits = state.pop("variable"), state.pop("label_logits")
        _check_tensor(variable, tuple(like.variable.shape), "a restart")
        _check_tensor(state["best_inputs"], shape, "a result", optional=True)
        if like.label_logits is not None:
            _check_tensor(logits, tuple(like.label_logits.shape), "the labels of a restart")
            logits = logits.detach().to(device, dtype).requires_grad_()
        elif logits is not None:
            raise InputError("it optimises labels")
        variable = variable.to(device, dtype).requires_grad_()
        optimizer = self.starter.optimizer(variable, logits)
        restore_optimizer(optimizer, state.pop("optimizer"))
        restart = Restart(
            variable=variable,
            label_logits=logits,
            optimizer=optimizer,
            generator=generator,
            loss=self.problem.target.loss,
            **state,
        )
        check_types(restart)
        return _moved(restart, shape[0], device)


@dataclass(frozen=True)
class _State:
    """What a state file holds."""

    progress: Progress
    restarts: list[Restart]
    matcher: dict[str, Any]


def _check_tensor(value: Any, shape: tuple[int, ...], what: str, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise InputError(f"{what} is no tensor of numbers")
    if tuple(value.shape) != shape:
        raise InputError(f"{what} has shape {tuple(value.shape)}, not {shape}")


def _moved(restart: Restart, n: int, device: torch.device) -> Restart:
    """The restart with its result on its device."""
    if restart.best_inputs is not None:
        restart.best_inputs = restart.best_inputs.to(device)
    labels = restart.best_labels
    if labels is not None:
        if labels.is_complex() or labels.dim() == 0 or len(labels) != n:
            raise InputError(f"it does not hold {n} labels")
        restart.best_labels = labels.to(device)
    return restart


def _saved(restart: Restart) -> dict[str, Any]:
    # The client's loss is the target's, and no plain value.
    plain = {name: value for name, value in vars(restart).items() if name != "loss"}
    # Rows of one stack would each be saved with all of it.
    return {
        **{name: _alone(value) for name, value in plain.items()},
        "variable": _alone(restart.variable),
        "optimizer": _alone(restart.optimizer.state_dict()),
        "generator": restart.generator.get_state(),
    }


def _alone(value: Any) -> Any:
    """The value with tensors on memory of their own, where they are parts of larger ones."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        own = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if own else value.clone()
    if isinstance(value, dict):
        return {key: _alone(each) for key, each in value.items()}
    return [_alone(each) for each in value] if isinstance(value, list) else value
