"""``python -m emerging_optimizers`` prints what is installed and in use, or builds rules."""

import argparse
import sys

from ._config import show_config


def main() -> None:
    """Run the command that the arguments name."""
    parser = argparse.ArgumentParser(
        prog="python -m emerging_optimizers",
        description="Without a command: print what is installed and in use.",
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    build = commands.add_parser(
        "build-rules",
        help="compile the rules that packages define into the packages' folders",
        description="Compile the rules that packages define, for all instruction sets of this"
        " platform, into the packages' folders, from which they are loaded without a compiler.",
    )
    build.add_argument("packages", nargs="+", metavar="package", help="the name to import it by")
    arguments = parser.parse_args()
    if arguments.command is None:
        show_config()
        return
    from ._build_cache import BuildError
    from ._user_rules.build_rules import build_rules

    try:
        for library in build_rules(arguments.packages):
            print(f"{library} ({library.stat().st_size / 1e3:.0f} kB)")
    except BuildError as error:
        sys.exit(f"emerging_optimizers: {error.reason}. {error.remedy}")


if __name__ == "__main__":
    main()
