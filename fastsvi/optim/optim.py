"""``PyroOptim``: one optimizer for parameters that appear while a program runs."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastsvi.errors import CheckpointError, DtypeError, FastSVIWarning, MissingParamError, describe
from fastsvi.optim import state_file
from fastsvi.optim.adagrad_rmsprop import AdagradRMSProp as _AdagradRMSProp
from fastsvi.optim.clipped_adam import ClippedAdam as _ClippedAdam
from fastsvi.optim.dct_adam import DCTAdam as _DCTAdam
from fastsvi.optim.families import family_of
from fastsvi.optim.flat import FlatAdam, FlatPlan, check_moments
from fastsvi.optim.leaf_optimizer import Engine
from fastsvi.optim.options import ByName, OptionError, OptionsLike, check_clip, checker
from fastsvi.optim.per_tensor import Grouped, PerTensor
from fastsvi.params import checkpoint
from fastsvi.poutine.runtime import PARAM_STORE

Constructor = Callable[..., torch.optim.Optimizer]


class PyroOptim:
    """Updates the parameters it is given, whichever they are, each with a step count of its own.

    Every parameter gets its optimizer state when it is first seen, so parameters may appear late
    and may be left out of steps. Adam, AdamW and ClippedAdam update all parameters that lie in a
    buffer of the param store by one fused kernel; other optimizers of ``torch.optim`` update
    parameters with equal options together; any other constructor gets one object per parameter.

    Args:
        optim_constructor: a class of torch optimizers, or a function that makes one from
            ``([tensor], **options)``.
        optim_args: options for the constructor: a dict, or a function of the parameter's name
            ("net.bias") that returns one.
        clip_args: ``{"clip_norm": ...}`` and/or ``{"clip_value": ...}``, or a function of the name
            that returns such: limits to the Euclidean norm of each parameter's gradient and to the
            magnitude of its entries.

    Raises:
        OptionError: an option is unknown or out of range.
        DtypeError: ``optim_args`` is neither a dict nor a function.

    >>> import fastsvi as pyro
    >>> x = pyro.param("doc_optim", torch.tensor([1.0, 2.0]))
    >>> optimizer = PyroOptim(torch.optim.SGD, {"lr": 0.5})
    >>> (x * x).sum().backward()
    >>> optimizer([x.unconstrained()])
    >>> x
    tensor([0., 0.], requires_grad=True)
    """

    _is_scheduled = False  # whether leaves have a scheduler each

    def __init__(
        self,
        optim_constructor: Constructor,
        optim_args: OptionsLike,
        clip_args: OptionsLike | None = None,
    ) -> None:
        self.pt_optim_constructor = optim_constructor
        self.pt_optim_args = optim_args
        self.pt_clip_args = {} if clip_args is None else clip_args
        self._options = ByName("optim_args", optim_args, checker(optim_constructor))
        self._clips = ByName("clip_args", clip_args, check_clip)
        self._family = family_of(optim_constructor)
        self._flat: dict[int, FlatAdam] = {}  # by id of the buffer, which the engine keeps alive
        self._tensors = self._per_tensor_engine()
        self._home = WeakTensorKeyDictionary()  # leaf -> its engine
        self._wrapped = WeakTensorKeyDictionary()  # leaf -> its scheduler, see PyroLRScheduler
        self._pending: dict[str, dict[str, Any]] = {}  # state of parameters not seen so far
        self._leaves: tuple[Tensor, ...] = ()  # of the latest step
        self._teams: list[tuple[Engine, tuple[Tensor, ...]]] = []
        self._store_version = -1

    def __repr__(self) -> str:
        name = getattr(self.pt_optim_constructor, "__name__", self.pt_optim_constructor)
        return f"{type(self).__name__}({name}, {self.pt_optim_args})"

    # --- steps --------------------------------------------------------------------------------

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Update the unconstrained leaves ``params``, and no others, from their gradients.

        A leaf whose gradient is None keeps its value and its state. Further arguments go to the
        optimizer's ``step``.
        """
        leaves = params if type(params) is tuple else _tuple_of(params)
        known = leaves is self._leaves or _are_same(leaves, self._leaves)
        if not known or self._store_version != PARAM_STORE.version:
            self._form_teams(leaves)
        for engine, team in self._teams:
            engine.step(team, *args, **kwargs)

    def capture(self, params: Iterable[Tensor], skipped: Tensor | None = None) -> list[FlatPlan]:
        """Plans whose ``launch`` can be recorded in a graph, one per buffer.

        A launch reads ``buffer.grad``, so bind or fill the gradients first; call
        ``plan.refresh()`` before a replay once learning rates may have changed, and start over
        when ``plan.is_current()`` is no longer true. If ``skipped`` is given, an int64 scalar, a
        launch whose gradient is not finite changes nothing and counts there.

        Raises:
            OptionError: this optimizer updates some of the parameters outside of the flat kernel.
        """
        self._form_teams(_tuple_of(params))
        plans: list[FlatPlan] = []
        for engine, team in self._teams:
            if not isinstance(engine, FlatAdam):
                names = sorted(str(PARAM_STORE.param_name(leaf)) for leaf in team)
                raise OptionError(
                    f"{self!r} cannot be captured: it updates {names} tensor by tensor. Use "
                    "Adam, AdamW or ClippedAdam without amsgrad, maximize and differentiable"
                )
            engine.buffer.sync()
            plans.append(engine.plan(team, capturable=True, skipped=skipped))
        return plans

    def _form_teams(self, leaves: tuple[Tensor, ...]) -> None:
        """Find each leaf's engine, taking in new leaves."""
        teams: dict[int, tuple[Engine, list[Tensor]]] = {}
        for leaf in leaves:
            _require_leaf(leaf)
            engine = self._home.get(leaf)
            if engine is None or (isinstance(engine, FlatAdam) and not _is_in(engine, leaf)):
                engine = self._take_in(leaf)
            teams.setdefault(id(engine), (engine, []))[1].append(leaf)
        self._teams = [(engine, tuple(team)) for engine, team in teams.values()]
        self._leaves = leaves
        self._store_version = PARAM_STORE.version

    def _take_in(self, leaf: Tensor) -> Engine:
        name = PARAM_STORE.param_name(leaf)
        options, clips = self._options.of(name), self._clips.of(name)
        engine = self._flat_engine(leaf, options) or self._tensors
        engine.add(leaf, name, options, clips)
        self._home[leaf] = engine
        self._wrap(leaf, engine)
        if name is not None and name in self._pending:
            self._load(leaf, self._pending.pop(name))
        return engine

    def _flat_engine(self, leaf: Tensor, options: dict[str, Any]) -> FlatAdam | None:
        """The engine of the leaf's buffer, if it has one and the kernel serves its options."""
        family = self._family
        if family is None or not family.serves(options) or not leaf.is_floating_point():
            return None
        place = PARAM_STORE.locate(leaf)
        if place is None:
            return None
        buffer = place[0]
        if id(buffer) not in self._flat:
            self._flat[id(buffer)] = FlatAdam(buffer, family, PARAM_STORE.locate)
        return self._flat[id(buffer)]

    def _wrap(self, leaf: Tensor, engine: Engine) -> None:
        """For subclasses: called once for every new leaf."""

    def _per_tensor_engine(self) -> Engine:
        module = getattr(self.pt_optim_constructor, "__module__", None) or ""
        if isinstance(self.pt_optim_constructor, type) and module.startswith("torch.optim"):
            return Grouped(self.pt_optim_constructor)
        return PerTensor(self.pt_optim_constructor)

    @property
    def optim_objs(self) -> Mapping[Tensor, Any]:
        """Leaf to a torch optimizer of it, or to its scheduler, for all leaves seen so far."""
        return _OptimObjects(self)

    def _object(self, leaf: Tensor) -> Any:
        return self._wrapped.get(leaf) or self._home[leaf].optimizer(leaf)

    # --- state --------------------------------------------------------------------------------

    def get_state(self) -> dict[str, dict[str, Any]]:
        """A copy of the state of every parameter, by name: state dicts in torch's format.

        Tensors that are not in the param store have no name and are left out, with a warning.
        """
        state = dict(self._pending)
        nameless = 0
        for leaf in self._home:
            name = PARAM_STORE.param_name(leaf)
            if name is None:
                nameless += 1
            else:
                state[name] = copy.deepcopy(self._state_dict(leaf))
        if nameless:
            warnings.warn(
                f"the optimizer state of {nameless} tensors is left out: they are not in the param "
                "store (any more), so they have no name to find them by",
                FastSVIWarning,
                stacklevel=2,
            )
        return state

    def _state_dict(self, leaf: Tensor) -> dict[str, Any]:
        found = self._object(leaf)
        if not self._is_scheduled:
            return found.state_dict()
        return {"scheduler": found.state_dict(), "optimizer": found.optimizer.state_dict()}

    def set_state(self, state_dict: Mapping[str, dict[str, Any]]) -> None:
        """Take over a state that :meth:`get_state` returned.

        Parameters that are in the store get their state now, others when they are first seen.

        Raises:
            CheckpointError: ``state_dict`` is of another format; nothing changes.
            ShapeError: the state belongs to a parameter of another shape; nothing changes.
        """
        for name, state in state_dict.items():
            self._check_state(name, state)
        self._pending.update(copy.deepcopy(dict(state_dict)))
        for name in state_dict:
            if name in PARAM_STORE:
                leaf = PARAM_STORE.leaf(name)
                if leaf not in self._home:
                    self._take_in(leaf)  # which looks for its state
                else:
                    self._load(leaf, self._pending.pop(name))

    def _check_state(self, name: str, state: Any) -> None:
        inner = state.get("optimizer", state) if isinstance(state, dict) else None
        if not isinstance(inner, dict) or not {"state", "param_groups"} <= inner.keys():
            raise CheckpointError(
                f"optimizer state of parameter '{name}' is {describe(state)}; expected a dict "
                "with 'state' and 'param_groups', as get_state() returns it"
            )
        if self._is_scheduled != ("scheduler" in state):
            raise CheckpointError(
                f"optimizer state of parameter '{name}' was saved "
                f"{'without' if self._is_scheduled else 'with'} a learning rate scheduler, and "
                f"this optimizer works {'with' if self._is_scheduled else 'without'} one; load it "
                "into an optimizer of the same kind"
            )
        if self._family is not None and name in PARAM_STORE:
            for moments in inner["state"].values():
                check_moments(name, PARAM_STORE.leaf(name).shape, moments)

    def _load(self, leaf: Tensor, state: dict[str, Any]) -> None:
        target = self._object(leaf)
        if self._is_scheduled:
            target.load_state_dict(state["scheduler"])
            target, state = target.optimizer, state["optimizer"]
        target.load_state_dict(state)

    def save(self, filename: str | os.PathLike[str]) -> None:
        """Write the state to a file: safetensors with a JSON header, no pickle.

        Raises:
            CheckpointError: a scheduler's state holds something other than numbers and tensors.
        """
        header, tensors = state_file.encode(self.get_state())
        checkpoint.write(filename, tensors, {"optimizer": header})

    def load(self, filename: str | os.PathLike[str], map_location: Any = None) -> None:
        """Read a state that :meth:`save` wrote; ``map_location`` as for ``torch.load``.

        Raises:
            CheckpointError: the file is damaged, unsafe, or holds no optimizer state.
        """
        tensors, header = checkpoint.read(filename)
        if not isinstance(header, dict) or not isinstance(header.get("optimizer"), dict):
            raise CheckpointError(
                f"{os.fspath(filename)!r} holds no optimizer state; it was not written by "
                "PyroOptim.save()"
            )
        state = state_file.decode(header["optimizer"], tensors, os.fspath(filename))
        self.set_state(state_file.move(state, map_location))


class _OptimObjects(Mapping[Tensor, Any]):
    """What Pyro keeps in a dict, made when asked for."""

    def __init__(self, owner: PyroOptim) -> None:
        self._owner = owner

    def __getitem__(self, leaf: Tensor) -> Any:
        if leaf not in self._owner._home:
            raise MissingParamError(
                f"{self._owner!r} has not updated {describe(leaf)}; leaves appear here with "
                "their first step. The key is the unconstrained leaf, as in "
                "optim_objs[fastsvi.param('x').unconstrained()]"
            )
        return self._owner._object(leaf)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(list(self._owner._home))

    def __len__(self) -> int:
        return len(self._owner._home)

    def __contains__(self, leaf: object) -> bool:
        return isinstance(leaf, Tensor) and leaf in self._owner._home


def _are_same(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _is_in(engine: FlatAdam, leaf: Tensor) -> bool:
    place = PARAM_STORE.locate(leaf)
    return place is not None and place[0] is engine.buffer


def _tuple_of(params: Iterable[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise DtypeError(
            f"an optimizer takes an iterable of unconstrained leaves, found {describe(params)}; "
            "write optim([leaf]), with leaf = fastsvi.param('x').unconstrained()"
        )
    return tuple(params)


def _require_leaf(leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise DtypeError(
            f"an optimizer takes unconstrained leaves, found {describe(leaf)} among them"
        )
    if not leaf.is_leaf:
        raise DtypeError(
            f"an optimizer takes leaves, found the result of a computation "
            f"({describe(leaf.detach())}); give the unconstrained leaf of a constrained value: "
            "value.unconstrained()"
        )


def AdagradRMSProp(optim_args: OptionsLike, clip_args: OptionsLike | None = None) -> PyroOptim:
    """:class:`fastsvi.optim.adagrad_rmsprop.AdagradRMSProp` for parameters that appear by name."""
    return PyroOptim(_AdagradRMSProp, optim_args, clip_args)


def ClippedAdam(optim_args: OptionsLike, clip_args: OptionsLike | None = None) -> PyroOptim:
    """:class:`fastsvi.optim.clipped_adam.ClippedAdam`, fused over the param store's buffers.

    >>> ClippedAdam({"lr": 0.01, "lrd": 0.1 ** (1 / 1000)})
    PyroOptim(ClippedAdam, {'lr': 0.01, 'lrd': 0.9977000638225533})
    """
    return PyroOptim(_ClippedAdam, optim_args, clip_args)


def DCTAdam(optim_args: OptionsLike, clip_args: OptionsLike | None = None) -> PyroOptim:
    """:class:`fastsvi.optim.dct_adam.DCTAdam` for parameters that appear by name."""
    return PyroOptim(_DCTAdam, optim_args, clip_args)
