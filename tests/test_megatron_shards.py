"""Shards of flat buffers, and parameters or states replaced or moved between steps."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from megatron_support import AWARE, BF16, F32, devices, every_class, make_params, run
from optimizers import assert_same, contents, make_grads
from support import assert_equal_bits
from torch import Tensor

from emerging_optimizers import megatron

pytestmark = [
    pytest.mark.on_devices("tests-cuda"),
    pytest.mark.usefixtures("_no_other_device"),
]

SHAPES = ((5, 7), (7,), (3, 11), (1,), (40, 3))


class FlatBuffer:
    """Bfloat16 parameters and their gradients in flat buffers, divided among ranks.

    The boundaries lie anywhere, also inside parameters.
    """

    def __init__(self, num_ranks: int) -> None:
        sizes = [int(np.prod(shape)) for shape in SHAPES]
        ends = np.cumsum(sizes)
        total = int(ends[-1])
        # Uneven on purpose; the last rank may have few elements.
        cuts = sorted({0, total, *(total * r // num_ranks | 1 for r in range(1, num_ranks))})
        self.parts = list(pairwise(cuts))
        self.params = make_params(sizes=[total])[0]
        self.grads = torch.zeros(total)
        self.ranges = list(zip(ends - sizes, ends, strict=True))

    def shards(self, rank: int) -> list[tuple[Tensor, slice]]:
        """A rank's shards of the parameters: views of the buffer, and their slices."""
        start, end = self.parts[rank]
        pieces = [slice(max(start, a), min(end, b)) for a, b in self.ranges]
        return [(self.params[piece], piece) for piece in pieces if piece.start < piece.stop]

    def reduce_scatter(self, step: int, num_ranks: int) -> list[Tensor]:
        """Return each rank's shard of the summed gradients."""
        parts = [make_grads([self.grads], 100 * step + r)[0] for r in range(3)]
        self.grads = torch.stack(parts).sum(0)
        return [self.grads[start:end] for start, end in self.parts]


@every_class
@pytest.mark.parametrize("num_ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("store_param_remainders", [False, True], ids=["masters", "remainders"])
def test_shards_of_flat_buffers(cls: Any, num_ranks: int, store_param_remainders: bool) -> None:
    """The bits are those of one process, for any boundaries."""
    options = {**AWARE, "store_param_remainders": store_param_remainders}
    if cls is megatron.Signum:
        options["nesterov"] = True
    alone, sharded = FlatBuffer(1), FlatBuffer(num_ranks)
    assert any(start % 2 for start, _ in sharded.parts)
    whole = [alone.params[a:b] for a, b in alone.ranges]
    reference = cls(whole, **options)
    ranks = []
    for rank in range(num_ranks):
        # As in Megatron, constructed with the model's parameters, which the shards replace.
        optimizer = cls(make_params(sizes=(35, 7)), **options)
        shards = [shard for shard, _ in sharded.shards(rank)]
        optimizer.param_groups = [{**optimizer.param_groups[0], "params": shards}]
        optimizer.load_state_dict(optimizer.state_dict())
        ranks.append(optimizer)
    for step in (1, 2, 3, 4):
        alone.reduce_scatter(step, 1)
        grads = sharded.reduce_scatter(step, num_ranks)
        for param, (a, b) in zip(whole, alone.ranges, strict=True):
            param.decoupled_grad = alone.grads[a:b]  # type: ignore[attr-defined]
        reference.step()
        gathered = torch.full_like(sharded.params, torch.nan)
        for rank, optimizer in enumerate(ranks):
            start, end = sharded.parts[rank]
            shards = optimizer.param_groups[0]["params"]
            for shard, (_, piece) in zip(shards, sharded.shards(rank), strict=True):
                shard.decoupled_grad = grads[rank][piece.start - start : piece.stop - start]
            optimizer.step()
            gathered[start:end] = sharded.params[start:end]
        sharded.params.copy_(gathered)  # the all-gather
    assert_equal_bits(sharded.params, alone.params, "parameters")
    for name in reference.state[whole[0]].keys() - {"step"}:
        parts = [o.state[p][name] for o in ranks for p in o.param_groups[0]["params"]]
        wanted = torch.cat([reference.state[p][name] for p in whole])
        as_float = [
            t.view(BF16) if t.dtype == torch.int16 else t for t in (torch.cat(parts), wanted)
        ]
        assert_equal_bits(*as_float, name)


@every_class
def test_parameters_replaced_after_construction(cls: Any) -> None:
    params, others = make_params(), make_params()
    optimizer, other = cls(make_params(F32), **AWARE), cls(others, **AWARE)
    optimizer.param_groups[0]["params"][:] = params
    run(optimizer, [1, 2])
    run(other, [1, 2])
    assert_same(contents(optimizer), contents(other))


@devices
@every_class
@pytest.mark.parametrize("store_param_remainders", [False, True], ids=["masters", "remainders"])
def test_data_and_states_moved_away_and_back(
    cls: Any, store_param_remainders: bool, device: str
) -> None:
    def make() -> Any:
        params = make_params(device=device) + make_params(F32, device, sizes=(5,))
        return cls(params, store_param_remainders=store_param_remainders, **AWARE)

    optimizer, other = make(), make()
    run(optimizer, [1, 2])
    run(other, range(1, 5))
    for target in ("cpu", device):
        for param in optimizer.param_groups[0]["params"]:
            param.data = param.data.to(target, copy=True)
        for state in optimizer.state.values():
            for name, value in state.items():
                if value.device.type != target or name == "step":
                    state[name] = value.to("cpu" if name == "step" else target, copy=True)
    run(optimizer, [3, 4])
    assert_same(
        [t.float() for t in contents(optimizer)], [t.float() for t in contents(other)], "moved"
    )
