"""Steps whose parameters are collected by several threads: as by one, whatever is in the way."""

import io
import threading
from collections.abc import Callable

import pytest
import torch
from optimizers import assert_same, contents
from torch import Tensor
from torch.nn import Parameter

from emerging_optimizers import Adam, AdEMAMix, Lion, ScalarOptimizer
from emerging_optimizers._native import native
from emerging_optimizers.megatron import FusedAdam

# More than one thread collects, and the last one has another number of parameters than the others.
COUNT = 700
THREADS = 3

pytestmark = pytest.mark.usefixtures("num_threads")

Make = Callable[[], ScalarOptimizer]
CASES: dict[str, Make] = {}


def case(make: Make) -> Make:
    """Add a case: a function that makes an optimizer, with gradients, that has taken a step."""
    CASES[make.__name__] = make
    return make


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    """Return parameters of a few elements, of several shapes, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for i in range(COUNT):
        shape = [(8,), (3, 5), (2, 3, 2), (1,), (0,)][i % 5]
        params.append(Parameter(torch.randn(shape, generator=generator).to(dtype)))
        params[-1].grad = torch.randn(shape, generator=generator).to(dtype)
    return params


def stepped(optimizer: ScalarOptimizer) -> ScalarOptimizer:
    """Take a step, which makes the states."""
    torch.manual_seed(0)
    optimizer.step()
    return optimizer


def params_of(optimizer: ScalarOptimizer) -> list[Parameter]:
    """Return the parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


@case
def plain() -> ScalarOptimizer:
    return stepped(Adam(make_params(), lr=0.1))


@case
def two_groups() -> ScalarOptimizer:
    params = make_params()
    groups = [{"params": params[:300], "lr": 0.3}, {"params": params[300:], "weight_decay": 0.1}]
    return stepped(AdEMAMix(groups, lr=0.1))


@case
def rounded_stochastically() -> ScalarOptimizer:
    return stepped(Lion(make_params(torch.bfloat16), lr=0.1, stochastic_rounding=True))


@case
def master_weights() -> ScalarOptimizer:
    return stepped(Adam(make_params(torch.bfloat16), lr=0.1, master_weights=True))


@case
def idle_parameters_that_count() -> ScalarOptimizer:
    optimizer = stepped(FusedAdam(make_params(), lr=0.1))
    for p in params_of(optimizer)[::3]:
        p.grad = None
    return optimizer


@case
def some_have_no_gradient() -> ScalarOptimizer:
    params = make_params()
    for p in params[::3]:
        p.grad = None
    return stepped(Adam(params, lr=0.1))


@case
def some_have_no_state() -> ScalarOptimizer:
    params = make_params()
    late = params[100:600:7]
    grads = [p.grad for p in late]
    for p in late:
        p.grad = None
    optimizer = stepped(Adam(params, lr=0.1))
    for p, grad in zip(late, grads, strict=True):
        p.grad = grad
    return optimizer


@case
def states_in_another_order() -> ScalarOptimizer:
    optimizer = some_have_no_state()
    optimizer.step()
    return optimizer


@case
def entries_in_another_order() -> ScalarOptimizer:
    optimizer = plain()
    last = optimizer.state[params_of(optimizer)[-1]]
    last["step"] = last.pop("step")
    return optimizer


@case
def a_state_of_another_class() -> ScalarOptimizer:
    class Text(str):
        pass

    optimizer = plain()
    last = optimizer.state[params_of(optimizer)[-1]]
    last[Text("step")] = last.pop("step")
    return optimizer


@case
def loaded() -> ScalarOptimizer:
    optimizer = plain()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    optimizer.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))
    return optimizer


@case
def some_states_were_deleted() -> ScalarOptimizer:
    optimizer = plain()
    for p in params_of(optimizer)[400:600:50]:
        del optimizer.state[p]
    return optimizer


@case
def steps_that_differ() -> ScalarOptimizer:
    optimizer = plain()
    for i, p in enumerate(params_of(optimizer)):
        optimizer.state[p]["step"].fill_(i % 3)
    return optimizer


@case
def dtypes_that_differ() -> ScalarOptimizer:
    params = make_params()
    for i, dtype in ((5, torch.float64), (350, torch.bfloat16), (690, torch.float16)):
        params[i] = Parameter(params[i].detach().to(dtype))
        params[i].grad = torch.ones_like(params[i])
    return stepped(Adam(params, lr=0.1))


@case
def complex_numbers() -> ScalarOptimizer:
    params = make_params()
    params[650] = Parameter(torch.ones(3, dtype=torch.complex64))
    params[650].grad = torch.full((3,), 1 + 2j).conj()
    return stepped(Adam(params, lr=0.1))


@case
def a_gradient_in_another_layout() -> ScalarOptimizer:
    params = make_params()
    params[301].grad = torch.arange(15.0).reshape(5, 3).t()
    return stepped(Adam(params, lr=0.1))


@case
def copy_on_write() -> ScalarOptimizer:
    optimizer = plain()
    states = [optimizer.state[p] for p in params_of(optimizer)]
    for i in (1, 401, 601):  # two share the memory of a third until they are modified
        states[i]["exp_avg"] = torch._lazy_clone(states[i]["exp_avg"])
        states[i + 5]["exp_avg_sq"] = torch._lazy_clone(states[i]["exp_avg"].abs())
    return optimizer


@case
def counters_copied_on_write() -> ScalarOptimizer:
    optimizer = stepped(FusedAdam(make_params(), lr=0.1))
    params = params_of(optimizer)
    params[690].grad = None  # it counts nevertheless
    for i in (1, 401, 690):
        optimizer.state[params[i]]["step"] = torch._lazy_clone(optimizer.state[params[i]]["step"])
    return optimizer


@case
def parameters_that_share_memory() -> ScalarOptimizer:
    params = make_params()
    whole = torch.randn(16, generator=torch.Generator().manual_seed(1))
    for i in (10, 340, 341, 699):
        params[i] = Parameter(whole[i % 5 : i % 5 + 8])
        params[i].grad = torch.ones(8)
    return stepped(Adam(params, lr=0.1))


@case
def a_shared_counter() -> ScalarOptimizer:
    optimizer = plain()
    first, *_, last = params_of(optimizer)
    optimizer.state[last]["step"] = optimizer.state[first]["step"]
    return optimizer


@case
def a_parameter_twice() -> ScalarOptimizer:
    optimizer = plain()
    optimizer.param_groups[0]["params"][600] = params_of(optimizer)[3]
    return optimizer


@case
def a_flat_buffer() -> ScalarOptimizer:
    flat = torch.randn(8 * COUNT, generator=torch.Generator().manual_seed(0))
    params = [Parameter(part) for part in flat.chunk(COUNT)]
    for p, grad in zip(params, flat.flip(0).chunk(COUNT), strict=True):
        p.grad = grad
    return stepped(Lion(params, lr=0.1))


def results(make: Make, threads: int) -> tuple[list[Tensor], list[int]]:
    """Take two steps with a number of threads; return what they leave, with the versions."""
    torch.set_num_threads(threads)
    optimizer = make()
    torch.manual_seed(1)
    for _ in range(2):
        optimizer.step(grad_multiplier=0.5)
    states = [optimizer.state[p].values() for p in params_of(optimizer) if p in optimizer.state]
    tensors = [*params_of(optimizer), *(t for values in states for t in values)]
    return contents(optimizer), [t._version for t in tensors if isinstance(t, Tensor)]


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_steps_do_not_depend_on_the_number_of_threads(make: Make) -> None:
    wanted, wanted_versions = results(make, 1)
    got, versions = results(make, THREADS)
    assert_same(got, wanted)
    assert versions == wanted_versions


# How many walks two steps share, in the cases that need no Python in a walk.
SHARED = {
    "plain": 2,
    "two_groups": 4,
    "rounded_stochastically": 2,
    "master_weights": 2,
    "idle_parameters_that_count": 2,
    "some_have_no_gradient": 2,
    "entries_in_another_order": 2,
    "loaded": 2,
    "steps_that_differ": 2,
    "dtypes_that_differ": 2,
    "copy_on_write": 1,
    "counters_copied_on_write": 1,
    "parameters_that_share_memory": 2,
    "a_shared_counter": 2,
    "a_flat_buffer": 2,
}


@pytest.mark.skipif(native is None, reason="there are no native kernels")
@pytest.mark.parametrize("name", CASES)
def test_threads_share_the_walk_where_they_can(name: str) -> None:
    torch.set_num_threads(THREADS)
    optimizer = CASES[name]()
    before = native._count_walks_on_threads()
    for _ in range(2):
        optimizer.step()
    assert native._count_walks_on_threads() - before == SHARED.get(name, 0)


@pytest.mark.parametrize("position", [0, 300, COUNT - 1])
def test_a_wrong_tensor_is_named_and_nothing_changes(position: int) -> None:
    torch.set_num_threads(THREADS)
    optimizer = plain()
    state = optimizer.state[params_of(optimizer)[position]]
    state["exp_avg"] = torch.zeros(4, 4, 4)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=rf"\['params'\]\[{position}\]: state 'exp_avg' has"):
        optimizer.step()
    assert_same(contents(optimizer), before)


@pytest.mark.parametrize("position", [0, 300, COUNT - 1])
def test_a_parameter_must_be_a_tensor(position: int) -> None:
    torch.set_num_threads(THREADS)
    optimizer = plain()
    before = contents(optimizer)
    params = optimizer.param_groups[0]["params"]
    right, params[position] = params[position], "weight"
    with pytest.raises(TypeError):
        optimizer.step()
    params[position] = right
    assert_same(contents(optimizer), before)


def test_optimizers_step_at_the_same_time_in_several_threads() -> None:
    wanted = contents(plain())
    optimizers = [plain() for _ in range(4)]

    def take_steps(optimizer: ScalarOptimizer) -> None:
        torch.set_num_threads(THREADS)
        for _ in range(20):
            optimizer.step()

    threads = [threading.Thread(target=take_steps, args=(o,)) for o in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, *others = map(contents, optimizers)
    assert not torch.equal(first[0], wanted[0])
    for other in others:
        assert_same(other, first)
