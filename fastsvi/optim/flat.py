"""Adam, AdamW and ClippedAdam for all parameters of one flat buffer in one update.

A step updates exactly the leaves it is given, each with its own step count, as one optimizer per
parameter would. The kernel is cheapest where neighbours share a step count and options, so leaves
are kept in *cohorts*: leaves that have been updated together ever since they were first seen.
Adjacent leaves of a cohort with equal options form a *run*, and the kernel sees runs. In most
programs one run covers the buffer. A step that leaves out part of a cohort splits it, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastsvi.errors import DtypeError, ShapeError
from fastsvi.kernels.adam import adam_
from fastsvi.kernels.segments import Segments
from fastsvi.optim import fused
from fastsvi.optim.families import Family, Rule
from fastsvi.optim.leaf_optimizer import LeafOptimizer, Options, State, weakly
from fastsvi.optim.options import require_in_range
from fastsvi.params.buffer import Buffer
from fastsvi.params.layout import Segment

Locate = Callable[[Tensor], tuple[Buffer, Segment] | None]

_PLANS = 8  # sets of leaves whose plan is remembered
_grad_of = attrgetter("grad")


@dataclass(slots=True, eq=False)
class _Member:
    """What is known of one leaf."""

    name: str
    options: Options
    clips: dict[str, Any]
    rule: Rule
    lr: float | Tensor  # at step 0: ClippedAdam decays it from there
    shown_lr: float | Tensor  # what options["lr"] was when last looked at
    cohort: int
    run: int = -1  # where its step count is, while it has a place in the buffer
    step: float | Tensor = 0.0  # its step count while it has none

    @property
    def lrd(self) -> float:
        return self.options.get("lrd", 1.0)

    @property
    def key(self) -> tuple:
        """Equal for leaves that a run may join."""
        lr = id(self.lr) if isinstance(self.lr, Tensor) else self.lr
        return self.cohort, self.rule, lr, self.lrd


@dataclass(slots=True, eq=False)
class _Run:
    """Adjacent elements that the kernel may treat as one segment."""

    start: int
    stop: int
    member: _Member | None  # the first of its leaves; None if the run is not ours to update


class FlatAdam:
    """An Adam of ``family`` over the leaves of ``buffer`` that were added to it.

    The moments are companions of the buffer, so they follow their leaves through every change of
    its layout.
    """

    def __init__(self, buffer: Buffer, family: Family, locate: Locate) -> None:
        self.buffer = buffer
        self.family = family
        # Counts of changes; lists, to be shared with plans.
        self.version = [0]  # of options and cohorts
        self.rates = [0]  # of learning rates
        self._locate = locate
        self._exp_avg = buffer.companion()
        self._exp_avg_sq = buffer.companion()
        self._members = WeakTensorKeyDictionary()
        self._steps = torch.zeros(0, dtype=buffer.dtype, device=buffer.device)  # [runs]
        self._runs: list[_Run] = []
        self._arranged = (-1, -1, -1)
        self._next_cohort = 0
        self._starting: dict[float, int] = {}  # step count -> cohort of leaves that came with it
        self._plans: dict[tuple[int, ...], FlatPlan] = {}

    # --- leaves -------------------------------------------------------------------------------

    def add(
        self, leaf: Tensor, name: str | None, options: dict[str, Any], clips: dict[str, Any]
    ) -> None:
        """Take charge of a leaf that lies in the buffer."""
        complete = {**self.family.defaults, **options}
        rule = self.family.rule(complete, clips)
        changed = weakly(self._options_changed)
        watched = Options(complete, lambda: changed(member))
        lr = complete["lr"]
        member = _Member(str(name), watched, clips, rule, lr, lr, self._cohort_at(0.0))
        self._members[leaf] = member
        self.version[0] += 1

    def options(self, leaf: Tensor) -> Options:
        """Live options of a leaf; ``lr`` is the one of its latest update."""
        member = self._members[leaf]
        self._show_lr(member)
        return member.options

    def state(self, leaf: Tensor) -> State:
        """Copies of the leaf's moments and its step count; empty before its first update."""
        member = self._members[leaf]
        step = self._step_of(member)
        where = self._segment(leaf)
        if float(step) == 0.0 or where is None:
            return {}
        state: State = {
            "step": torch.as_tensor(step, dtype=torch.float32, device="cpu").clone(),
            "exp_avg": self._exp_avg.flat[where.slice].reshape(where.shape).clone(),
            "exp_avg_sq": self._exp_avg_sq.flat[where.slice].reshape(where.shape).clone(),
        }
        if member.lrd != 1.0:
            state["undecayed_lr"] = member.lr  # dividing by the decay would lose the last bit
        return state

    def load(self, leaf: Tensor, state: State) -> None:
        """Replace the leaf's moments and step count, in torch's or Pyro's format."""
        member, where = self._members[leaf], self._segment(leaf)
        if where is None:
            raise ShapeError(f"parameter '{member.name}' has left its buffer: it has no moments")
        if state:
            check_moments(member.name, where.shape, state)
        for key, companion in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq)):
            flat = companion.flat[where.slice]
            flat.copy_(state[key].reshape(-1)) if state else flat.zero_()
        step = float(state["step"]) if state else 0.0
        member.step, member.run, member.cohort = step, -1, self._cohort_at(step)
        lr = member.options["lr"]
        decay = member.lrd**step
        member.lr = state.get("undecayed_lr", lr if decay == 1.0 else lr / decay)
        self._show_lr(member)
        self.version[0] += 1

    def optimizer(self, leaf: Tensor) -> LeafOptimizer:
        """The leaf's share as a torch optimizer."""
        return LeafOptimizer(self, leaf)

    def _segment(self, leaf: Tensor) -> Segment | None:
        found = self._locate(leaf)
        return found[1] if found is not None and found[0] is self.buffer else None

    def _step_of(self, member: _Member) -> float | Tensor:
        return member.step if member.run < 0 else self._steps[member.run]

    def _show_lr(self, member: _Member) -> None:
        if member.lrd != 1.0:
            member.shown_lr = member.lr * member.lrd ** float(self._step_of(member))
            member.options.set_quietly("lr", member.shown_lr)

    def _options_changed(self, member: _Member) -> None:
        options = member.options
        require_in_range(options, f"options of parameter '{member.name}'")
        rule, member.rule = member.rule, self.family.rule(options, member.clips)
        if not _is_same(options["lr"], member.shown_lr):
            decay = 1.0 if member.lrd == 1.0 else member.lrd ** float(self._step_of(member))
            member.shown_lr = options["lr"]
            member.lr = options["lr"] / decay if decay != 1.0 else options["lr"]
            self.rates[0] += 1
        if member.rule != rule:
            self.version[0] += 1

    # --- cohorts and runs ---------------------------------------------------------------------

    def _new_cohort(self) -> int:
        self._next_cohort += 1
        return self._next_cohort

    def _cohort_at(self, step: float) -> int:
        """Cohort of leaves that join with this step count before the next update."""
        if step not in self._starting:
            self._starting[step] = self._new_cohort()
        return self._starting[step]

    def _split(self, leaves: Sequence[Tensor]) -> None:
        """Give the leaves cohorts of their own where others would stay behind."""
        inside = [self._members[leaf] for leaf in leaves]
        chosen = set(map(id, inside))
        torn = {m.cohort for m in self._members.values() if id(m) not in chosen}
        torn &= {m.cohort for m in inside}
        if torn:
            successor = {cohort: self._new_cohort() for cohort in torn}
            for member in inside:
                member.cohort = successor.get(member.cohort, member.cohort)
            self.version[0] += 1

    def arrange(self) -> None:
        """Bring runs and step counts up to date with layout, options and cohorts."""
        layout = self.buffer.layout  # moves newcomers in, which may change the version
        if self._arranged == (self.buffer.version, self.version[0], self.rates[0]):
            return
        if self._arranged[:2] == (self.buffer.version, self.version[0]):
            if _are_shared(self._runs, self._members.values()):
                self._arranged = (*self._arranged[:2], self.rates[0])
                return
            self.version[0] += 1  # runs come apart; whoever planned with them must plan anew
        runs: list[_Run] = []
        steps: list[float | Tensor] = []
        for member in self._members.values():
            member.step = self._step_of(member)
            member.run = -1
        for segment, leaf in zip(layout.values(), self.buffer.leaves, strict=True):
            member = self._members.get(leaf)
            end = runs[-1].stop if runs else 0
            if segment.offset > end:
                # Nothing moves in a gap: its gradient is 0. But with eps = 0 that is 0 / 0.
                if runs and (runs[-1].member is None or runs[-1].member.rule.eps > 0):
                    runs[-1].stop = segment.offset
                else:
                    runs.append(_Run(end, segment.offset, None))
                    steps.append(0.0)
            if runs and _joins(runs[-1].member, member):
                runs[-1].stop = segment.stop
            else:
                runs.append(_Run(segment.offset, segment.stop, member))
                steps.append(0.0 if member is None else member.step)
            if member is not None:
                member.run = len(runs) - 1
        self._runs = runs
        self._steps = _vector(steps, like=self._steps)
        self._starting = {}
        self._plans = {}
        self._arranged = (self.buffer.version, self.version[0], self.rates[0])

    # --- steps --------------------------------------------------------------------------------

    def step(self, leaves: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        """Update these leaves; one without a gradient keeps everything."""
        key = tuple(map(id, leaves))
        plan = self._plans.get(key)
        if plan is None or not plan.is_current():
            self.buffer.sync()
            plan = self.plan(leaves)
            while len(self._plans) >= _PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plan
        if not plan.take_gradients():
            present = [leaf for leaf in leaves if leaf.grad is not None]
            if present:
                self.step(present)
            return
        plan.launch()
        self.buffer.touch()

    def plan(
        self, leaves: Sequence[Tensor], capturable: bool = False, skipped: Tensor | None = None
    ) -> FlatPlan:
        """Everything that an update of these leaves needs, as long as nothing changes."""
        self._split(leaves)
        self.arrange()
        return FlatPlan(self, tuple(leaves), capturable, skipped)


class FlatPlan:
    """One update of a fixed set of leaves: which launches, on which views.

    ``launch`` only calls the kernel on tensors; it keeps no count on the host and never waits for
    the device, so it can be captured in a graph. For that, ``capturable`` puts the learning rates
    into tensors too; :meth:`refresh` brings them up to date after a scheduler has changed them.
    If ``skipped`` is given, an int64 scalar, a launch with a non-finite gradient changes nothing
    and adds 1 to it; this needs ``capturable``.
    """

    def __init__(
        self,
        engine: FlatAdam,
        leaves: tuple[Tensor, ...],
        capturable: bool,
        skipped: Tensor | None,
    ) -> None:
        # No reference to the engine, which remembers its plans: the cycle would keep both.
        self.buffer = buffer = engine.buffer
        self.leaves = leaves
        self.skipped = skipped
        self._moments = engine._exp_avg, engine._exp_avg_sq  # the buffer holds them weakly
        self._steps = engine._steps
        self._runs = engine._runs
        self._members = [engine._members[leaf] for leaf in leaves]
        segments = [engine._segment(leaf) for leaf in leaves]
        grad = buffer.grad
        self.views = [grad[s.slice].view(s.shape) for s in segments if s is not None]
        self._grads = list(self.views)  # bound gradients, when last seen
        self._pointers = list(map(Tensor.data_ptr, leaves))
        self._engine_version, self._engine_rates = engine.version, engine.rates
        self._seen_rates = engine.rates[0]
        self._capturable = capturable
        self._versions = buffer.version, engine.version[0]
        self._rates: list[tuple[Tensor, list[_Member | None]]] = []
        rules = {member.run: member.rule for member in self._members}
        self._launches: list[Any] = [
            self._launch(rule, [run for run in rules if rules[run] == rule], capturable)
            for rule in dict.fromkeys(rules.values())
        ]
        self.refresh()

    def is_current(self) -> bool:
        """Whether layout, options, step counts and memory are still those planned for."""
        return (
            self.buffer.version == self._versions[0]
            and self._engine_version[0] == self._versions[1]
            and list(map(Tensor.data_ptr, self.leaves)) == self._pointers
            and (self._engine_rates[0] == self._seen_rates or self._follow_rates())
        )

    def _follow_rates(self) -> bool:
        """Whether learning rates that have changed are still shared within every run.

        Those of a capturable plan are in tensors, which :meth:`refresh` brings up to date.
        """
        if not self._capturable or not _are_shared(self._runs, self._members):
            return False
        self._seen_rates = self._engine_rates[0]
        return True

    @property
    def state(self) -> list[Tensor]:
        """All tensors that a launch reads or writes, besides the buffer's ``flat`` and ``grad``."""
        tensors = [self._steps, *(moment.flat for moment in self._moments)]
        tensors += [rate for rate, _ in self._rates]
        return tensors if self.skipped is None else [*tensors, self.skipped]

    def take_gradients(self) -> bool:
        """Copy gradients that are not in the flat one into it; False if a leaf has none."""
        grads = list(map(_grad_of, self.leaves))
        if all(map(is_, grads, self._grads)):
            return True
        if any(grad is None for grad in grads):
            return False
        targets, strays = [], []
        for index, (grad, view) in enumerate(zip(grads, self.views, strict=True)):
            if grad.layout is not torch.strided:
                name = self._members[index].name
                raise DtypeError(
                    f"parameter '{name}' has a sparse gradient, which Adam cannot use: its moments "
                    "are dense. Use fastsvi.optim.SparseAdam, or a dense gradient "
                    "(torch.nn.Embedding(..., sparse=False))"
                )
            if grad.data_ptr() == view.data_ptr() and grad.stride() == view.stride():
                self._grads[index] = grad
            else:
                self._grads[index] = view
                targets.append(view)
                strays.append(grad)
        if strays:
            with torch.no_grad():
                torch._foreach_copy_(targets, strays)
        return True

    def launch(self) -> None:
        """Update the leaves from ``buffer.grad``. Call ``buffer.touch()`` afterwards."""
        for update in self._launches:
            update()

    def refresh(self) -> None:
        """Copy changed learning rates into the tensors of a capturable plan."""
        for rate, members in self._rates:
            rate.copy_(_vector([0.0 if m is None else m.lr for m in members], like=rate))

    def _launch(self, rule: Rule, mine: list[int], capturable: bool) -> Callable[[], None]:
        """The update of the runs ``mine``, which follow ``rule``."""
        buffer = self.buffer
        # As little of the buffer as possible; but all of it in a graph, where the update is one
        # function of the whole flat tensors, see PureUpdate.
        first, last = (0, len(self._runs) - 1) if capturable else (min(mine), max(mine))
        runs = self._runs[first : last + 1]
        # One per run; None where the run is not to be updated.
        ours = [run.member if i in set(mine) else None for i, run in enumerate(runs, first)]
        members = [member for member in ours if member is not None]
        steps = self._steps[first : last + 1]
        flats = (buffer.flat, buffer.grad, self._moments[0].flat, self._moments[1].flat)

        rates, decays = [m.lr for m in members], [m.lrd for m in members]
        if not capturable and fused.serves(rule, buffer.device, buffer.dtype, rates):
            pieces = [
                fused.Piece(*_cut(flats, run.start, run.stop), step, float(m.lr), m.lrd)
                for run, m, step in zip(runs, ours, steps, strict=True)
                if m is not None
            ]
            ticks = _vector([0.0 if m is None else 1.0 for m in ours], like=steps)
            return fused.FusedLaunch(pieces, steps, ticks, rule)

        lr, lrd = _common(rates), _common(decays)
        if lr is None or capturable:
            lr = torch.zeros_like(steps)
            self._rates.append((lr, ours))
        if lrd is None:
            lrd = _vector([1.0 if m is None else m.lrd for m in ours], like=steps)
        active = None
        if None in ours:
            active = torch.tensor([m is not None for m in ours], device=buffer.device)
        segments = Segments([run.stop - run.start for run in runs], device=buffer.device)
        return partial(
            adam_,
            *_cut(flats, runs[0].start, runs[-1].stop),
            steps,
            segments,
            lr=lr,
            lrd=None if not isinstance(lrd, Tensor) and lrd == 1.0 else lrd,
            active=active,
            skipped=self.skipped,
            **rule._asdict(),
        )


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _cut(flats: Four, start: int, stop: int) -> Four:
    """The same elements of parameters, gradients and both moments."""
    param, grad, exp_avg, exp_avg_sq = flats
    where = slice(start, stop)
    return param[where], grad[where], exp_avg[where], exp_avg_sq[where]


def check_moments(name: str, shape: torch.Size, state: State) -> None:
    """Raise unless ``state`` holds the moments of a parameter of this unconstrained shape."""
    for key in ("exp_avg", "exp_avg_sq"):
        found = state.get(key)
        if found is None or found.shape != shape:
            has = "is missing" if found is None else f"has shape {tuple(found.shape)}"
            raise ShapeError(
                f"optimizer state of parameter '{name}': {key} {has}, the unconstrained parameter "
                f"has shape {tuple(shape)}; load the state of this model and kind of optimizer"
            )


def _joins(before: _Member | None, after: _Member | None) -> bool:
    """Whether two neighbours may form one run."""
    if before is None or after is None:
        return before is after
    # A norm is clipped for each parameter, so those stay apart.
    return before.key == after.key and before.rule.clip_norm is None


def _are_shared(runs: Sequence[_Run], members: Iterable[_Member]) -> bool:
    """Whether members of one run have one learning rate."""
    for member in members:
        leader = runs[member.run].member if 0 <= member.run < len(runs) else None
        if leader is None or not _is_same(member.lr, leader.lr):
            return False
    return True


def _is_same(rate: float | Tensor, other: float | Tensor) -> bool:
    """Whether two learning rates are one; tensors are not read."""
    if isinstance(rate, Tensor) or isinstance(other, Tensor):
        return rate is other
    return rate == other


def _common(values: Sequence[Any]) -> Any:
    """The value that all are, else None. Tensors are the same if they are one object."""
    first = values[0]
    for value in values:
        if value is not first and (isinstance(value, Tensor) or value != first):
            return None
    return first


def _vector(values: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """``[len(values)]`` on the device of ``like``; tensors among the values are not read."""
    if any(isinstance(value, Tensor) for value in values):
        tensors = [torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in values]
        return torch.stack([tensor.reshape(()) for tensor in tensors])
    return torch.tensor(list(values), dtype=like.dtype, device=like.device)
