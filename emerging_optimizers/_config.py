"""What is installed and in use."""

import torch

from ._distribution import FOLDER, __version__, name_clash, namesake
from ._native import native, reason
from ._operators import loaded_user_rules


def show_config() -> None:
    """Print what is in use: versions, compiled module, instruction sets, CUDA, rules and threads.

    Without a compiled module, the reason is printed, such as ``EMERGING_OPTIMIZERS_JIT=0``. If
    NVIDIA's package is in use, its version, folder and modules are printed as well.

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
    print(f"emerging_optimizers {__version__}")
    if namesake is not None:
        print(f"distribution: emerging-optimizers-native, in {FOLDER}")
        print(
            f"NVIDIA's package: emerging-optimizers {namesake.package_version()}, in"
            f" {namesake.folder}: {', '.join(namesake.modules())}"
        )
    if native is None:
        print(f"torch: {torch.__version__}")
        print(f"CPU instruction sets: none, falling back to PyTorch operations ({reason})")
        print("CUDA: no")
    else:
        print(f"torch: {torch.__version__} (built for {native.torch_version})")
        print(f"module: {native.__file__}")
        compiled = ", ".join(native.compiled_isas())
        print(f"CPU instruction sets: {compiled} compiled, {native.active_isa()} in use")
        print(f"CUDA: {', '.join(native.cuda_architectures) or 'no'}")
    rules = loaded_user_rules()
    if rules:
        print(f"rules: {', '.join(rules)}")
    print(f"threads: {torch.get_num_threads()}")
    clash = name_clash()
    if clash is not None:
        print(clash)
