"""Load, aborts and kills against a real server for ten minutes; exit status 1 if anything that has to hold did not.

python -m tests.soak [--minutes 10] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import sys

from tests.soak.answers import questions
from tests.soak.run import Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="default: 10")
    parser.add_argument("--seed", type=int, default=0, help="of the load; default: 0")
    arguments = parser.parse_args()
    result = Soak(questions(), arguments.seed).run(60 * arguments.minutes)
    width = max(map(len, result.outcomes), default=0)
    for outcome, count in sorted(result.outcomes.items()):
        print(f"{outcome:{width}}  {count:7,d}")
    print(f"{result.rounds} rounds, {result.restarts} restarts, slowest /health {result.slowest_health_seconds:.2f} s")
    for violation in result.violations:
        print(f"VIOLATION {violation}")
    print(json.dumps(result.data()))
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
