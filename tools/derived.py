"The command line of a tool that writes what follows from something else, or with --check says what does not."
import argparse
import sys
from pathlib import Path


def main(
    doc,       # the tool's docstring
    write,     # root -> writes
    problems,  # root -> a line for each thing that is behind
    fine,      # what --check says if there is none
):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1], help="project (default: this one)")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    if not args.check: return write(args.root.resolve())
    found = problems(args.root.resolve())
    print("\n".join(found) or fine)
    sys.exit(bool(found))
