"""Every benchmark that trains nothing for long, one after another, each with its tables as JSON in `results/`.

    python benchmarks/all.py                     # tiny models, minutes on two cores
    python benchmarks/all.py --sizes tiny 135m   # an hour
    python benchmarks/all.py --only ladder scoring --sizes 1b --bf16 --tokens 2048    # on a GPU

Other options are passed on to each of them. Benchmarks with `quality` or `claims` in their name train models for hours.
"""

import argparse
import subprocess
import sys
from pathlib import Path


FOLDER = Path(__file__).parent
# Name of the results: script and options
RUNS = {
    "ift": ("ift.py",),
    "preference": ("preference.py",),
    "family": ("preference.py", "--family"),
    "shared_prompt": ("preference.py", "--shared_prompt", "--prompt_share", "0.75"),
    "ladder": ("ladder.py",),
    "scoring": ("scoring.py",),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="some of them")
    parser.add_argument("--sizes", nargs="+", default=["tiny"], help="as for each benchmark")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON files")
    args, others = parser.parse_known_args()
    failed = []
    for name in args.only:
        script, *options = RUNS[name]
        command = [sys.executable, str(FOLDER / script), *options, "--sizes", *args.sizes, *others]
        print(f"\n## {name}: {' '.join(command[1:])}\n", flush=True)
        if subprocess.run([*command, "--json", str(args.output / f"{name}.json")]).returncode:
            failed.append(name)
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
