from __future__ import annotations

import json

import pytest

from bench import kernels, operations


def test_quick_run_writes_checked_rows(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    small = ["--quick", "--elements", "100", "--particles", "2", "1", "--out", str(out)]
    assert kernels.main(small) == 0
    found = json.loads(out.read_text())
    assert {"device", "versions", "commit", "copy_gb_per_s"} <= found.keys()
    names = {row["name"].removesuffix(".backward").removesuffix(".both") for row in found["rows"]}
    sizes = (100, 1, "cpu")
    assert names == {make(*sizes).name for make in kernels.OPERATIONS.values()}
    assert all(row["ok"] and row["time_us"] > 0 for row in found["rows"])
    assert "log_prob.normal.backward" in capsys.readouterr().out


def test_a_wrong_result_fails_the_run(monkeypatch, capsys):
    def wrong(elements, particles, device):
        operation = operations.density(elements, particles, device)
        ours = operation.ours
        operation.ours = lambda *args: [
            x * (1 + 1e-4 * (x.element_size() == 4)) for x in ours(*args)
        ]
        return operation

    monkeypatch.setitem(kernels.OPERATIONS, "log_prob", wrong)
    assert kernels.main(["log_prob", "--quick", "--elements", "50", "--particles", "1"]) == 1
    assert "log_prob.normal" in capsys.readouterr().err


def test_unknown_operations_are_refused(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["log_probe", "--quick"])
    assert "log_probe" in capsys.readouterr().err
