"""The stack: installing, removing, dispatch, and what is left of it after exceptions."""

from __future__ import annotations

import gc

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.messenger import Messenger, block_messengers, unwrap
from fastsvi.poutine.runtime import (
    STACK,
    Message,
    am_i_wrapped,
    apply_stack,
    effectful,
    get_mask,
    get_plates,
)


@pytest.fixture(autouse=True)
def empty_stack():
    assert STACK == []
    yield
    gc.collect()
    assert STACK == []


class Recorder(Messenger):
    def __init__(self, log, label):
        super().__init__()
        self.log, self.label = log, label

    def _process_message(self, msg):
        self.log.append(("down", self.label))
        super()._process_message(msg)

    def _postprocess_message(self, msg):
        self.log.append(("up", self.label))
        super()._postprocess_message(msg)


def test_order_of_processing():
    log = []
    with Recorder(log, "outer"), Recorder(log, "inner"):
        pyro.sample("x", dist.Normal(0.0, 1.0))
    assert log == [("down", "inner"), ("down", "outer"), ("up", "outer"), ("up", "inner")]


def test_stop_hides_the_message_from_outer_handlers():
    class Stop(Messenger):
        def _pyro_sample(self, msg):
            msg.stop = True

    log = []
    with Recorder(log, "outer"), Stop(), Recorder(log, "inner"):
        pyro.sample("x", dist.Normal(0.0, 1.0))
    assert log == [("down", "inner"), ("up", "inner")]


def test_pyro_style_handler_with_item_access(lib):
    """A handler as users write it for Pyro: dict access, mangled keys, continuation."""
    if lib.pyro.__name__ == "pyro":
        from pyro.poutine.messenger import Messenger as Base
    else:
        Base = Messenger

    class Tripling(Base):
        def _pyro_sample(self, msg):
            assert msg["type"] == "sample"
            msg["_mine"] = msg["infer"].get("factor", 1)
            if msg["name"] == "fixed":
                msg["value"] = torch.tensor(5.0)
                msg["done"] = True

        def _pyro_post_sample(self, msg):
            msg["value"] = msg["value"] * msg["_mine"]

    fn = lib.dist.Delta(torch.tensor(2.0))
    with Tripling():
        assert lib.pyro.sample("x", fn, infer={"factor": 3}) == 6.0
        assert lib.pyro.sample("fixed", fn) == 5.0


def test_a_dict_message_is_accepted():
    fields = {
        "type": "sample",
        "name": "x",
        "fn": lambda: torch.tensor(2.0),
        "args": (),
        "kwargs": {},
        "value": None,
        "is_observed": False,
        "mine": 1,
    }
    apply_stack(fields)
    assert fields["value"] == 2.0
    assert fields["done"]
    assert fields["mine"] == 1


def test_register_and_unregister():
    class Mine(Messenger):
        pass

    @Mine.register(type="sample")
    def observe_seven(msg):
        msg.value = torch.tensor(7.0)

    with Mine():
        assert pyro.sample("x", dist.Normal(0.0, 1.0)) == 7.0
    Mine.unregister(observe_seven, type="sample")
    with Mine():
        assert pyro.sample("x", dist.Normal(0.0, 1.0)) != 7.0
    assert not hasattr(Messenger, "_pyro_sample")
    with pytest.raises(HandlerError, match="type"):
        Mine.register(observe_seven)


def test_effectful():
    @effectful(type="shout")
    def shout(word):
        return word.upper()

    class Log(Messenger):
        def __init__(self):
            super().__init__()
            self.seen = []

        def _pyro_post_shout(self, msg):
            self.seen.append((msg.name, msg.args, msg.value, msg.infer, msg.is_observed))

    assert shout("a") == "A"
    assert effectful(shout, type="other") is shout
    with Log() as log:
        assert shout("a", name="site") == "A"
        assert shout("a", name="seen", obs="B", infer={"k": 1}) == "B"
    assert log.seen == [
        ("site", ("a",), "A", {}, False),
        ("seen", ("a",), "B", {"k": 1}, True),
    ]
    with pytest.raises(TypeError, match="type of message"):
        effectful(len)


def test_installing_twice_is_an_error():
    handler = Messenger()
    with handler, pytest.raises(ValueError, match="already installed"), handler:
        pass


def test_leaving_out_of_order_is_an_error():
    outer, inner = Messenger(), Messenger()
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(ValueError, match="innermost"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)


@pytest.mark.parametrize("handler", [poutine.trace, poutine.block, poutine.markov])
def test_wrapping_something_that_is_no_function(handler):
    with pytest.raises(ValueError, match="found"):
        handler(3)


def test_exception_clears_the_stack():
    def model():
        with pyro.plate("a", 2), poutine.scale(scale=2.0), pyro.plate("b", 3):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        poutine.trace(poutine.block(model)).get_trace()
    assert STACK == []
    with pyro.plate("a", 2), pyro.plate("b", 3) as b:
        assert b.shape == (3,)
        assert [f.dim for f in get_plates()] == [-1, -2]


def test_exception_in_a_sequential_plate():
    """The loop's generator is suspended while the exception passes; its frame must go too."""
    kept = None

    def model():
        for i in pyro.plate("loop", 3):
            with pyro.plate(f"inner_{i}", 2):
                raise KeyError("mine")

    try:
        poutine.block(model)()
    except KeyError as error:
        kept = error  # keeps the generator alive through its traceback
        assert STACK == []
    with poutine.block(), pyro.plate("inner_0", 2):
        kept.__traceback__ = None
        del kept
        gc.collect()  # now the generator is closed: the handlers here must survive that
        assert len(STACK) == 2


def test_late_closing_of_a_generator_leaves_other_handlers_alone():
    loop = iter(pyro.plate("loop", 3))
    next(loop)
    with poutine.trace() as tracer:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        del loop  # its frame stands below the trace handler's
        gc.collect()
        pyro.sample("y", dist.Normal(0.0, 1.0))
    assert tracer.trace.stochastic_nodes == ["x", "y"]


def test_break_out_of_a_sequential_plate():
    for i in pyro.plate("loop", 3):
        if i == 1:
            break
    assert STACK == []


def test_failing_plate_takes_no_dim():
    with pyro.plate("a", 2):
        with pytest.raises(ValueError, match="collide"), pyro.plate("b", 3, dim=-1):
            pass
        with pyro.plate("b", 3):
            assert [f.dim for f in get_plates()] == [-1, -2]


def test_handled_functions_bind_as_methods():
    class Model:
        scale = 2.0

        @poutine.scale(scale=3.0)
        def run(self, loc):
            return pyro.sample("x", dist.Normal(loc, self.scale))

    trace = poutine.trace(Model().run).get_trace(1.0)
    assert trace.nodes["x"].scale == 3.0
    assert trace.nodes["x"].fn.loc == 1.0


def test_handled_functions_keep_name_and_doc():
    def model():
        """My model."""

    for handled in (poutine.trace(model), poutine.block(model), poutine.markov(model)):
        assert handled.__name__ == "model"
        assert handled.__doc__ == "My model."


def test_unwrap():
    def model(self=None):
        pass

    assert unwrap(model) is model
    assert unwrap(poutine.block(poutine.scale(model, scale=2.0))) is model

    class Model:
        run = poutine.block(model)

    assert unwrap(Model().run) is model


def test_handler_as_decorator_and_context(lib):
    @lib.poutine.condition(data={"x": torch.tensor(1.0)})
    def model():
        return lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))

    assert model() == 1.0
    with lib.poutine.condition(data={"x": torch.tensor(2.0)}):
        assert lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0)) == 2.0


def test_get_mask_and_plates(lib):
    from pyro.poutine.runtime import get_plates as theirs

    plates = theirs if lib.pyro.__name__ == "pyro" else get_plates
    assert lib.poutine.get_mask() is None
    with lib.poutine.mask(mask=True), lib.poutine.mask(mask=False), lib.pyro.plate("a", 2):
        assert lib.poutine.get_mask() is False
        assert [(f.name, f.dim) for f in plates()] == [("a", -1)]


def test_inspecting_leaves_no_mark_in_a_trace():
    with poutine.trace() as tracer:
        assert get_mask() is None
    assert len(tracer.trace) == 0


def test_block_messengers():
    outer, inner = poutine.scale(scale=2.0), poutine.mask(mask=False)
    with outer, inner:
        with block_messengers(lambda m: m is outer) as muted:
            assert muted == [outer]
            with poutine.trace() as tracer:
                pyro.sample("x", dist.Normal(0.0, 1.0))
        assert list(STACK) == [outer, inner]
    assert tracer.trace.nodes["x"].scale == 1.0
    assert tracer.trace.nodes["x"].mask is False


def test_am_i_wrapped():
    assert not am_i_wrapped()
    with Messenger():
        assert am_i_wrapped()


def test_continuation_runs_last():
    seen = []

    class WithContinuation(Messenger):
        def _pyro_sample(self, msg):
            msg.continuation = lambda m: seen.append(m.value)

    with WithContinuation():
        value = pyro.sample("x", dist.Normal(0.0, 1.0))
    assert seen[0] is value


def test_pyro_import_paths():
    """Modules that Pyro programs import handlers from, and Pyro's names in them."""
    from fastsvi.poutine.block_messenger import BlockMessenger  # noqa: F401
    from fastsvi.poutine.broadcast_messenger import BroadcastMessenger  # noqa: F401
    from fastsvi.poutine.condition_messenger import ConditionMessenger  # noqa: F401
    from fastsvi.poutine.do_messenger import DoMessenger  # noqa: F401
    from fastsvi.poutine.enum_messenger import EnumMessenger  # noqa: F401
    from fastsvi.poutine.equalize_messenger import EqualizeMessenger  # noqa: F401
    from fastsvi.poutine.escape_messenger import EscapeMessenger  # noqa: F401
    from fastsvi.poutine.handlers import trace  # noqa: F401
    from fastsvi.poutine.indep_messenger import CondIndepStackFrame, IndepMessenger  # noqa: F401
    from fastsvi.poutine.infer_config_messenger import InferConfigMessenger  # noqa: F401
    from fastsvi.poutine.lift_messenger import LiftMessenger  # noqa: F401
    from fastsvi.poutine.markov_messenger import MarkovMessenger  # noqa: F401
    from fastsvi.poutine.mask_messenger import MaskMessenger  # noqa: F401
    from fastsvi.poutine.plate_messenger import PlateMessenger, block_plate  # noqa: F401
    from fastsvi.poutine.reentrant_messenger import ReentrantMessenger  # noqa: F401
    from fastsvi.poutine.reparam_messenger import ReparamMessenger  # noqa: F401
    from fastsvi.poutine.replay_messenger import ReplayMessenger  # noqa: F401
    from fastsvi.poutine.runtime import (  # noqa: F401
        _PYRO_PARAM_STORE,
        _PYRO_STACK,
        InferDict,
        NonlocalExit,
    )
    from fastsvi.poutine.scale_messenger import ScaleMessenger  # noqa: F401
    from fastsvi.poutine.seed_messenger import SeedMessenger  # noqa: F401
    from fastsvi.poutine.subsample_messenger import SubsampleMessenger  # noqa: F401
    from fastsvi.poutine.substitute_messenger import SubstituteMessenger  # noqa: F401
    from fastsvi.poutine.trace_messenger import TraceHandler, TraceMessenger  # noqa: F401
    from fastsvi.poutine.trace_struct import Trace  # noqa: F401
    from fastsvi.poutine.uncondition_messenger import UnconditionMessenger  # noqa: F401
    from fastsvi.poutine.util import prune_subsample_sites  # noqa: F401

    assert _PYRO_STACK is STACK
    assert _PYRO_PARAM_STORE is pyro.get_param_store()
    assert Message is poutine.Message
