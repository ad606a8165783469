"""Rules that users write in C++.

They are built like rules in Python, by one call of the compiler without torch's headers, which take
most of the time of a build by torch.utils.cpp_extension.
"""

import inspect
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _build_cache, _build_output, _dtensor, _native
from .._build_cache import BuildError, CompilationError
from .._codes import E4M3, UE5M3
from .._groups import SHAPE_SCALING
from .._hyperparameters import Beta, Hyperparameter, NonNegative, WarmupSteps
from .._operators import USER_NAMESPACE, unused_stem
from .._rule import Rule
from . import shipped
from .build import build, product_for
from .cpp_source import (
    Source,
    Struct,
    find_struct,
    included_texts,
    lacks_brace,
    options_of,
    read_source,
    unit_of,
)
from .graph import RuleError
from .optimizer_class import complete_class
from .signature import Signature, check_default, check_first, check_names, make_function
from .user_rule import register

_DOMAINS = {"Beta": Beta, "NonNegative": NonNegative, "float": float, "int": int}
_CODES = {"signed": E4M3, "unsigned": UE5M3}
# A message of csrc/engine/rule_requirements.h, by GCC and by Clang.
_REQUIREMENT = re.compile(
    r".*\brule_requirements\.h\b.*static assertion failed(?: due to requirement '.*')?: (.*)"
)
# What has been loaded, by the library's path and the struct: the stem of the operator, the compiled
# module's handle of the rule, and its function for eager calls. Operators cannot be removed.
_LOADED: dict[tuple[str, str], tuple[str, Any, Callable[..., Any]]] = {}
_LOCK = threading.RLock()


class CppRule(Rule):
    """A rule, made by :func:`emerging_optimizers.load_rule` from a struct in C++.

    Calling it updates states in place and returns the update. The arguments are the gradient and
    the states, where each may also be a sequence of tensors; then, by keyword, hyperparameters in
    the struct's order, and `out`.

    Attributes:
        states: The names of the states.
        signature: The names, hyperparameters and defaults.
        source: The C++ text.
    """

    has_formula = False

    def __init__(
        self,
        source: str | os.PathLike[str],
        name: str | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        found = read_source(source)
        struct = find_struct(found, name)
        self.source = found.text
        self.place = (found.label if found.path is None else str(found.path), struct.name)
        self._made_from = (found.text if found.path is None else str(found.path), name)
        self._found, self._struct = found, struct
        library, info = _shipped(found, struct) or _build(found, struct)
        self.signature = _signature(info, defaults or {})
        _check(info, self.signature, struct)
        self._describe(
            info["name"],
            info["states"],
            self.signature.hyperparameters,
            self.signature.scalar_states,
            self.signature.codes,
        )
        self.title = self.name
        self._lowest_step = info["lowest_step"]
        self._check = self._check_natively if info["has_check"] else None
        self._scale = info["shape_scale"]
        register(self)
        stem, handle, eager = _loaded(library, struct.name, self.name)
        self._bind(handle, eager, USER_NAMESPACE, stem)
        self._function = make_function(self.signature, self.entry_point())
        self.__signature__ = inspect.signature(self._function)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function(*arguments, **options)

    def __repr__(self) -> str:
        return f"<rule {self.name}{self.__signature__}>"

    def __reduce__(self) -> Any:
        # By the file's path, or by the text.
        return load_rule, (*self._made_from, self.signature.defaults)

    def text_in(self, folder: Path) -> shipped.Text | None:
        """Return what its library is compiled from in a package; None if it is no file there."""
        path = self._found.path
        if path is None or not path.resolve().is_relative_to(folder.resolve()):
            return None
        return _text(self._found, self._struct, folder)

    def entry_point(self) -> Callable[..., Tensor | list[Tensor]]:
        """Return what the rule calls, with all its arguments and then ``out``."""
        call = super().entry_point()
        if self.states:
            return call

        def call_without_states(*arguments: Any) -> Any:
            if arguments[-1] is None:
                arguments = (_dtensor.reduced(arguments[0]), *arguments[1:])
            return call(*arguments)

        return call_without_states

    def complete_class(self, cls: type, defaults: Mapping[str, Any]) -> None:
        """Give a class of optimizers this rule, and an ``__init__`` with its hyperparameters."""
        complete_class(cls, self.name, self.signature, defaults)
        cls._rule = self  # type: ignore[attr-defined]

    def scale_of(self, shape: Sequence[int]) -> float:
        """Return the factor by which ``use_shape_scaling`` multiplies the update of a matrix."""
        return float(self._scale(shape[0], shape[1]))

    def compute_update(
        self, grad: Tensor, states: list[Tensor], values: dict[str, Any]
    ) -> NoReturn:
        """Raise: there is no formula in PyTorch operations."""
        raise RuntimeError(
            f"the rule {self.name} is written in C++ and has no formula in PyTorch operations: call"
            " it with ordinary tensors on the CPU, not with a"
            f" {type(grad).__name__} on {grad.device}"
        )

    def _check_natively(self, **values: Any) -> None:
        """Raise for hyperparameters that the struct's ``check`` rejects: call with no tensors."""
        lists: list[list[Tensor]] = [[] for _ in (self.signature.grad, *self.states)]
        scalars = (torch.full((), first) for first in self.scalar_states.values())
        self._eager(*lists, *(values[name] for name in self.hyperparameter_names), *scalars, None)


def _text(source: Source, struct: Struct, folder: Path) -> shipped.Text:
    """Return what the library of a package's rule is compiled from, in any place of the package."""
    assert source.path is not None
    csrc = _build_cache.csrc()
    label = source.path.resolve().relative_to(folder.resolve()).as_posix()
    return shipped.Text(
        f"{label}:{struct.name}",
        struct.name,
        unit_of(source, struct),
        included_texts(source, csrc),
        options_of(source, csrc),
    )


def _shipped(source: Source, struct: Struct) -> tuple[str, Mapping[str, Any]] | None:
    """Return the library that the package of a file has, and what it describes; None if none."""
    package = None if source.path is None else shipped.package_of_file(source.path)
    if package is None or _native.native is None:
        return None
    try:
        library = shipped.find(package, _text(source, struct, package.folder))
        if library is not None:
            return str(library), _native.native._rule_info(str(library), struct.name)
    except (BuildError, RuntimeError) as error:
        shipped.reject(package, str(error))
    return None


def _build(source: Source, struct: Struct) -> tuple[str, Mapping[str, Any]]:
    """Return the path of a rule's library, compiled now or before, and what it describes.

    Raises:
        RuleError: The compiler fails.
        RuntimeError: It cannot be called.
    """
    if _native.native is None:
        raise RuntimeError(f"the rule {struct.name} cannot be loaded: {_native.reason}")
    try:
        csrc = _build_cache.csrc()
        product = product_for(
            struct.name,
            unit_of(source, struct),
            options_of(source, csrc),
            included_texts(source, csrc),
            "load the rule again",
            is_for_any=shipped.is_building,
        )
        library = build(product)
    except CompilationError as error:
        raise RuleError(
            f"rule {struct.name} cannot be compiled: {_explain(error, source, struct)} (all errors"
            f" are in {error.log})"
        ) from None
    except BuildError as error:
        raise RuntimeError(
            f"the rule {struct.name} cannot be loaded: {error.reason}. {error.remedy}"
        ) from None
    return str(library), _native.native._rule_info(str(library), struct.name)


def _explain(error: CompilationError, source: Source, struct: Struct) -> str:
    """Return the compiler's first error, at a line of the user's text where there is one."""
    told = _build_output.first_error(error.output)
    found = _REQUIREMENT.fullmatch(told)
    if found is not None:
        return f"{source.label}:{struct.line}: {found[1].replace('MyRule', struct.name)}"
    if "rule_unit.h" in told and lacks_brace(source.text):
        return f"{source.label}:{len(source.text.splitlines())}: a closing brace is missing"
    if "rule_unit.h" in told and "make_info" in told:
        return (
            f"{source.label}:{struct.line}: the package's headers define {struct.name}, too: rename"
            " the struct"
        )
    return told


def _signature(info: Mapping[str, Any], defaults: Mapping[str, Any]) -> Signature:
    hyperparameters = []
    for name, kind, domain, length, _ in info["hyperparameters"]:
        if kind in ("flag", "step"):
            hyperparameters.append(Hyperparameter(name, kind))
        else:
            # Whole numbers have one kind in C++, with any domain.
            is_warmup = kind == "warm-up" and domain == "NonNegative"
            known = WarmupSteps if is_warmup else _DOMAINS[domain]
            hyperparameters.append(Hyperparameter(name, kind, known, length))
    return Signature(
        grad="grad",
        states=info["states"],
        hyperparameters=tuple(hyperparameters),
        defaults=dict(defaults),
        scalar_states=dict(info["scalar_states"]),
        name=info["name"],
        codes=tuple(_CODES.get(code) for code in info["codes"]),
    )


def _check(info: Mapping[str, Any], signature: Signature, struct: Struct) -> None:
    """Raise for what the compiler cannot check: names, flags and defaults."""
    try:
        check_names(signature)
        if len(signature.scalar_states) != len(info["scalar_states"]):
            raise RuleError("kScalarStates has a name twice: rename one of them")
        for name, first in signature.scalar_states.items():
            check_first(name, first)
        flags = [h.name for h in signature.hyperparameters if h.kind == "flag"]
        _check_members(info)
        if (info["shape_scale"] is None) == (SHAPE_SCALING in flags):
            raise RuleError(f"shape_scale() and a bool named {SHAPE_SCALING} need each other")
    except RuleError as error:
        raise RuleError(f"rule {struct.name}: {error}") from None
    known = {h.name: h for h in signature.hyperparameters if h.kind != "step"}
    for name, value in signature.defaults.items():
        if name not in known:
            raise TypeError(
                f"defaults has {name!r}, which rule {struct.name} does not have; it has"
                f" {', '.join(known) or 'no hyperparameters'}"
            )
        check_default(known[name], value)


def _check_members(info: Mapping[str, Any]) -> None:
    """Raise for a member that is listed twice, since another one may then be listed nowhere.

    That of the scalar states needs no listing.
    """
    names = {info["scalars_offset"]: "scalars"}
    for name, kind, _, _, offset in info["hyperparameters"]:
        if kind != "step" and names.setdefault(offset, name) != name:
            raise RuleError(
                f"hyperparameters() lists the same member as {names[offset]} and as {name}: list"
                " each member once"
            )


def _loaded(library: str, struct: str, name: str) -> tuple[str, Any, Callable[..., Any]]:
    """Return what was loaded from a library; load it if it was not."""
    with _LOCK:
        found = _LOADED.get((library, struct))
        if found is None:
            stem = unused_stem(name)
            assert _native.native is not None
            handle, eager = _native.native._load_rule(
                library, struct, operator_namespace=USER_NAMESPACE, name=stem
            )
            found = _LOADED[library, struct] = (stem, handle, eager)
        return found


def load_rule(
    source: str | os.PathLike[str],
    name: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> CppRule:
    """Load the rule of an element-wise optimizer that is written in C++.

    It is a struct like those of the package; see the guide "Rules in C++". It is compiled now, for
    this machine's instruction set, unless it is in the cache or the file's package ships it.

    Args:
        source: The path of a header, which may include others of its folder; or C++ text, which is
            recognized by a brace or a line break.
        name: The name of the struct, if there are several rules.
        defaults: Defaults of hyperparameters, by their names.

    Returns:
        The rule, which is called with tensors or with sequences of them, hyperparameters by keyword
        and `out`. A class of optimizers takes it as ``class Name(ScalarOptimizer, rule=...)``.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: It is a folder.
        RuleError: The file is not UTF-8, it has no rule, or the rule cannot be compiled; the
            message names the line or what the struct lacks.
        RuntimeError: It is not in the cache, and there is no compiler or
            ``EMERGING_OPTIMIZERS_JIT=0`` is set; or there are no native kernels.

    Example:
        >>> import torch
        >>> import emerging_optimizers as eo
        >>> halving = eo.load_rule('''
        ... struct Halving {
        ...   static constexpr const char* kName = "halving";
        ...   static constexpr auto hyperparameters() { return std::make_tuple(); }
        ...   template <class Real>
        ...   struct Step {
        ...     EMOPT_FN Step(const Halving&, double) {}
        ...     EMOPT_FN Real operator()(Real grad) const { return grad / 2; }
        ...   };
        ... };''')
        >>> halving(torch.tensor([1.0, -2.0]))
        tensor([ 0.5000, -1.0000])
    """
    return CppRule(source, name, defaults)
