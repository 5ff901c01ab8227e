"""``python -m analysis.exactness -o docs/exactness.md``: 2,000 combinations, ten minutes on two idle cores.

What is finished stands in a journal beside the page's output: an interrupted campaign goes on where it was. After a
change of the code, begin with a new journal.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from analysis.exactness.campaign import EQUAL, Outcome, run_campaign
from analysis.exactness.mutations import DEFECTS
from analysis.exactness.page import page
from pipesim.cli.common import INTERRUPTED, check_outputs, diagnostic
from pipesim.sweep.journal import Journal

DEFECTIVE = (0, 4, 6, 13, 216, 284, 291, 293, 347, 563, 575)
"""Combinations that are run with defects, of five pipelines: most fork, some end with drafts in flight."""


def main() -> None:
    """Runs what is not in the journal yet, and writes the page; exits with 1 if any text is another one."""
    parser = argparse.ArgumentParser(prog="python -m analysis.exactness", description=__doc__.splitlines()[0])
    parser.add_argument("--combinations", type=int, default=2000, metavar="N", help="run combinations 0 .. N-1")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="run these, whatever the journal says")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="pipelines at a time (all cores)"
    )
    parser.add_argument("--defect", choices=DEFECTS, help="with --only: put this defect in")
    parser.add_argument("--journal", type=Path, default=Path("out/exactness.jsonl"), metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the page, after runs with defects")
    options = parser.parse_args()
    check_outputs(options.output)
    if options.only:
        outcomes = run_campaign(options.only, Journal(), diagnostic, options.jobs, options.defect)
        for outcome in outcomes:
            print(outcome)
    else:
        options.journal.parent.mkdir(parents=True, exist_ok=True)
        with Journal.opened(options.journal) as journal:
            outcomes = run_campaign(range(options.combinations), journal, diagnostic, options.jobs)
            if options.output:
                text = page(outcomes, _with_defects(journal, options.jobs), _commit())
                options.output.write_text(text, encoding="utf-8")
    bad = [outcome["number"] for outcome in outcomes if outcome["verdict"] != EQUAL]
    diagnostic(f"{len(outcomes)} combinations, {len(bad)} bad{': ' if bad else ''}{' '.join(map(str, bad))}")
    sys.exit(1 if bad else 0)


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def _with_defects(journal: Journal, jobs: int) -> dict[str, list[Outcome]]:
    found = {}
    for name in DEFECTS:
        found[name] = run_campaign(DEFECTIVE, journal, diagnostic, jobs, name)
        diagnostic(f"{name}: found in {sum(one['verdict'] != EQUAL for one in found[name])} of {len(found[name])}")
    return found


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        diagnostic("interrupted: the same command goes on")
        sys.exit(INTERRUPTED)
