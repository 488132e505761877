"""What the doctor says of machines that are not as they should be."""

from __future__ import annotations

import os
import socket
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from realm.cli import doctor
from realm.cli.doctor import DOUBTFUL, FAILED, GOOD, Finding, examine
from realm.sandbox import kernel


def findings(home: Path, port: int = 1) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(home, port)}


def test_fresh_machine_lacks_only_a_model(tmp_path: Path) -> None:
    found = findings(tmp_path / "home")
    assert [name for name, finding in found.items() if finding.state == FAILED] == ["models"]
    assert "realm models import" in found["models"].text
    assert "will be made" in found["data"].text
    assert found["wasmtime"] == Finding("wasmtime", GOOD, "50.0.1")
    assert "compiles in" in found["compile"].text
    assert not (tmp_path / "home").exists()


def test_home_open_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert findings(tmp_path)["data"].state == DOUBTFUL
    tmp_path.chmod(0o700)
    assert findings(tmp_path)["data"].state == GOOD


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = findings(tmp_path, taken.getsockname()[1])
    assert found["port"].state == DOUBTFUL
    assert "not free" in found["port"].text


def test_wrong_wasmtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "49.0.0")
    assert findings(tmp_path)["wasmtime"].state == FAILED


def test_broken_model_is_a_finding(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    (folder / "realm.json").write_text("{")
    found = findings(tmp_path)["models"]
    assert found.state == FAILED
    assert "m/realm.json" in found.text


def test_what_contains_a_worker(tmp_path: Path) -> None:
    found = findings(tmp_path)
    for name, probe in (("seccomp", kernel.seccomp_number), ("landlock", kernel.landlock_abi)):
        try:
            probe()
        except kernel.Lacking as lacking:
            assert found[name].state == found["sandbox"].state == DOUBTFUL
            assert lacking.reason in found[name].text and "use " in found[name].text
        else:
            assert found[name].state == GOOD
            assert name in found["sandbox"].text.lower()


def test_a_kernel_without_landlock_and_seccomp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No kernel has a call of this number.
    monkeypatch.setattr(kernel, "_LANDLOCK_CREATE_RULESET", 5000)
    monkeypatch.setattr(kernel, "_SECCOMP", {os.uname().machine: 5000})
    found = findings(tmp_path)
    assert found["seccomp"].state == found["landlock"].state == DOUBTFUL
    assert "Function not implemented" in found["seccomp"].text and "CONFIG_SECCOMP_FILTER" in found["seccomp"].text
    assert "Linux 5.13" in found["landlock"].text
    monkeypatch.setattr(kernel, "_SECCOMP", {})
    assert f"processors of type {os.uname().machine}" in findings(tmp_path)["seccomp"].text


def test_a_sandbox_that_cannot_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "realm").mkdir()
    (tmp_path / "realm" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = findings(tmp_path)["sandbox"]
    assert found.state == FAILED and "No module named realm.sandbox" in found.text


def gpu(
    monkeypatch: pytest.MonkeyPatch, *, usable: bool = True, capability: int = 9, count: int = 1, driver: str = ""
) -> None:
    """A machine with a GPU: what torch says of it, and what its driver does."""
    facts = SimpleNamespace(name="NVIDIA H200", major=capability, minor=0)
    monkeypatch.setattr(doctor, "gpu_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (130 << 30, 140 << 30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "version", lambda name: {"triton": "3.6.0"}[name])
    monkeypatch.setattr(doctor, "_DRIVER", Path(driver or "/nowhere"))


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "gpu_present", lambda: False)
    assert doctor._gpu() == (GOOD, "none: the engine computes on the CPU")


def test_a_gpu_and_all_that_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23\nGCC 12\n")
    gpu(monkeypatch, count=8, driver=str(tmp_path / "version"))
    state, text = doctor._gpu()
    assert state == GOOD
    for part in ("NVIDIA H200", "130.0 GiB free of 140.0 GiB", "capability 9.0", "CUDA 13.0", "driver 580.95.05"):
        assert part in text
    assert "Triton 3.6.0" in text and "7 more unused" in text
    gpu(monkeypatch)
    assert "driver" not in doctor._gpu()[1] and "unused" not in doctor._gpu()[1]


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, usable=False)
    state, text = doctor._gpu()
    assert state == DOUBTFUL and "look at its driver" in text
    monkeypatch.setattr(torch.version, "cuda", None)
    state, text = doctor._gpu()
    assert state == DOUBTFUL and "install torch's CUDA build" in text


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)

    def lacking(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", lacking)
    state, text = doctor._gpu()
    assert state == FAILED and "pip install triton" in text


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, capability=7)
    state, text = doctor._gpu()
    assert state == DOUBTFUL and "--dtype float32" in text
