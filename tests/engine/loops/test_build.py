"""The compiler is started once for a step that is not in the cache, and never for one that is."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

from fastsvi.engine.loops import build
from fastsvi.engine.native import NativeStep


def twice(x):
    return x * 2.5, x.sum(), x.isnan().any()


@pytest.fixture
def started(tmp_path, monkeypatch):
    """An empty cache, and the processes that are started from now on."""
    monkeypatch.setenv("FASTSVI_CACHE", str(tmp_path))
    build._machine.cache_clear()
    commands = []
    popen = subprocess.Popen.__init__

    def counted(self, command, *args, **kwargs):
        commands.append(command)
        popen(self, command, *args, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "__init__", counted)
    return commands


def test_one_process_compiles_and_links(started, tmp_path):
    NativeStep(twice, [torch.ones(2)]).build()
    assert len(started) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]  # the rest is removed
    build._machine.cache_clear()
    NativeStep(twice, [torch.ones(2)]).run(2)
    assert len(started) == 1


def test_denormal_numbers_survive_the_compiled_step(started):
    # A start file that -ffast-math links by itself would flush them in the whole process.
    tiny = torch.full((3,), 1e-40)
    state = [torch.ones(3)]
    NativeStep(lambda x: (x * 1e-30 * 1e-10, x.sum(), x.isnan().any()), state).run(1)
    assert bool((tiny * 0.5 > 0).all())
    with pytest.raises(AttributeError):
        _ = ctypes.CDLL(str(next(build.cache_folder().glob("*.so")))).set_fast_math


def test_the_key_of_the_cache_names_compiler_and_flags(tmp_path, monkeypatch):
    before = build.library_path("x")
    for name in ("g++", "clang++-19"):
        (tmp_path / name).write_text("")
    paths = {before}
    for name in ("g++", "clang++-19"):
        build._machine.cache_clear()
        monkeypatch.setattr(build, "compiler", lambda name=name: str(tmp_path / name))
        paths.add(build.library_path("x"))
        assert ("-O3" in build._flags()) == (name != "g++")
    build._machine.cache_clear()
    assert len(paths) == 3
