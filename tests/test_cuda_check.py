"""`make cuda-check` finds faults that are planted in a copy of the sources.

Needs nvcc and nvdisasm, which the extra "cuda-check" installs.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_user_rules import USER_RULES

ROOT = Path(__file__).parent.parent
ENGINE = "csrc/engine/cuda"

pytestmark = pytest.mark.slow


BLOCKS = "#define EMOPT_BLOCKS 4"
LAST = "    held.store(launch, setup, place, results);\n"
RETURN = "  if (setup.is_skipped || !next.has_any()) return;\n"
SHARED = "      const uint32_t i = threadIdx.x;\n"
# For each fault: the file, the text to replace, its replacement, and the expected finding. Faults
# that do not mask each other are planted together.
FAULTS = {
    "narrow vectors, contraction, another access, single elements that are widened": (
        (
            f"{ENGINE}/launch.h",
            "kHeld * size < 16 ? kHeld * size : 16",
            "kHeld * size < 8 ? kHeld * size : 8",
            r"LDG\.E\.64 of .*, less than a vector",
        ),
        (
            "emerging_optimizers/_build.py",
            '"--fmad=false"',
            '"--fmad=true"',
            r"PTX, .*fma\.rn\.f32 of .*, contracted or not exactly rounded",
        ),
        (
            f"{ENGINE}/chunk.h",
            RETURN,
            RETURN + "  if (thread == 7) *static_cast<float*>(launch.data[0][0]) = 1;\n",
            r"STG\.E of engine/cuda/chunk\.h:\d+ in .*, outside of the few places",
        ),
        (
            f"{ENGINE}/vectors.h",
            "      Word word = 0;\n      if (i * kStride < remaining) word = from[i * kStride];\n",
            "      const Word word = i * kStride < remaining ? from[i * kStride] : Bits{0};\n",
            r"LOP3 of .*: waits for a single element",
        ),
    ),
    "a spill, elements instead of vectors, an approximate division": (
        (f"{ENGINE}/tuning.h", BLOCKS, BLOCKS.replace("4", "7"), r"[1-9]\d* bytes spill stores"),
        (
            f"{ENGINE}/padded_rule.h",
            "      return step(grad, states...);\n",
            "      return fmaf(grad, grad, step(grad, states...));\n",
            r"PTX, adopt .*fma\.rn\.f32 of .*, contracted or not exactly rounded",
        ),
        (
            f"{ENGINE}/padded_rule.h",
            "{ rule.advance(step); }",
            "{ rule.advance(fma(step, step, step)); }",
            r"PTX, nadam Advance: fma\.rn\.f64 of .*, contracted or not exactly rounded",
        ),
        (
            f"{ENGINE}/vectors.h",
            "      const auto loaded = load_from(vector++);\n",
            "      const auto* element = reinterpret_cast<const uint32_t*>(vector++);\n"
            "      Vector<4 * kWords> loaded;\n"
            "      for (uint32_t i = 0; i < kWords; ++i) loaded.words[i] = element[i];\n",
            r"LDG\.E of .*, less than a vector",
        ),
        (
            "csrc/rules/laprop.h",
            "rescale * grad / (square_root(exp_avg_sq) + eps);",
            "__fdividef(rescale * grad, square_root(exp_avg_sq) + eps);",
            r"PTX, .*div\.approx.* of .*, contracted or not exactly rounded",
        ),
    ),
    "registers, not all loads first, a longer loop": (
        (f"{ENGINE}/tuning.h", BLOCKS, BLOCKS.replace("4", "3"), r"registers, more than 80"),
        (
            f"{ENGINE}/held.h",
            "        packets[k].load_vectors(",
            "        if (k != kGrad) packets[k].load_vectors(",
            r"\[7, 7\] loads of vectors in a row, not 9",
        ),
        (f"{ENGINE}/chunk.h", LAST, LAST + LAST, r"instructions in the loop, more than 1225"),
    ),
    "a warning": (
        (
            f"{ENGINE}/sweep_kernel.h",
            SHARED,
            SHARED + "  int unused = 0;\n",
            r"does not compile(?s:.*)unused",
        ),
    ),
    "no kernels": (
        (
            "csrc/units/laprop_cuda.cu",
            "EMOPT_CUDA_RULE(LaProp)\n",
            "",
            "LaProp ApplyUpdate float32 4096: no such kernel",
        ),
    ),
}


def plant(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("faults", FAULTS.values(), ids=list(FAULTS))
def test_planted_faults_are_found(faults: tuple[tuple[str, ...], ...], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "emerging_optimizers").mkdir()
    shutil.copy(ROOT / "emerging_optimizers" / "_build.py", tmp_path / "emerging_optimizers")
    for file, old, new, _ in faults:
        plant(tmp_path / file, old, new)
    command = [sys.executable, str(ROOT / "tools" / "cuda_check.py"), "--root", str(tmp_path)]
    command += ["--rules", "laprop", "--architectures", "sm_90"]
    user_rules = {rule for rule in USER_RULES for *_, told in faults if f" {rule} " in told}
    if user_rules:
        command += ["--user-rules", *sorted(user_rules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "make cuda-check` installs it" in done.stderr:
        pytest.skip("needs a CUDA compiler: make cuda-check installs it")
    assert done.returncode == 1, done.stdout
    for *_, finding in faults:
        assert re.search(finding, done.stdout + done.stderr), done.stdout + done.stderr
