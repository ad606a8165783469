"""The first error of a failed build, whatever ninja, compilers and linkers write around it."""

import subprocess

import pytest

from emerging_optimizers._build_output import first_error, output_of, was_killed

# A folder's name and an option have the word, too.
COMMAND = "/opt/error: 1/c++ -Werror -DTEXT='fatal error: no' -c '/tmp/error: 2/a.cpp' -o a.o"


def ninja_output(written: str, code: int = 1) -> str:
    return (
        f"[1/3] {COMMAND}\na.cpp:1:1: warning: this may be an error: maybe [-Wno-error]\n"
        f"[2/3] {COMMAND}\nFAILED: [code={code}] a.o \n{COMMAND}\n{written}"
        f"[3/3] {COMMAND}\nFAILED: b.o \n{COMMAND}\nb.cpp:1:1: error: of another file\n"
        "ninja: build stopped: subcommand failed.\n"
    )


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            "In file included from a.cpp:1:\n"
            "error.h: In member function 'int error::f()':\n"
            "error.h:3:4: warning: not an error: [-Wfoo]\n"
            "    3 | error: a label of this name\n"
            "error.h:9:4: error: 'x' was not declared in this scope\n"
            "error.h:10:4: error: second\n",
            "error.h:9:4: error: 'x' was not declared in this scope",
        ),
        (
            "a.cpp:2:10: fatal error: x.h: No such file or directory\n"
            "    2 | #include <x.h>\n      |          ^~~~~\ncompilation terminated.\n",
            "a.cpp:2:10: fatal error: x.h: No such file or directory",
        ),
        (
            "\x1b[01m\x1b[Ka.cpp:2:3:\x1b[m\x1b[K \x1b[01;31m\x1b[Kerror: \x1b[m\x1b[Kred"
            " [\x1b]8;;https://gcc.gnu.org/\x07-Wred\x1b]8;;\x07]\n",
            "a.cpp:2:3: error: red [-Wred]",
        ),
        (
            "c++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated.\n",
            "c++: fatal error: Killed signal terminated program cc1plus",
        ),
        (
            "/usr/bin/ld: a.o: warning: relocation in read-only section\n"
            "/usr/bin/ld: a.o: in function `f()':\n"
            "a.cpp:(.text+0x5): undefined reference to `g()'\n"
            "collect2: error: ld returned 1 exit status\n",
            "a.cpp:(.text+0x5): undefined reference to `g()'",
        ),
        (
            "/usr/bin/ld: cannot find -lfoo: No such file or directory\n"
            "collect2: error: ld returned 1 exit status\n",
            "/usr/bin/ld: cannot find -lfoo: No such file or directory",
        ),
        (
            "/usr/bin/ld: a.o: relocation R_X86_64_32 can not be used; recompile with -fPIC\n"
            "/usr/bin/ld: failed to set dynamic section sizes: bad value\n"
            "collect2: error: ld returned 1 exit status\n",
            "/usr/bin/ld: a.o: relocation R_X86_64_32 can not be used; recompile with -fPIC",
        ),
        (
            "ld.lld: error: undefined symbol: g()\n>>> referenced by a.cpp\n"
            "clang++: error: linker command failed with exit code 1 (use -v to see invocation)\n",
            "ld.lld: error: undefined symbol: g()",
        ),
        (
            "/tmp/a.s: Assembler messages:\n/tmp/a.s:12: Error: no such instruction: `vfoo'\n",
            "/tmp/a.s:12: Error: no such instruction: `vfoo'",
        ),
        (
            "nvcc warning : Support for older GPUs will be removed\n"
            "nvcc fatal   : Unsupported gpu architecture 'compute_20'\n",
            "nvcc fatal   : Unsupported gpu architecture 'compute_20'",
        ),
        (
            'kernels.cu(3): warning #177-D: "error: x"\nkernels.cu(9): error #20-D: no "x" here\n',
            'kernels.cu(9): error #20-D: no "x" here',
        ),
        (
            "a.cpp\na.cpp(3): error C2065: 'x': undeclared identifier\n",
            "a.cpp(3): error C2065: 'x': undeclared identifier",
        ),
        (
            "env: 'g++-99': No such file or directory\n",
            "env: 'g++-99': No such file or directory",
        ),
        ("/bin/sh: 1: g++-99: not found\n", "/bin/sh: 1: g++-99: not found"),
        ("a.cpp:1:1: error: " + "x" * 5000 + "\n", "a.cpp:1:1: error: " + "x" * 482 + " ..."),
        ("Killed\n", "Killed"),
        ("  \n", "the compiler printed nothing (exit status 1)"),
        ("", "the compiler printed nothing (exit status 1)"),
    ],
)
def test_first_error(written: str, expected: str) -> None:
    error = subprocess.CalledProcessError(1, ["ninja"], ninja_output(written).encode())
    wrapped = RuntimeError("Error building extension")
    wrapped.__cause__ = error
    assert first_error(output_of(wrapped)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "ninja: error: build.ninja:3: expected newline",
        "Ninja is required to load C++ extensions (pip install ninja to get it)",
    ],
)
def test_errors_before_the_compiler(text: str) -> None:
    assert first_error(output_of(RuntimeError(text))) == text
    assert first_error(text + "\n") == text


def test_bytes_that_are_no_text() -> None:
    error = UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid start byte")
    error.__context__ = subprocess.CalledProcessError(
        1, ["ninja"], ninja_output("").encode() + b"FAILED: x\ncommand\n\xe9.cpp:1:1: error: y\n"
    )
    assert first_error(output_of(error).rpartition("ninja: ")[2]) == "\ufffd.cpp:1:1: error: y"


def test_killed_compilers_are_known() -> None:
    assert was_killed(ninja_output("", code=137))
    assert was_killed("c++: fatal error: Killed signal terminated program cc1plus")
    assert was_killed("cc1plus: out of memory allocating 65536 bytes")
    assert not was_killed(ninja_output("a.cpp:1:1: error: x\n"))
