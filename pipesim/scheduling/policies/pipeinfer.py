"""PipeInfer: asynchronous pipelined speculation with early cancellation (arXiv 2407.11798)."""

from dataclasses import dataclass

from pipesim.scheduling.generation import Generation, SpeculationLimits
from pipesim.scheduling.policy import Policy, register, require
from pipesim.scheduling.speculation import Node
from pipesim.scheduling.tree import DraftTree


@register("pipeinfer")
@dataclass(frozen=True, slots=True)
class PipeInfer(Policy):
    """Keeps the pipeline full of small speculative runs beside the single-token run that is sure to be useful.

    ``micro_batch`` tokens at most make up one speculative run, on up to ``branches`` branches; the chain goes on from
    branch 0. The confidence bar is ``p_accept + micro_batches * p_recovery - empty_drafts * p_decay``, both counted
    since the last commit: recovery raises it with depth, decay lowers it while drafting came to nothing. A runner-up
    above ``p_split`` plus the same adjustment forks a branch. ``partitions`` bounds the speculative runs in flight.

    The paper's four mechanisms, each of which can be switched off:
    ``asynchronous``: the newest token leaves at once, drafting goes on beside it; off: it waits for its draft and both
    leave as one run. ``continuous``: drafting goes on while runs are in flight; off: one micro-batch after each
    commit. ``multibuffering``: as many partitions as ``partitions`` says; off: a single one, so that a speculative run
    has to come home before the next one may write. ``cancellation``: runs that the text contradicts are called off;
    off: they are computed to the end.
    ``always_canonical``: as in the paper, run the newest token by itself even if a live speculative run carries it.

    Not in the paper: ``calibrated`` holds the bars against what the drafter's confidence has proven to be worth lately
    (``Generation.trust``), so that a drafter that promises more than it keeps is asked for less, or for nothing.
    """

    micro_batch: int = 4
    branches: int = 1
    p_accept: float = 0.1
    p_split: float = 0.3
    p_recovery: float = 0.0
    p_decay: float = 0.0
    partitions: int = 16
    asynchronous: bool = True
    continuous: bool = True
    multibuffering: bool = True
    cancellation: bool = True
    always_canonical: bool = False
    calibrated: bool = False

    def __post_init__(self) -> None:
        for field in ("micro_batch", "branches", "partitions"):
            require(field, getattr(self, field), 1)
        for field in ("p_accept", "p_split", "p_recovery", "p_decay"):
            require(field, getattr(self, field), 0.0, 1.0)

    @property
    def limits(self) -> SpeculationLimits:
        """A partition for each speculative run; a single buffer without multibuffering."""
        return SpeculationLimits(self.partitions if self.multibuffering else 1, self.branches, self.micro_batch)

    def decide(self, generation: Generation) -> None:
        """Calls off what the text contradicts, sends the newest token, then drafts on."""
        if self.cancellation:
            generation.cancel_dead_runs()
        root = generation.root
        if root.run is None:
            if self.asynchronous or not self._drafting(generation, root):
                generation.submit_canonical()
        elif self.always_canonical and not generation.root_launched:
            generation.submit_canonical()
        if generation.draft_tip is None and (self.continuous or not generation.micro_batches):
            self._drafting(generation, root.first_leaf())

    def draft_returned(self, generation: Generation, tip: Node, tree: DraftTree) -> None:
        """Sends the micro-batch; without asynchronous speculation the newest token has waited for it."""
        with_root = tip.run is None
        if not generation.submit_tree(tip, tree, with_root) and with_root:
            generation.submit_canonical()

    def _drafting(self, generation: Generation, tip: Node) -> bool:
        """Sees to it that a draft after ``tip`` is on its way, if there is room and confidence for one."""
        if generation.draft_tip is tip:
            return True
        adjustment = generation.micro_batches * self.p_recovery - generation.empty_drafts * self.p_decay
        trust = generation.trust if self.calibrated else 1.0
        accept, split = ((bar + adjustment) / trust for bar in (self.p_accept, self.p_split))
        if accept >= 1.0 or not self._worth_asking(generation):
            return False
        return generation.request_draft(tip, self.micro_batch, self.branches, max(0.0, accept), max(0.0, split))

    def _worth_asking(self, generation: Generation) -> bool:
        """After an empty draft only a lower bar can bring more, and only where there was a candidate at all."""
        return not generation.empty_drafts or (self.p_decay > 0.0 and generation.refused > 0.0)
