"""Programs that return a trace, written once for fastsvi and for Pyro."""

from __future__ import annotations

import torch
from torch.distributions import constraints

PROGRAMS = {}


def program(fn):
    """Register ``fn(lib) -> Trace``."""
    PROGRAMS[fn.__name__] = fn
    return fn


DATA = torch.tensor([1.0, -0.5, 0.25, 2.0, 0.0])


@program
def latent_and_observed(lib):
    def model():
        z = lib.pyro.sample("z", lib.dist.Normal(0.0, 2.0))
        lib.pyro.sample("x", lib.dist.Normal(z, 1.0), obs=torch.tensor(0.3))
        return z

    return lib.poutine.trace(model).get_trace()


@program
def params(lib):
    def model():
        loc = lib.pyro.param("loc", torch.tensor(0.5))
        scale = lib.pyro.param("scale", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
        lib.pyro.param("loc")
        return lib.pyro.sample("z", lib.dist.Normal(loc, scale).to_event(1))

    return lib.poutine.trace(model).get_trace()


@program
def param_only(lib):
    def model():
        loc = lib.pyro.param("loc", torch.tensor(0.5))
        lib.pyro.sample("z", lib.dist.Normal(loc, 1.0))

    return lib.poutine.trace(model, param_only=True).get_trace()


@program
def one_plate(lib):
    def model():
        loc = lib.pyro.sample("loc", lib.dist.Normal(0.0, 1.0))
        with lib.pyro.plate("data", len(DATA)):
            lib.pyro.sample("obs", lib.dist.Normal(loc, 1.0), obs=DATA)

    return lib.poutine.trace(model).get_trace()


@program
def nested_plates_automatic_dims(lib):
    def model():
        with lib.pyro.plate("a", 2):
            x = lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))
            with lib.pyro.plate("b", 3):
                y = lib.pyro.sample("y", lib.dist.Normal(x, 1.0))
                with lib.pyro.plate("c", 4):
                    lib.pyro.sample(
                        "z", lib.dist.Normal(y.unsqueeze(-1), torch.ones(5)).to_event(1)
                    )

    return lib.poutine.trace(model).get_trace()


@program
def nested_plates_given_dims(lib):
    def model():
        x_axis = lib.pyro.plate("x_axis", 3, dim=-2)
        y_axis = lib.pyro.plate("y_axis", 2, dim=-3)
        with x_axis:
            x = lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))
        with y_axis:
            y = lib.pyro.sample("y", lib.dist.Normal(0.0, 1.0))
        with x_axis, y_axis:
            lib.pyro.sample("xy", lib.dist.Normal(x + y, 1.0))
        with y_axis, x_axis:  # with batch dims of its own, left and right of the plates
            lib.pyro.sample("yx", lib.dist.Normal(torch.zeros(7, 1, 1, 4), 1.0))

    return lib.poutine.trace(model).get_trace()


@program
def subsampled_plate(lib):
    def model():
        with lib.pyro.plate("data", 5, subsample_size=2) as i:
            lib.pyro.sample("obs", lib.dist.Normal(0.0, 1.0), obs=DATA[i])

    return lib.poutine.trace(model).get_trace()


@program
def given_subsample(lib):
    def model():
        with lib.pyro.plate("data", 5, subsample=torch.tensor([3, 1])) as i:
            lib.pyro.sample("obs", lib.dist.Normal(0.0, 1.0), obs=DATA[i])

    return lib.poutine.trace(model).get_trace()


@program
def nested_subsampling(lib):
    def model():
        rows = lib.pyro.plate("rows", 6, subsample_size=3, dim=-2)
        columns = lib.pyro.plate("columns", 4, subsample_size=2, dim=-1)
        with rows:
            x = lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))
            with columns:
                lib.pyro.sample("y", lib.dist.Normal(x, 1.0))

    return lib.poutine.trace(model).get_trace()


@program
def params_in_a_subsampled_plate(lib):
    def model():
        with lib.pyro.plate("data", 5, subsample_size=2):
            loc = lib.pyro.param("loc", torch.arange(5.0), event_dim=0)
            vector = lib.pyro.param("vector", torch.ones(5, 3), event_dim=1)
            shared = lib.pyro.param("shared", torch.ones(3), event_dim=1)
            data = lib.pyro.subsample(DATA, event_dim=0)
            lib.pyro.sample("obs", lib.dist.Normal(loc, 1.0), obs=data)
            assert vector.shape == (2, 3)
            assert shared.shape == (3,)
        return loc

    return lib.poutine.trace(model).get_trace()


@program
def sequential_plate(lib):
    def model():
        loc = lib.pyro.sample("loc", lib.dist.Normal(0.0, 1.0))
        for i in lib.pyro.plate("data", len(DATA)):
            assert type(i) is int
            lib.pyro.sample(f"obs_{i}", lib.dist.Normal(loc, 1.0), obs=DATA[i])

    return lib.poutine.trace(model, graph_type="dense").get_trace()


@program
def sequential_subsampled_plate(lib):
    def model():
        for i in lib.pyro.plate("data", len(DATA), subsample_size=2):
            lib.pyro.sample(f"z_{i}", lib.dist.Normal(0.0, 1.0))
            lib.pyro.sample(f"obs_{i}", lib.dist.Normal(0.0, 1.0), obs=DATA[i])

    return lib.poutine.trace(model).get_trace()


@program
def vectorized_in_sequential(lib):
    def model():
        for i in lib.pyro.plate("outer", 2):
            with lib.pyro.plate(f"inner_{i}", 3):
                lib.pyro.sample(f"x_{i}", lib.dist.Normal(0.0, 1.0))

    return lib.poutine.trace(model, graph_type="dense").get_trace()


@program
def sequential_in_vectorized(lib):
    def model():
        inner = lib.pyro.plate("inner", 2)
        with lib.pyro.plate("outer", 3):
            for i in inner:
                lib.pyro.sample(f"x_{i}", lib.dist.Normal(0.0, 1.0))

    return lib.poutine.trace(model, graph_type="dense").get_trace()


@program
def plate_stack(lib):
    def model():
        with lib.pyro.plate_stack("image", (2, 3), rightmost_dim=-2):
            lib.pyro.sample("pixels", lib.dist.Normal(torch.zeros(4), 1.0))

    return lib.poutine.trace(model).get_trace()


@program
def plate_of_any_size(lib):
    def model():
        with lib.pyro.plate("data"):
            lib.pyro.sample("x", lib.dist.Normal(torch.zeros(3), 1.0))

    return lib.poutine.trace(model).get_trace()


@program
def plate_as_decorator(lib):
    @lib.pyro.plate("data", 4)
    def model():
        lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))

    return lib.poutine.trace(model).get_trace()


@program
def deterministic_and_factor(lib):
    def model():
        z = lib.pyro.sample("z", lib.dist.Normal(torch.zeros(3), 1.0).to_event(1))
        lib.pyro.deterministic("square", z**2)
        with lib.pyro.plate("data", 2):
            lib.pyro.factor("penalty", -z.sum().expand(2))

    return lib.poutine.trace(model).get_trace()


@program
def scale_and_mask(lib):
    def model():
        with lib.poutine.scale(scale=3.0), lib.poutine.mask(mask=torch.tensor([True, False])):
            with lib.pyro.plate("data", 2):
                lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))
            with lib.poutine.mask(mask=False):
                lib.pyro.sample("y", lib.dist.Normal(0.0, 1.0))
        with lib.poutine.mask(mask=True), lib.poutine.scale(scale=torch.tensor(0.5)):
            lib.pyro.sample("z", lib.dist.Normal(0.0, 1.0))

    return lib.poutine.trace(model).get_trace()


@program
def replayed(lib):
    def guide():
        lib.pyro.sample("z", lib.dist.Normal(1.0, 0.1), infer={"note": 1})
        with lib.pyro.plate("data", 5, subsample_size=2):
            lib.pyro.sample("local", lib.dist.Normal(0.0, 1.0))

    def model():
        z = lib.pyro.sample("z", lib.dist.Normal(0.0, 1.0))
        with lib.pyro.plate("data", 5, subsample_size=2) as i:
            local = lib.pyro.sample("local", lib.dist.Normal(z, 1.0))
            lib.pyro.sample("obs", lib.dist.Normal(local, 1.0), obs=DATA[i])

    guide_trace = lib.poutine.trace(guide).get_trace()
    return lib.poutine.trace(lib.poutine.replay(model, trace=guide_trace)).get_trace()


def chain(lib):
    """season -> rain -> wet."""

    def model():
        season = lib.pyro.sample("season", lib.dist.Normal(0.0, 1.0))
        rain = lib.pyro.sample("rain", lib.dist.Normal(season, 1.0))
        return lib.pyro.sample("wet", lib.dist.Normal(2.0 * rain, 1.0))

    return model


@program
def conditioned(lib):
    model = lib.poutine.condition(chain(lib), data={"rain": torch.tensor(1.0), "absent": None})
    return lib.poutine.trace(model).get_trace()


@program
def conditioned_on_a_trace(lib):
    trace = lib.poutine.trace(chain(lib)).get_trace()
    return lib.poutine.trace(lib.poutine.condition(chain(lib), data=trace)).get_trace()


@program
def intervened(lib):
    model = lib.poutine.do(chain(lib), data={"rain": torch.tensor(1.0)})
    return lib.poutine.trace(model).get_trace()


@program
def counterfactual(lib):
    """Observe the factual rain, and ask for the world in which it had rained by two."""
    model = lib.poutine.do(chain(lib), data={"rain": 2.0})
    model = lib.poutine.condition(model, data={"rain": torch.tensor(0.5)})
    return lib.poutine.trace(model).get_trace()


@program
def unconditioned(lib):
    model = lib.poutine.condition(chain(lib), data={"wet": torch.tensor(1.0)})
    return lib.poutine.trace(lib.poutine.uncondition(model)).get_trace()


@program
def blocked(lib):
    model = lib.poutine.condition(chain(lib), data={"wet": torch.tensor(1.0)})
    return lib.poutine.trace(lib.poutine.block(model, hide=["season"])).get_trace()


@program
def lifted(lib):
    def model():
        s = lib.pyro.param("s", torch.tensor(0.5), constraint=constraints.positive)
        t = lib.pyro.param("t", torch.tensor(0.5))
        assert lib.pyro.param("s", torch.tensor(0.5)) is s
        lib.pyro.sample("z", lib.dist.Normal(t, s))

    prior = {"s": lib.dist.Exponential(torch.tensor(0.3))}
    return lib.poutine.trace(lib.poutine.lift(model, prior=prior)).get_trace()


@program
def lifted_by_one_distribution(lib):
    def model():
        s = lib.pyro.param("s", torch.zeros(2))
        lib.pyro.sample("z", lib.dist.Normal(s, 1.0).to_event(1))

    prior = lib.dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return lib.poutine.trace(lib.poutine.lift(model, prior=prior)).get_trace()


@program
def substituted(lib):
    def model():
        a = lib.pyro.param("a", torch.tensor(0.5))
        lib.pyro.sample("x", lib.dist.Normal(a, 1.0))

    model = lib.poutine.substitute(model, data={"a": torch.tensor(0.3)})
    return lib.poutine.trace(model).get_trace()


@program
def inference_config(lib):
    def config(site):
        return {"note": site["name"]} if site["type"] == "sample" else {}

    return lib.poutine.trace(lib.poutine.infer_config(chain(lib), config)).get_trace()


@program
def seeded(lib):
    return lib.poutine.trace(lib.poutine.seed(chain(lib), rng_seed=7)).get_trace()


@program
def equalized(lib):
    def model():
        for name in ("a_std", "b_std", "b_mean"):
            lib.pyro.sample(name, lib.dist.Normal(0.0, 1.0))

    return lib.poutine.trace(lib.poutine.equalize(model, [".+_std"])).get_trace()


@program
def equalized_keeping_distributions(lib):
    def model():
        for name in ("a", "b"):
            lib.pyro.sample(name, lib.dist.Normal(0.0, 1.0))

    return lib.poutine.trace(lib.poutine.equalize(model, ["a", "b"], keep_dist=True)).get_trace()


@program
def partly_observed(lib):
    def model():
        with lib.pyro.plate("data", 5):
            lib.pyro.sample(
                "x",
                lib.dist.Normal(torch.zeros(3), 1.0).to_event(1),
                obs=torch.ones(5, 3),
                obs_mask=torch.tensor([True, False, True, True, False]),
            )

    return lib.poutine.trace(model).get_trace()


@program
def markov_chain(lib):
    def model():
        x = torch.zeros(())
        for t in lib.pyro.markov(range(4), history=2):
            x = lib.pyro.sample(f"x_{t}", lib.dist.Normal(x, 1.0))

    return lib.poutine.trace(model).get_trace()


@program
def markov_recursion(lib):
    def model():
        @lib.pyro.markov
        def visit(name, depth):
            lib.pyro.sample(name, lib.dist.Normal(0.0, 1.0))
            if depth:
                visit(name + "l", depth - 1)
                visit(name + "r", depth - 1)

        visit("x", 2)

    return lib.poutine.trace(model).get_trace()


@program
def enumerated(lib):
    def model():
        p = torch.tensor([0.2, 0.3, 0.5])
        x = lib.pyro.sample("x", lib.dist.Categorical(p), infer={"enumerate": "parallel"})
        with lib.pyro.plate("data", 2):
            lib.pyro.sample("y", lib.dist.Bernoulli(p[x.long()]), infer={"enumerate": "parallel"})

    return lib.poutine.trace(lib.poutine.enum(model, first_available_dim=-2)).get_trace()


@program
def enumerated_markov_chain(lib):
    def model():
        transition = torch.tensor([[0.3, 0.7], [0.8, 0.2]])
        x = 0
        for t in lib.pyro.markov(range(3)):
            fn = lib.dist.Categorical(transition[x])
            x = lib.pyro.sample(f"x_{t}", fn, infer={"enumerate": "parallel"})
            lib.pyro.sample(f"y_{t}", lib.dist.Normal(x.float(), 1.0), obs=torch.tensor(0.5))

    return lib.poutine.trace(lib.poutine.enum(model, first_available_dim=-1)).get_trace()


@program
def module(lib):
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))

    def model():
        lib.pyro.module("net", net)
        lib.pyro.sample("y", lib.dist.Normal(net(torch.ones(2)), 1.0).to_event(1))

    return lib.poutine.trace(model).get_trace()


@program
def blocked_plate(lib):
    if lib.pyro.__name__ == "pyro":
        from pyro.poutine.plate_messenger import block_plate
    else:
        from fastsvi.poutine.plate_messenger import block_plate

    def model():
        with lib.pyro.plate("a", 2), lib.pyro.plate("b", 3):
            with block_plate("a"):
                lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))
                with lib.pyro.plate("c", 4):
                    lib.pyro.sample("y", lib.dist.Normal(0.0, 1.0))
            with block_plate(dim=-2):
                lib.pyro.sample("z", lib.dist.Normal(0.0, 1.0))

    return lib.poutine.trace(model).get_trace()
