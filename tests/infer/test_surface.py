"""What fastsvi.infer offers, and what it says about what it does not."""

import pytest

import fastsvi.infer


def test_everything_named_is_there():
    for name in fastsvi.infer.__all__:
        assert getattr(fastsvi.infer, name) is not None
    for name in fastsvi.infer.autoguide.__all__:
        assert getattr(fastsvi.infer.autoguide, name) is not None


@pytest.mark.parametrize("name", ["TraceEnum_ELBO", "TraceGraph_ELBO", "MCMC"])
def test_what_is_missing_says_so(name):
    with pytest.raises(ImportError, match=f"has no {name}: "):
        getattr(fastsvi.infer, name)


def test_from_import_shows_the_reason():
    with pytest.raises(ImportError, match="summed out"):
        from fastsvi.infer import TraceEnum_ELBO  # noqa: F401


def test_misspelt_names_are_ordinary_attribute_errors():
    assert not hasattr(fastsvi.infer, "Trace_Elbo")
