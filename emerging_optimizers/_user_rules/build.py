import hashlib, subprocess, time, sys
from pathlib import Path
from .. import _build
from .._native import native
def library_for(name, source):
    csrc = Path(__file__).parents[2] / "csrc"
    flags = ["c++", "-std=c++20", "-shared", "-fPIC", *_build.COMPILE_ARGS["unix"], f"-DEMOPT_ABI={_build.abi(csrc)}", "-DEMOPT_CUDA=0", f"-DEMOPT_ONLY_ISA_{native.active_isa()}", f"-I{csrc}"]
    key = hashlib.sha256((source + repr(flags)).encode()).hexdigest()[:16]
    so = Path(f"/tmp/rules/{name}-{key}.so"); so.parent.mkdir(exist_ok=True)
    if not so.exists():
        cpp = so.with_suffix(".cpp"); cpp.write_text(source); t = time.time()
        subprocess.run([*flags, str(cpp), "-o", str(so)], check=True)
        print("compiled", name, round(time.time() - t, 2), file=sys.stderr)
    return so
