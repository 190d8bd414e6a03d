from __future__ import annotations

import importlib.util
from pathlib import Path

from bench import machine


def test_names_become_parts_of_file_names():
    assert machine.short_name("NVIDIA H200") == "nvidia-h200"
    assert machine.short_name("NVIDIA A100-SXM4-80GB ") == "nvidia-a100-sxm4-80gb"


def test_a_figure_says_where_it_was_made():
    about = machine.machine()
    assert about["cores"] >= 1
    assert about["versions"]["torch"]
    text = machine.describe(about)
    assert about["cpu"] in text
    assert about["commit"] in text
    assert f"torch {about['versions']['torch']}" in text


def test_a_gpu_is_named_in_place_of_the_processor(monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda command: "NVIDIA H200, 580.159.03\nanother, 1")
    about = machine.machine("cuda")
    assert (about["gpu"], about["driver"]) == ("NVIDIA H200", "580.159.03")
    assert machine.describe(about).startswith("NVIDIA H200")


def test_threads_and_caches_are_set_for_every_library(tmp_path):
    assert machine.threads_environment(1)["OMP_NUM_THREADS"] == "1"
    assert machine.threads_environment(3)["NPROC"] == "3"
    assert "thread_eigen=false" in machine.threads_environment(1)["XLA_FLAGS"]
    assert "thread_eigen=true" in machine.threads_environment(2)["XLA_FLAGS"]
    caches = machine.cache_environment(tmp_path)
    folders = [value for value in caches.values() if value.startswith(str(tmp_path))]
    assert len(folders) == len(set(folders)) == 4


def test_bytecode_of_the_working_tree_is_kept():
    machine.keep_bytecode()
    assert Path(importlib.util.cache_from_source(machine.__file__)).exists()
