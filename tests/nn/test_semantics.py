"""PyroModule under both libraries: names and order of sites, store keys, values, shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributions import constraints


def regression(lib):
    class Regression(lib.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = lib.nn.PyroModule[nn.Linear](3, 2)
            prior = lib.dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2)
            self.linear.weight = lib.nn.PyroSample(prior)
            self.plain = nn.Linear(2, 2)
            self.scale = lib.nn.PyroParam(torch.tensor(0.5), constraint=constraints.positive)

        def forward(self, x, y=None):
            loc = self.plain(self.linear(x))
            with lib.pyro.plate("rows", len(x)):
                return lib.pyro.sample("y", lib.dist.Normal(loc, self.scale).to_event(1), obs=y)

    return Regression()


def test_sites_of_a_model(same, traced):
    def program(lib):
        return traced(lib, regression(lib), torch.ones(4, 3), torch.zeros(4, 2))

    rows = same(program)
    assert [(kind, name) for kind, name, *_ in rows] == [
        ("param", "plain$$$weight"),
        ("param", "plain$$$bias"),
        ("sample", "linear.weight"),
        ("param", "linear.bias"),
        ("sample", "rows"),
        ("param", "scale"),
        ("sample", "y"),
        ("return", "_RETURN"),
    ]


def test_names_of_parameters(same):
    def program(lib):
        model = regression(lib)
        model(torch.ones(4, 3))
        return [
            [name for name, _ in model.named_parameters()],
            list(model.named_pyro_params()),
            list(model.named_pyro_params(prefix="m", recurse=False)),
            list(model.state_dict()),
            [module._pyro_name for module in (model, model.linear)],
        ]

    same(program)


def test_a_name_of_the_root(same, traced):
    def program(lib):
        root = lib.nn.PyroModule("root")
        root.child = lib.nn.PyroModule("ignored")
        root.child.z = lib.nn.PyroSample(lib.dist.Normal(0.0, 1.0))
        root.child.p = nn.Parameter(torch.zeros(2))
        root.forward = lambda: (root.child.z, root.child.p)
        return traced(lib, root)

    assert [row[1] for row in same(program)][:2] == ["root.child.z", "root.child.p"]


def test_samples_are_drawn_once_per_outermost_call(same):
    def program(lib):
        class Inner(lib.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.z = lib.nn.PyroSample(lib.dist.Normal(0.0, 1.0))

            def forward(self):
                return self.z

        class Outer(lib.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.inner = Inner()
                self.w = lib.nn.PyroSample(lambda self: lib.dist.Normal(self.inner.z, 1.0))
                self.square = lib.nn.PyroSample(lambda self: self.w**2)

            def forward(self):
                return [self.inner(), self.inner.z, self.inner(), self.w, self.w, self.square]

            @lib.nn.pyro_method
            def method(self):
                return [self(), self.w]

        outer = Outer()
        first, second = outer(), outer()
        assert first[0] is first[1] is first[2]
        assert first[3] is first[4]
        assert first[0] is not second[0]
        nested, w = outer.method()
        assert nested[3] is w
        with lib.poutine.trace() as record:
            outer()
        kinds = [(name, site["is_observed"]) for name, site in record.trace.nodes.items()]
        return [first, second, nested, outer.inner.z, outer.w, kinds]

    same(program)


def test_reads_outside_of_calls(same):
    def program(lib):
        model = regression(lib)
        with lib.poutine.trace() as record:
            values = [model.scale, model.linear.weight, model.linear.weight, model.plain.bias]
        return values, list(record.trace.nodes), model.scale.unconstrained()

    same(program)


def test_attributes_of_every_kind_overwrite_each_other(same):
    kinds = ["param", "parameter", "sample", "module", "pyro_module", "tensor", "buffer", "number"]

    def make(lib, kind, size):
        return {
            "param": lambda: lib.nn.PyroParam(torch.ones(size), constraints.positive),
            "parameter": lambda: nn.Parameter(torch.zeros(size)),
            "sample": lambda: lib.nn.PyroSample(lib.dist.Normal(0.0, 1.0).expand([size])),
            "module": lambda: nn.Linear(size, 1),
            "pyro_module": lambda: lib.nn.PyroModule[nn.Linear](size, 1),
            "tensor": lambda: torch.full((size,), 2.0),
            "number": lambda: 3.0,
        }[kind]()

    def program(lib):
        rows = []
        for before in kinds:
            for after in kinds:
                if before in ("tensor", "buffer", "number") or after == "buffer":
                    continue  # torch's own business
                if after in ("tensor", "number", "module"):
                    continue  # Pyro leaves the old one half there: see test_pyro_module.py
                module = lib.nn.PyroModule()
                module.x = make(lib, before, 2)
                module.x = make(lib, after, 3)
                value = module.x
                rows.append(
                    (
                        before,
                        after,
                        type(value).__name__,
                        value if isinstance(value, torch.Tensor) else None,
                        [name for name, _ in module.named_parameters()],
                    )
                )
                del module.x
                assert not hasattr(module, "x")
                rows.append(list(module._parameters) + list(module._modules))
        return rows

    same(program)


def test_assignment_and_deletion_inside_a_call(same, traced):
    def program(lib):
        class Model(lib.nn.PyroModule):
            def forward(self):
                if not hasattr(self, "x"):
                    self.x = lib.nn.PyroParam(torch.ones(2), constraints.positive)
                    self.y = nn.Parameter(torch.zeros(3))
                    self.lazy = lib.nn.PyroParam(lambda: torch.randn(2))
                    self.gone = nn.Parameter(torch.zeros(1))
                    del self.gone
                return self.x, self.y, self.lazy

        model = Model()
        return traced(lib, model), traced(lib, model), list(model.named_parameters())

    same(program)


def test_a_second_module_of_the_same_name_continues_the_first(same, traced):
    def program(lib):
        class Model(lib.nn.PyroModule):
            def __init__(self, value):
                super().__init__()
                self.x = lib.nn.PyroParam(torch.tensor(value), constraints.positive)

            def forward(self):
                return self.x

        first = Model(1.0)
        first()
        second = Model(2.0)
        rows = traced(lib, second)
        lib.module.clear(first)
        return rows, second.x, list(first.named_parameters()), Model(3.0)()

    same(program)


def test_store_contents_win_over_module_contents(same):
    def program(lib):
        class Model(lib.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.x = lib.nn.PyroParam(torch.tensor([1.0, 2.0]), constraints.positive)

            def forward(self):
                return self.x

        lib.pyro.param("x", torch.tensor([5.0, 6.0]), constraint=constraints.positive)
        model = Model()
        value = model()
        is_parameter = isinstance(model.x_unconstrained, nn.Parameter)
        return value, model.x, is_parameter, lib.pyro.param("x")

    same(program)


def test_writing_values(same):
    def program(lib):
        class Model(lib.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.x = lib.nn.PyroParam(torch.ones(2), constraints.positive)

            def forward(self):
                return self.x

        model = Model()
        values = [model()]
        leaf = model.x_unconstrained
        model.x = torch.tensor([3.0, 4.0])
        values += [model(), model.x]
        assert model.x_unconstrained is leaf
        model.x_unconstrained.data.fill_(0.5)
        return [*values, model(), model.x]

    same(program)


def test_clear_and_delete_submodules(same):
    def program(lib):
        def make():
            model = lib.nn.PyroModule()
            model.x = nn.Parameter(torch.tensor(0.0))
            model.m = nn.Linear(1, 1)
            model.p = lib.nn.PyroModule()
            model.p.x = lib.nn.PyroParam(torch.tensor(3.0), constraints.positive)
            model.forward = lambda: [model.x, model.m.weight, model.p.x]
            return model

        model = make()
        model()
        keys = [list(lib.store)]
        del model.m
        keys.append(list(lib.store))
        del model.p
        keys.append(list(lib.store))
        model = make()
        model()
        lib.module.clear(model)
        return [*keys, list(lib.store), list(model.named_parameters())]

    same(program)


@pytest.mark.parametrize("size", [1, 2])
def test_decorated_attributes(same, traced, size):
    def program(lib):
        class Model(lib.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.size = size

            @lib.nn.PyroParam
            def x(self):
                return torch.zeros(self.size)

            @lib.nn.PyroParam
            def y(self):
                return torch.randn(self.size)

            @lib.nn.PyroParam(constraint=constraints.positive, event_dim=1)
            def z(self):
                return torch.ones(self.size)

            @lib.nn.PyroSample
            def s(self):
                return lib.dist.Normal(0, 1)

            @lib.nn.PyroSample
            def t(self):
                return lib.dist.Normal(self.s, self.z).to_event(1)

            @lib.nn.PyroSample
            def u(self):
                return self.t.square()

            def forward(self):
                return self.x + self.y + self.u

        model = Model()
        return [traced(lib, model), traced(lib, model), list(model.named_pyro_params())]

    same(program)


def test_plates(same, traced):
    def program(lib):
        class Model(lib.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.inside = lib.nn.PyroSample(lib.dist.Normal(0.0, 1.0))
                self.outside = lib.nn.PyroSample(lib.dist.Normal(0.0, 1.0))
                self.table = lib.nn.PyroParam(torch.arange(10.0), event_dim=0)

            def forward(self):
                outside = self.outside
                with lib.pyro.plate("data", 10, subsample=torch.tensor([1, 5, 2])):
                    return outside.shape, self.inside.shape, self.table

        model = Model()
        return traced(lib, model), model.table

    same(program)


def test_priors_may_have_sites_of_their_own(same, traced):
    def program(lib):
        def prior(module):
            return lib.dist.Normal(lib.pyro.sample("a", lib.dist.Normal(0.0, 1.0)), 1.0)

        model = lib.nn.PyroModule()
        model.b = lib.nn.PyroSample(prior)
        model.forward = lambda: model.b + model.b
        return traced(lib, model)

    same(program)


def test_handlers_see_module_sites(same, traced):
    def program(lib):
        model = regression(lib)
        data = {"linear.weight": torch.ones(2, 3)}
        conditioned = lib.poutine.condition(model, data=data)
        scaled = lib.poutine.scale(model, scale=0.5)
        blocked = lib.poutine.block(model, hide=["scale"])
        rows = [traced(lib, m, torch.ones(4, 3)) for m in (conditioned, scaled, blocked)]
        guide_trace = lib.poutine.trace(model).get_trace(torch.ones(1, 3))
        rows.append(traced(lib, lib.poutine.replay(model, trace=guide_trace), torch.ones(1, 3)))
        return rows

    same(program)


MIXINS = [
    nn.Linear(3, 2),
    nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 2), nn.Sigmoid())),
    nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.ModuleList([nn.Linear(2, 2)])}),
    nn.GRU(3, 2, num_layers=2),
    nn.BatchNorm1d(3),
    nn.Conv2d(1, 2, 3),
    nn.MultiheadAttention(4, 2),
]


@pytest.mark.parametrize("original", MIXINS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("recurse", [True, False])
def test_conversion_in_place(same, original, recurse):
    def program(lib):
        module = copy.deepcopy(original)
        leaves = dict(module.named_parameters())
        lib.module.to_pyro_module_(module, recurse=recurse)
        assert all(leaf is leaves[name] for name, leaf in module.named_parameters())
        lib.module.to_pyro_module_(module, recurse=recurse)  # a second time changes nothing
        types = [
            (type(m).__name__, isinstance(m, lib.nn.PyroModule), getattr(m, "_pyro_name", None))
            for m in module.modules()
        ]
        buffers = [name for name, _ in module.named_buffers()]
        return types, list(module.named_parameters()), buffers, list(module.state_dict())

    same(program)


def test_a_bayesian_network(same, traced):
    def program(lib):
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        lib.module.to_pyro_module_(net)
        for layer in net.modules():
            for name, value in list(layer.named_parameters(recurse=False)):
                prior = lib.dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
                setattr(layer, name, lib.nn.PyroSample(prior))
        return traced(lib, net, torch.ones(2, 3)), list(net.named_parameters())

    rows = same(program)[0]
    assert [row[1] for row in rows if row[0] == "sample"] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]


def test_a_bayesian_recurrent_network(same):
    def program(lib):
        gru = nn.GRU(2, 3)
        x = torch.ones(5, 4, 2)
        plain, _ = gru(x)
        lib.module.to_pyro_module_(gru)
        for name, value in list(gru.named_parameters(recurse=False)):
            prior = lib.dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
            setattr(gru, name, lib.nn.PyroSample(prior))
        first, second = gru(x)[0], gru(x)[0]
        assert not torch.allclose(first, second)  # new weights for each call
        return plain, first, second

    same(program)


def test_lists_and_slices(same, traced):
    def program(lib):
        def layer():
            linear = lib.nn.PyroModule[nn.Linear](2, 2)
            prior = lib.dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2)
            linear.weight = lib.nn.PyroSample(prior)
            return linear

        class Model(lib.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.layers = lib.nn.PyroModuleList([layer() for _ in range(3)])
                self.named = lib.nn.PyroModule[nn.ModuleDict]({"last": layer()})

            def forward(self, x):
                for part in self.layers[1:]:
                    x = part(x)
                return self.named["last"](self.layers[0](x))

        model = Model()
        assert type(model.layers[:2]) is nn.ModuleList
        assert lib.nn.PyroModule[nn.ModuleList] is lib.nn.PyroModuleList
        return traced(lib, model, torch.ones(1, 2)), len(model.layers)

    same(program)


def test_classes_made_by_brackets(same):
    def program(lib):
        mixed = lib.nn.PyroModule
        assert mixed[nn.Module] is mixed
        assert mixed[mixed] is mixed
        assert mixed[nn.Linear] is mixed[nn.Linear]
        assert mixed[mixed[nn.Linear]] is mixed[nn.Linear]
        assert issubclass(mixed[nn.GRU], mixed[nn.RNNBase])
        assert issubclass(mixed[nn.Linear], nn.Linear)
        module = mixed[nn.Linear](2, 3)
        return mixed[nn.Linear].__name__, repr(module), module._pyro_name

    same(program)


def test_unbound_modules_run_under_vmap_and_grad(same):
    def program(lib):
        model = lib.nn.PyroModule()
        model.w = lib.nn.PyroParam(torch.tensor([1.0, 2.0]), constraints.positive)
        model.forward = lambda x: (model.w * x).sum()
        model(torch.ones(2))
        batch = torch.arange(6.0).reshape(3, 2)
        leaves = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        return [
            torch.func.vmap(model)(batch),
            torch.func.grad(model)(batch[0]),
            lib.name and torch.autograd.grad(model(batch[0]), model.w_unconstrained),
        ]

    same(program)
