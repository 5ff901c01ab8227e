"""``python -m analysis.studies -o docs/studies [NAME ...]``: answer the questions of the scenario library."""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

import analysis.studies as package
from analysis.laboratory import laboratory
from analysis.pages import fill
from analysis.studies.bench import Bench, Finding
from analysis.style import STYLE
from pipesim.cli.common import diagnostic
from pipesim.errors import BadInputError, PipesimError

SCENARIOS = Path("scenarios")
MEMORY = Path("out/studies.journal")
COMMAND = "python -m analysis.studies -o docs/studies"
_ANSWERS = ("**", "* ", "No two lines")
"""How a finding begins, or what a sweep says about crossings."""


def names() -> list[str]:
    """The studies: every module of this package that has a scenario file of its name."""
    modules = sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(package.__path__))
    return [name for name in modules if (SCENARIOS / f"{name}.yaml").exists()]


def header(path: Path) -> tuple[str, str]:
    """A scenario file's header comment: the question, and what is said beyond it.

    Raises:
        BadInputError: the file does not begin with a question.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    question, mark, context = " ".join(lines).partition("?")
    if not mark:
        raise BadInputError(f"{path}: its header comment asks no question, begin the file with one")
    return question + mark, context.strip()


def answer(bench: Bench, name: str) -> Finding:
    """Carries a study out."""
    module = importlib.import_module(f"analysis.studies.{name.replace('-', '_')}")
    with matplotlib.rc_context(STYLE):
        finding: Finding = module.study(bench)
    return finding


def page(name: str, bench: Bench, finding: Finding) -> str:
    """The study's document."""
    question, context = header(bench.path)
    seeds = bench.seeds
    ended = "Searches that ended at the end of what was searched: " + "; ".join(bench.notes.values()) + "."
    paragraphs = [
        f"# {question}",
        fill(f"**{finding.answer}**"),
        f"![{name}]({name}.png)",
        *finding.body,
        "## How it was obtained",
        fill(f"Simulated, not measured, from [{name}.yaml](../../scenarios/{name}.yaml). {context}"),
        *map(fill, finding.method),
        fill(
            f"Figures are means over seeds {seeds[0]} to {seeds[-1]}, where nothing else is said, with their 95 % "
            "confidence intervals. All policies meet the same text and the same lucky and unlucky positions, and wrote "
            "the same text, token for token; ratios are taken within each seed (geometric mean)."
        ),
        *([fill(ended)] if bench.notes else []),
        f"Made by `{COMMAND} {name}`.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def index(folder: Path) -> str:
    """The table of all scenario files' questions that have a page in ``folder``, a sweep's among them."""
    lines = ["| question | answer |", "|---|---|"]
    for scenario in sorted(SCENARIOS.glob("*.yaml")):
        path = folder / f"{scenario.stem}.md"
        if path.exists():
            parts = path.read_text(encoding="utf-8").split("\n\n")
            said = next(part for part in parts if part.startswith(_ANSWERS))
            text = " ".join(line.removeprefix("* ").strip("*") for line in said.splitlines())
            lines.append(f"| [{header(scenario)[0]}]({path.name}) | {text} |")
    intro = (
        "Each answer is simulated from a scenario file that can be run, bent and swept: `pipesim simulate "
        "scenarios/NAME.yaml`. The pages say how every figure was obtained, and by which command."
    )
    return "\n\n".join(["# Questions and answers", fill(intro), "\n".join(lines), f"Made by `{COMMAND}`."]) + "\n"


def chosen(asked: Sequence[str]) -> Sequence[str]:
    """The studies asked for, or all. Raises BadInputError for a name that is none."""
    known = names()
    for name in asked:
        if name not in known:
            raise BadInputError(f"{name}: there is no such study, known are {', '.join(known)}")
    return asked or known


def main(
    output: Annotated[Path, typer.Option("-o", help="Folder to write pages and figures to.")],
    studies: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Which ones; all by default.")] = None,
    quick: Annotated[bool, typer.Option(help="Smallest form with few seeds: to see that it works.")] = False,
    memory: Annotated[
        Path, typer.Option(help="Keeps finished simulations, so that a broken-off run goes on.")
    ] = MEMORY,
) -> None:
    """Simulate, tabulate and draw the answers to the scenario library's questions."""
    try:
        wanted = chosen(studies or [])
        output.mkdir(parents=True, exist_ok=True)
        with laboratory(memory) as at_hand:
            for name in wanted:
                diagnostic(name)
                bench = Bench(at_hand, SCENARIOS / f"{name}.yaml", quick)
                finding = answer(bench, name)
                finding.picture.savefig(output / f"{name}.png", dpi=160)
                (output / f"{name}.md").write_text(page(name, bench, finding), encoding="utf-8")
        (output / "README.md").write_text(index(output), encoding="utf-8")
    except (PipesimError, OSError) as problem:
        diagnostic(f"error: {problem}")
        raise typer.Exit(2 if isinstance(problem, BadInputError) else 1) from None


if __name__ == "__main__":
    typer.run(main)
