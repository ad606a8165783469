from typing import Any

_OPTIMIZERS: dict[str, type] = {}


def register_optimizer(name: str) -> Any:
    def register(cls: type) -> type:
        _OPTIMIZERS[name.lower()] = cls
        return cls

    return register


def get_optimizer_name_list() -> list[str]:
    return list(_OPTIMIZERS)


def get_optimizer_cls(name: str) -> type:
    return _OPTIMIZERS[name.lower()]
