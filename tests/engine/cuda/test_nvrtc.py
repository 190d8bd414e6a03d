"""Compiled CUDA sources, kept on disk by what they depend on; by NVRTC where there is one."""

from __future__ import annotations

import pytest

from fastsvi.engine.cuda import nvrtc
from fastsvi.errors import CaptureError

SOURCE = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
CODE = b"\x7fELF"


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What is compiled, by an NVRTC that only takes notes."""
    found = []

    def compile_noted(source, target):
        found.append(target)
        return f"{source} for {target.option}".encode()

    monkeypatch.setenv("FASTSVI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "_architectures", lambda: [75, 80, 90, 120])
    monkeypatch.setattr(nvrtc, "_compile", compile_noted)
    return found


def test_a_source_is_compiled_once(compiled):
    first = nvrtc.compile_source(SOURCE, (9, 0))
    assert nvrtc.compile_source(SOURCE, (9, 0)) == first
    assert len(compiled) == 1
    path = nvrtc.image_path(SOURCE, (9, 0))
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_anew_for_another_source_device_or_version(compiled, monkeypatch):
    nvrtc.compile_source(SOURCE, (9, 0))
    nvrtc.compile_source(SOURCE + " ", (9, 0))
    nvrtc.compile_source(SOURCE, (8, 0))
    monkeypatch.setattr(nvrtc, "version", lambda: "13.1")
    nvrtc.compile_source(SOURCE, (9, 0))
    assert len(compiled) == 4


@pytest.mark.parametrize(
    ("capability", "option", "ending"),
    [
        ((9, 0), "sm_90", ".cubin"),
        ((8, 6), "sm_80", ".cubin"),  # code for 8.0 runs on 8.6
        ((10, 0), "compute_90", ".ptx"),  # and code for 9.0 does not on 10.0
        ((12, 1), "sm_120", ".cubin"),
    ],
)
def test_what_it_is_compiled_for(compiled, capability, option, ending):
    nvrtc.compile_source(SOURCE, capability)
    assert compiled[0].option == f"--gpu-architecture={option}"
    assert nvrtc.image_path(SOURCE, capability).suffix == ending


def test_devices_that_are_too_old_are_named(compiled):
    with pytest.raises(CaptureError, match=r"devices of capability 6\.1, only for \[75"):
        nvrtc.compile_source(SOURCE, (6, 1))


def test_without_the_library_it_says_where_it_looked(monkeypatch):
    nvrtc.library.cache_clear()
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["/nowhere/libnvrtc.so"]))
    with pytest.raises(CaptureError, match=r"not found.*/nowhere/libnvrtc.so"):
        nvrtc.library()


def has_nvrtc():
    try:
        nvrtc.library()
    except CaptureError:
        return False
    return True


@pytest.mark.cuda
@pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC, which torch's builds for CUDA bring")
class TestNvrtc:
    """Needs no GPU."""

    def test_gives_machine_code_for_each_architecture(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FASTSVI_CACHE", str(tmp_path))
        images = [nvrtc.compile_source(SOURCE, capability) for capability in ((9, 0), (8, 0))]
        assert all(image.startswith(CODE) for image in images)
        assert images[0] != images[1]

    def test_says_what_is_wrong_with_a_source(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FASTSVI_CACHE", str(tmp_path))
        with pytest.raises(CaptureError, match='identifier "y" is undefined'):
            nvrtc.compile_source(SOURCE.replace("2", "y"), (9, 0))
        assert not list(tmp_path.iterdir())
