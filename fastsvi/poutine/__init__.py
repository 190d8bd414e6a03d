"""Effect handlers: what lies between a model and the inference that runs it.

A primitive such as ``sample`` sends a :class:`Message` through the stack of handlers, each of which
may look at it or change it. Many algorithms are a few handlers:

>>> import torch, fastsvi as pyro, fastsvi.distributions as dist
>>> def model():
...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
...     pyro.sample("obs", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))
>>> def guide():
...     pyro.sample("loc", dist.Normal(0.5, 0.7))
>>> guide_trace = trace(guide).get_trace()
>>> model_trace = trace(replay(model, trace=guide_trace)).get_trace()
>>> elbo = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
"""

from fastsvi.poutine.handlers import (
    block,
    broadcast,
    condition,
    do,
    enum,
    equalize,
    escape,
    infer_config,
    lift,
    markov,
    mask,
    queue,
    reparam,
    replay,
    scale,
    seed,
    substitute,
    trace,
    uncondition,
)
from fastsvi.poutine.log_density import DensityMessenger, log_density
from fastsvi.poutine.messenger import Messenger, unwrap
from fastsvi.poutine.plate_messenger import block_plate
from fastsvi.poutine.runtime import Message, NonlocalExit, get_mask, get_plates
from fastsvi.poutine.trace_struct import Trace
from fastsvi.poutine.validation import enable_validation, is_validation_enabled

__all__ = [
    "DensityMessenger",
    "Message",
    "Messenger",
    "NonlocalExit",
    "Trace",
    "block",
    "block_plate",
    "broadcast",
    "condition",
    "do",
    "enable_validation",
    "enum",
    "equalize",
    "escape",
    "get_mask",
    "get_plates",
    "infer_config",
    "is_validation_enabled",
    "lift",
    "log_density",
    "markov",
    "mask",
    "queue",
    "reparam",
    "replay",
    "scale",
    "seed",
    "substitute",
    "trace",
    "uncondition",
    "unwrap",
]
