"""The loop in which an editing method's own networks are trained: steps, validations, checkpoints.

What a step draws depends on the seed and the step's number only, so a training that was interrupted goes on as if it
had not been.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..artefacts.safetensors_file import explained
from ..errors import NumericalError
from ..facts import Fact
from ..io import atomic_file
from ..progress import progress as bar_of


class _HasFact(Protocol):
    @property
    def fact(self) -> Fact: ...


X = TypeVar("X", bound=_HasFact)


class LoopSettings(Protocol):
    """What the loop needs of a training's hyper-parameters."""

    @property
    def steps(self) -> int:
        """Of Adam, at most."""

    @property
    def batch(self) -> int:
        """Examples in a pass."""

    @property
    def validate_every(self) -> int:
        """Steps between validations."""

    @property
    def patience(self) -> int:
        """Steps without improvement after which training ends."""


class Learner(nn.Module, Generic[X]):
    """Networks in training. What is to be kept in a checkpoint is registered as parameters or buffers.

    Attributes:
        settings: the hyper-parameters.
        device: where it computes.
        accumulate: passes in a step.
        clip: largest norm of the gradient; None for none.
    """

    settings: LoopSettings
    device: torch.device
    accumulate = 1
    clip: float | None = None

    @abstractmethod
    def losses(self, batch: Sequence[X], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """The objective of a batch, and its parts as numbers, ``loss`` among them."""

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rates."""

    @abstractmethod
    def save(self, out: Path, report: Mapping[str, Any]) -> None:
        """Write the folder as it is now, whole or not at all; an older one is replaced."""

    def validation(self, held: Sequence[X], rng: random.Random) -> dict[str, float]:
        """Scores on examples that are held out; the least ``loss`` is the best. Runs without gradients."""
        batches = [held[i : i + self.settings.batch] for i in range(0, len(held), self.settings.batch)]
        rows = [(len(batch), self.losses(batch, rng)[1]) for batch in batches]
        return {key: sum(count * parts[key] for count, parts in rows) / len(held) for key in rows[0][1]}


class Loop(Generic[X]):
    """A training and where it is.

    Args:
        learner: what is trained.
        trained: examples to train on.
        held: examples that choose the best step.
        seed: of the batches.
        name: of everything that the training depends on; a checkpoint of another name is refused.
    """

    def __init__(
        self, learner: Learner[X], trained: Sequence[X], held: Sequence[X], seed: int, name: str
    ) -> None:
        self.learner, self.trained, self.held, self.seed, self.name = learner, trained, held, seed, name
        self.optimiser = adam(learner.groups())
        self.step = self.best_step = 0
        self.history: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}  # added to the report

    def run(self, out: Path, progress: bool | None) -> dict[str, Any]:
        """Train to the end; returns :meth:`report`.

        ``out`` always holds the best so far; beside it a checkpoint holds the newest state until the end.
        """
        settings, checkpoint = self.learner.settings, checkpoint_of(out)
        if checkpoint.exists():
            self.load(checkpoint)
        else:
            self.save(checkpoint)
        with bar_of(total=settings.steps, desc="training", unit="step", show=progress) as bar:
            bar.update(self.step)
            while self.step < settings.steps and self.step - self.best_step < settings.patience:
                self.advance()
                bar.update()
                if self.step % settings.validate_every == 0 or self.step == settings.steps:
                    if self.validate():
                        self.learner.save(out, self.report())
                    self.save(checkpoint)
                    bar.set_postfix(loss=f"{self.history[-1]['loss']:.3f}")
        checkpoint.unlink(missing_ok=True)
        return self.report()

    def advance(self) -> None:
        """One step of Adam."""
        learner = self.learner
        self.optimiser.zero_grad()
        gpu = [learner.device] if learner.device.type == "cuda" else []
        for part in range(learner.accumulate):
            rng = random.Random(f"{self.seed} {self.step} {part}")
            batch = rng.sample(self.trained, min(learner.settings.batch, len(self.trained)))
            with torch.enable_grad(), torch.random.fork_rng(gpu):
                torch.manual_seed(random.Random(f"{self.seed} {self.step} {part} dropout").getrandbits(63))
                loss, _ = learner.losses(batch, rng)
                (loss / learner.accumulate).backward()
            if not bool(loss.isfinite()):
                raise NumericalError(
                    f"the loss stopped being finite at step {self.step}: lower the learning rates"
                )
        if learner.clip is not None:
            groups = [p for group in self.optimiser.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(groups, learner.clip)
        self.optimiser.step()
        self.step += 1

    @torch.no_grad()
    def validate(self) -> bool:
        """Score the examples that are held out; returns whether they were never better."""
        row = self.learner.validation(self.held, random.Random(f"{self.seed} validation"))
        better = all(row["loss"] < past["loss"] for past in self.history)
        self.history.append({"step": self.step, **row})
        if better:
            self.best_step = self.step
        return better

    def report(self) -> dict[str, Any]:
        """``steps``, ``best_step``, ``examples``, ``validation`` (of the best) and ``history``."""
        best = next((row for row in self.history if row["step"] == self.best_step), {})
        return {
            "steps": self.step,
            "best_step": self.best_step,
            "examples": {"trained": len(self.trained), "held": len(self.held)},
            "validation": {key: value for key, value in best.items() if key != "step"},
            "history": list(self.history),
            **self.notes,
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "name": self.name,
            "step": self.step,
            "best_step": self.best_step,
            "history": self.history,
            "learner": self.learner.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        with explained(path), atomic_file(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is of a training with other arguments.
        """
        state = torch.load(path, map_location=self.learner.device, weights_only=True)
        if state["name"] != self.name:
            raise ValueError(
                f"{path} is of a training with another model, data or settings: give those, or remove it"
            )
        self.step, self.best_step, self.history = state["step"], state["best_step"], list(state["history"])
        self.learner.load_state_dict(state["learner"])
        self.optimiser.load_state_dict(state["optimiser"])


def adam(groups: list[dict[str, Any]]) -> torch.optim.Adam:
    """Adam of these groups of parameters, in one pass over memory where torch has such a one."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.Adam(groups, fused=devices <= {"cpu", "cuda"} or None)


def checkpoint_of(out: Path) -> Path:
    """Where the newest state of a training is kept while it runs."""
    return out.with_name(out.name + ".checkpoint")


def require_room(out: Path) -> None:
    """Make sure that a training may write to a folder.

    Raises:
        FileExistsError: it exists, and there is no checkpoint to go on from.
    """
    checkpoint = checkpoint_of(out)
    if out.exists() and not checkpoint.exists():
        raise FileExistsError(
            f"{out} exists already and there is no {checkpoint.name} beside it: choose a new folder"
        )


def split_by_subject(examples: Sequence[X], holdout: float, seed: int) -> tuple[list[X], list[X]]:
    """Examples to train on and to validate with; no subject is in both.

    Raises:
        ValueError: there are fewer than two subjects.
    """
    subjects = sorted({example.fact.subject for example in examples})
    if len(subjects) < 2:
        raise ValueError(f"training needs records of at least 2 subjects, got {len(subjects)}")
    random.Random(seed).shuffle(subjects)
    held = set(subjects[: min(max(1, round(holdout * len(subjects))), len(subjects) - 1)])
    parts: tuple[list[X], list[X]] = ([], [])
    for example in examples:
        parts[example.fact.subject in held].append(example)
    return parts


def name_of(content: Any) -> str:
    """A digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
