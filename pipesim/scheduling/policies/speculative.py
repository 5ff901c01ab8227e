"""Synchronous tree speculation: draft, verify in one traversal, repeat. The baseline that PipeInfer is held against.

Source: SpecInfer (arXiv 2305.09781); the "standard speculative" baseline of PipeInfer (arXiv 2407.11798).
"""

from dataclasses import dataclass

from pipesim.scheduling.generation import Generation, SpeculationLimits
from pipesim.scheduling.policy import Policy, register, require
from pipesim.scheduling.speculation import Node
from pipesim.scheduling.tree import DraftTree


@register("speculative")
@dataclass(frozen=True, slots=True)
class Speculative(Policy):
    """One run in flight: the newest token and a drafted tree of up to ``max_nodes`` tokens on ``branches`` branches.

    A branch stops where the drafter's confidence is under ``cutoff``; a runner-up above ``split`` forks a branch.
    """

    max_nodes: int = 4
    branches: int = 1
    cutoff: float = 0.0
    split: float = 0.2

    def __post_init__(self) -> None:
        require("max_nodes", self.max_nodes, 1)
        require("branches", self.branches, 1)
        require("cutoff", self.cutoff, 0.0, 1.0)
        require("split", self.split, 0.0, 1.0)

    @property
    def limits(self) -> SpeculationLimits:
        """One run with one tree."""
        return SpeculationLimits(partitions=1, branches=self.branches, nodes=self.max_nodes)

    def decide(self, generation: Generation) -> None:
        """Asks for a draft after each commit; where there is no room for one, plain decoding goes on."""
        if generation.root.run is not None or generation.draft_tip is not None:
            return
        if not generation.request_draft(generation.root, self.max_nodes, self.branches, self.cutoff, self.split):
            generation.submit_canonical()

    def draft_returned(self, generation: Generation, tip: Node, tree: DraftTree) -> None:
        """Sends the newest token and the tree as one run."""
        if not generation.submit_tree(tip, tree, with_root=True):
            generation.submit_canonical()
