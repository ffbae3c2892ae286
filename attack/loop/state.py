"""How far an inversion is, and how it is saved and continued."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attack.loop.restarts import Restart, Starter
from core.processes import distributed
from core.storage import load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from attack.matching.match import Matcher


@dataclass
class Progress:
    """What a resumed run needs beside the restarts.

    Attributes:
        iteration: Number of finished iterations.
        seconds: Wall-clock time so far.
        trace: One entry per printed iteration.
        events: Sentences about restarts that diverged.
        fusion: What group consistency pulls towards; n x C x H x W inputs.
        final_stage_from: First iteration of E2EGI's final stage; 0 before it.
        was_rough: Whether total variation has ever been above `target_tv`.
    """

    iteration: int = 0
    seconds: float = 0.0
    trace: list[dict[str, float]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    fusion: torch.Tensor | None = None
    final_stage_from: int = 0
    was_rough: bool = False

    @property
    def in_final_stage(self) -> bool:
        """Whether E2EGI has fused its restarts for good."""
        return self.final_stage_from > 0

    def restore(self, saved: dict[str, Any], device: torch.device) -> None:
        """Become what was saved."""
        for name, value in saved.items():
            setattr(self, name, value)
        if self.fusion is not None:
            self.fusion = self.fusion.to(device)


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
        saved = load_checkpoint(self.path, "--root") if self.path.exists() else None
        at = torch.tensor(float(saved["progress"]["iteration"]) if saved else -1.0)
        at = at.view(1).to(self.problem.device)
        everywhere = distributed.all_gather_rows(at, [1] * distributed.world_size())
        if saved is None or not (everywhere == at).all():
            return restarts
        self.progress.restore(saved["progress"], self.problem.device)
        self.matcher.load_state_dict(saved["matcher"])
        return [self._restored(restart) for restart in saved["restarts"]]

    def _restored(self, state: dict[str, Any]) -> Restart:
        device, dtype = self.problem.device, self.problem.dtype
        generator = torch.Generator()
        generator.set_state(state.pop("generator"))
        variable = state.pop("variable").to(device, dtype).requires_grad_()
        for name in ("best_inputs", "best_labels"):
            if state[name] is not None:
                state[name] = state[name].to(device)
        logits = state.pop("label_logits")
        if logits is not None:
            logits = logits.detach().to(device, dtype).requires_grad_()
        optimizer = self.starter.optimizer(variable, logits)
        optimizer.load_state_dict(state.pop("optimizer"))
        return Restart(
            variable=variable,
            label_logits=logits,
            optimizer=optimizer,
            generator=generator,
            loss=self.problem.target.loss,
            **state,
        )


def _saved(restart: Restart) -> dict[str, Any]:
    # The client's loss is the target's, and no plain value.
    plain = {name: value for name, value in vars(restart).items() if name != "loss"}
    return {
        **plain,
        "variable": restart.variable.detach(),
        "optimizer": restart.optimizer.state_dict(),
        "generator": restart.generator.get_state(),
    }
