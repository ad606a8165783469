"""What this installation is made of, and what can be wrong with it."""

import importlib.metadata
from pathlib import Path

_DISTRIBUTION = "emerging-optimizers-native"
_NAMESAKE = "emerging-optimizers"

try:
    __version__ = importlib.metadata.version(_DISTRIBUTION)
except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def name_clash(folder: Path = Path(__file__).parent) -> str | None:
    """Say so if NVIDIA's pure-Python package lies in the same folder as this one.

    Both distributions are imported as ``emerging_optimizers``, and installers let the second
    overwrite files of the first without a word.
    """
    for distribution in importlib.metadata.distributions(name=_NAMESAKE):
        if Path(str(distribution.locate_file(folder.name))).resolve() == folder.resolve():
            return (
                f"The distribution {_NAMESAKE} {distribution.version} (NVIDIA's pure-Python"
                f" package) is installed in the same folder as {_DISTRIBUTION}: {folder}. They"
                " overwrite each other's files and cannot be used side by side. Keep one of them:\n"
                f"    pip uninstall -y {_NAMESAKE} {_DISTRIBUTION}\n"
                f"    pip install --no-build-isolation {_DISTRIBUTION}"
            )
    return None


def explain_import_error(error: ImportError) -> ImportError:
    """Return the error, with the name clash appended where there is one."""
    clash = name_clash()
    return error if clash is None else ImportError(f"{error}\n{clash}")


def show_config() -> None:
    """Print version, torch, compiled module, instruction sets, CUDA and threads of what is here.

    Where there is no compiled module, it prints why, ``EMERGING_OPTIMIZERS_JIT=0`` for one.

    Example:
        >>> import emerging_optimizers
        >>> emerging_optimizers.show_config()  # doctest: +ELLIPSIS
        emerging_optimizers ...
        torch: ...
        module: ...
        CPU instruction sets: ...
        CUDA: ...
        threads: ...
    """
    import torch

    from ._native import native, reason

    print(f"emerging_optimizers {__version__}")
    if native is None:
        print(f"torch: {torch.__version__}")
        print(f"CPU instruction sets: none in use, plain PyTorch is used ({reason})")
        print("CUDA: no")
    else:
        print(f"torch: {torch.__version__} (built for {native.torch_version})")
        print(f"module: {native.__file__}")
        compiled = ", ".join(native.compiled_isas())
        print(f"CPU instruction sets: {compiled} compiled, {native.active_isa()} in use")
        print(f"CUDA: {', '.join(native.cuda_architectures) or 'no'}")
    print(f"threads: {torch.get_num_threads()}")
    clash = name_clash()
    if clash is not None:
        print(clash)
