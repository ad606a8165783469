"""Checkpoints of earlier versions load, and training continues as it did there."""

import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import CASES, SAVED_AFTER, STEPS_AFTERWARDS, Case, outcome
from processes import launch
from torch import Tensor

pytestmark = pytest.mark.builtin_rules("no earlier version has users' rules")

ARCHIVES = sorted(Path(__file__).parent.glob("checkpoints/*.tar.gz"))


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.split(".")[0])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    with tarfile.open(request.param) as archive:
        # Not available before Python 3.11.4.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Any]:
    # Some groups contain dtypes; everything else is data.
    loaded: dict[str, Any] = torch.load(folder / "optimizers.pt", weights_only=True)
    return loaded


def check(optimizer: torch.optim.Optimizer, wanted: list[dict[str, Tensor]]) -> None:
    found = outcome(optimizer)
    assert [set(values) for values in found] == [set(values) for values in wanted]
    for got, expected in zip(found, wanted, strict=True):
        for name, value in expected.items():
            assert got[name].dtype == value.dtype, name
            # The order of operations may differ, and a half type may then round the other way.
            digits = 2.0**-7 if value.dtype in (torch.bfloat16, torch.float16) else 1e-5
            if (
                value.dtype == torch.int16
            ):  # a remainder: the parameter, to which its master rounds, is compared
                continue
            torch.testing.assert_close(got[name], value, rtol=digits, atol=digits * 1e-2)


def load_params(case: Case, values: list[Tensor]) -> list[torch.nn.Parameter]:
    params = case.params()
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    return params


def test_every_case_was_saved(saved: dict[str, Any]) -> None:
    assert saved.keys() <= CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_state_dict(saved: dict[str, Any], name: str) -> None:
    if name not in saved:
        pytest.skip("newer than this checkpoint")
    case, entry = CASES[name], saved[name]
    params = load_params(case, entry["params"])
    optimizer = case.optimizer(params)
    optimizer.load_state_dict(entry["state_dict"])
    for param, state in zip(params, outcome(optimizer), strict=True):
        if "step" in state:
            assert state["step"].item() == SAVED_AFTER
            assert optimizer.state[param]
    # A state dict of the loaded optimizer loads, too.
    again = case.optimizer(params)
    again.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    case.run(again, params, STEPS_AFTERWARDS)
    check(again, entry["continued"])


def test_pickled_optimizers(folder: Path, saved: dict[str, Any]) -> None:
    pickled = pickle.loads((folder / "pickled_optimizers.pkl").read_bytes())
    assert pickled
    for name, buffer in pickled.items():
        optimizer = pickle.loads(buffer)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        CASES[name].run(optimizer, params, STEPS_AFTERWARDS)
        check(optimizer, saved[name]["continued"])


def test_distributed_checkpoints(folder: Path) -> None:
    launch("checkpoint_cases.load_distributed", 1, folder, "1")


def test_sharded_checkpoints(folder: Path) -> None:
    launch("checkpoint_cases.load_distributed", 2, folder, "2")
