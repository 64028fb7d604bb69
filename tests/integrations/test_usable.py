"""Which integrations can be used, and that nobody pays for those that are not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastlora.errors import PackageError
from fastlora.runtime import packages
from fastlora.views.environment import environment


def test_no_toolkit_is_imported_before_its_integration() -> None:
    code = (
        "import sys, fastlora, fastlora.integrations, fastlora.runtime.packages as p\n"
        "fastlora.Adapter, fastlora.merge\n"
        "[p.state(name) for name in p.INTEGRATIONS]\n"
        "print(sorted({'peft', 'transformers', 'diffusers', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_versions_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"peft": "0.21.2", "transformers": "5.24.0", "sglang": None}
    monkeypatch.setattr(packages, "version", installed.get)
    assert packages.missing("peft") is None
    assert packages.state("transformers") == "usable with transformers 5.24.0, peft 0.21.2"
    assert packages.missing("diffusers") == "diffusers is not installed: `pip install 'fastlora[diffusers]'`"
    assert packages.missing("sglang") == "sglang is not installed: `pip install sglang`"
    installed["peft"] = "0.19.1"
    old = "peft 0.19.1 is installed, and 0.21 or newer is needed: `pip install -U peft`"
    assert packages.state("peft") == packages.missing("transformers") == old
    with pytest.raises(PackageError, match=r"fastlora\.integrations\.peft cannot be used: peft 0\.19\.1") as told:
        packages.require("peft")
    assert isinstance(told.value, ImportError)


def test_info_tells_of_each() -> None:
    assert environment()["integrations"] == {name: packages.state(name) for name in packages.INTEGRATIONS}
