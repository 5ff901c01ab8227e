"""One generation as the head knows it, and the moves that a policy can make on it.

The text is committed up to the *frontier*. Below it hangs the trie of speculated tokens (``speculation.py``), whose
nodes are computed by the runs in flight. KV cells of positions before ``shared`` belong to every sequence, in flight
or done: a new run needs no copy of them. Moves append commands; KV operations queue up for the next run's frame.
"""

from collections import deque
from dataclasses import dataclass

from pipesim.errors import BadInputError, InvariantError
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.commands import CancelRuns, Command, RequestDraft, SubmitRun
from pipesim.scheduling.events import GenerationStarted
from pipesim.scheduling.partitions import CANONICAL, PartitionPool, lowest_sequence
from pipesim.scheduling.runs import END, KvOperation, Run, RunKind, SequenceCopy, SequenceRemove
from pipesim.scheduling.speculation import InFlightRun, Node, advance
from pipesim.scheduling.tree import DraftTree

_FADING = 0.98  # what a drafted token still counts after the next commit: some 50 tokens are remembered


@dataclass(frozen=True, slots=True)
class SpeculationLimits:
    """How much a policy may have in flight: runs, branches of a run's tree, and tokens of a run's tree."""

    partitions: int = 0
    branches: int = 1
    nodes: int = 0

    def __post_init__(self) -> None:
        if self.partitions < 0 or self.branches < 1 or self.nodes < 0:
            raise BadInputError(f"a policy's limits must be at least 0, 1 and 0, got {self}")

    def kv_cells(self, text: int) -> int:
        """Enough KV cells for a text of so many tokens and all that can be in flight."""
        return text + self.partitions * (self.nodes + 1)


class Generation:
    """State and moves. Policies read the attributes and call the moves; only the scheduler does more."""

    def __init__(self, started: GenerationStarted, limits: SpeculationLimits, kv_cells: int | None) -> None:
        if not started.prompt or started.max_new_tokens < 1:
            raise BadInputError("a generation needs a prompt of at least one token and max_new_tokens of at least 1")
        self.prompt_length = len(started.prompt)
        self.limit = self.prompt_length + started.max_new_tokens
        self.limits = limits
        self.stop_tokens = frozenset(started.stop_tokens)
        cells = limits.kv_cells(self.limit) if kv_cells is None else kv_cells
        if cells < self.limit:
            raise BadInputError(f"kv_cells: {cells} cells cannot hold prompt + max_new_tokens = {self.limit}")
        self.text = list(started.prompt)
        self.partitions = PartitionPool(limits.partitions, limits.branches)
        self.cells = CellTable(cells, self.partitions.sequences)
        self.commands: list[Command] = []
        self.epoch = 0
        self.in_flight: deque[InFlightRun] = deque()
        self._kept = self._promised = 0.0
        self._next_run_id = 0
        self._next_request_id = 0
        self.forget_pipeline()

    def forget_pipeline(self) -> None:
        """Starts over with empty stages: nothing in flight, no cells, no drafts, the committed text as it is."""
        for run in self.in_flight:
            if run.partition is not None:
                self.partitions.give_back(run.partition)
        self.in_flight.clear()
        self.cells.clear()
        self._operations: list[KvOperation] = []
        self.shared = 0
        self.root = Node(self.text[-1], self.frontier - 1)
        self.abandon_draft()
        self.new_root()

    def new_root(self) -> None:
        """Resets what is counted since the last commit; a draft whose context died is abandoned."""
        self._contradicted = True
        self.micro_batches = 0
        self.empty_drafts = 0
        self.refused = 0.0
        self.root_launched = False
        if self.draft_tip is not None and not self.draft_tip.alive:
            self.abandon_draft()

    def abandon_draft(self) -> None:
        """Nobody waits for a draft any more; one that comes all the same is ignored."""
        self.draft_tip: Node | None = None
        self.draft_id: int | None = None
        self.overtaken: tuple[int, ...] = ()
        self._draft_nodes = 0

    def commit(self, token: int) -> None:
        """``token`` is text now: the root moves on.

        A draft on its way that was to follow the old root is not lost: it may agree with ``token``. What it has beyond
        ``overtaken``, the tokens that were committed since its context was, will follow the new root.
        """
        drafted = self.root.children
        self._kept = _FADING * self._kept + (token in drafted)
        self._promised = _FADING * self._promised + sum(node.confidence for node in drafted.values())
        overtaken = self.draft_tip is self.root
        self.text.append(token)
        self.root = advance(self.root, token)
        if overtaken:
            self.draft_tip = self.root
            self.overtaken += (token,)
            if len(self.overtaken) >= self._draft_nodes:
                self.abandon_draft()
        self.new_root()

    @property
    def trust(self) -> float:
        """What the drafter's confidence is worth: drafted tokens that came true by how many it promised lately.

        Verified tokens promise as many as their confidences sum up to. Both counts fade with every commit, beside one
        promise kept that does not: a drafter that was given up is tried again now and then.
        """
        return (1.0 + self._kept) / (1.0 + self._promised)

    @property
    def frontier(self) -> int:
        """The position of the next uncommitted token."""
        return len(self.text)

    # -- moves ---------------------------------------------------------------------------------------------------

    def submit_canonical(self) -> None:
        """Runs the newest token by itself.

        If a live speculative run carries it already, this run is redundant: its cell is sequence 0's alone and goes
        when that other run's cell, which comes home first, is promoted. Where cells are scarce it is left out.
        """
        root = self.root
        if root.run is None:
            self._share_root()
            run = self._submit(RunKind.CANONICAL, [root.token], [root.position], [self.cells.everyone])
            run.useful_rows = 1
            root.attach(run, 0)
        elif self.cells.free > self.limits.nodes + 1:  # a draft that is on its way must find its cells
            self._submit(RunKind.CANONICAL, [root.token], [root.position], [CANONICAL])
        self.root_launched = True

    def submit_tree(self, tip: Node, tree: DraftTree, with_root: bool = False) -> bool:
        """Runs a drafted tree below ``tip`` in a partition of its own, behind the root's token if ``with_root``.

        Says whether there was anything to run: an empty tree and a tree beyond the last useful position are not.
        """
        self._check_tree(tip, tree)
        last = self.limit - 2  # the token after this one ends the text: nothing drafted later can matter
        grown: list[Node | None] = []  # None: beyond that position
        for token, parent, confidence in zip(tree.tokens, tree.parents, tree.confidences, strict=True):
            above = tip if parent < 0 else grown[parent]
            fits = above is not None and above.position < last
            grown.append(above.add_child(token, confidence) if above is not None and fits else None)
        nodes = [node for node in grown if node is not None]
        if not nodes:
            self.empty_drafts += 1
            self.refused = tree.refused
            return False
        partition = self.partitions.take()
        if with_root:
            self._share_root()
            nodes.insert(0, self.root)
            self.root_launched = True
        if tip.position >= self.shared:
            targets = self.partitions.sequence_set(partition)
            self.queue(SequenceCopy(lowest_sequence(tip.sequences), targets, self.shared, tip.position + 1))
        self._name_branches(nodes, partition)
        run = self._submit(
            RunKind.SPECULATIVE,
            [node.token for node in nodes],
            [node.position for node in nodes],
            [node.sequences for node in nodes],
            partition,
        )
        run.useful_rows = int(with_root)
        for row, node in enumerate(nodes):
            node.run, node.row = run, row
        run.live_nodes = len(nodes)
        self.micro_batches += 1
        return True

    def request_draft(self, tip: Node, max_nodes: int, branches: int, cutoff: float, split: float) -> bool:
        """Asks the drafter to continue ``tip``; an unanswered request is abandoned.

        Says whether there is a free partition, cells and a useful position for what would come back.
        """
        if max_nodes > self.limits.nodes or branches > self.limits.branches or not tip.alive:
            raise InvariantError(
                f"a policy asked for {max_nodes} tokens on {branches} branches, beyond its {self.limits}"
            )
        if not self.partitions.free or self.cells.free < max_nodes + 1 or tip.position >= self.limit - 2:
            return False
        self.draft_id, self.draft_tip, self.overtaken = self._next_request_id, tip, ()
        self._draft_nodes = max_nodes
        self._next_request_id += 1
        self.commands.append(RequestDraft(self.draft_id, self.frontier, tip.path(), max_nodes, branches, cutoff, split))
        return True

    def cancel_dead_runs(self) -> None:
        """Calls off every speculative run in flight of which no branch agrees with the text any more."""
        if not self._contradicted:
            return  # only a commit makes runs die
        self._contradicted = False
        dead = [
            run
            for run in self.in_flight
            if run.run.kind is RunKind.SPECULATIVE and not run.live_nodes and not run.cancelled
        ]
        self.cancel(dead)

    # -- what the scheduler needs beside the moves ------------------------------------------------------------------

    def cancel(self, runs: list[InFlightRun]) -> None:
        """Calls off ``runs``."""
        for run in runs:
            run.cancelled = True
        if runs:
            self.commands.append(CancelRuns(tuple(run.run_id for run in runs)))

    def submit_prefill(self, kind: RunKind, start: int, stop: int) -> None:
        """Runs committed text ``[start, stop)`` for every sequence; predicts its last row if that ends the text."""
        ends_text = stop == self.frontier
        run = self._submit(
            kind,
            self.text[start:stop],
            list(range(start, stop)),
            [self.cells.everyone] * (stop - start),
            first_output_row=stop - start - ends_text,
        )
        run.is_prefill = True
        self.shared = stop
        if ends_text:
            self.root.attach(run, stop - start - 1)

    def queue(self, operation: KvOperation) -> None:
        """Puts a KV operation in front of the next run; the scheduler's own table has it at once."""
        self.cells.apply(operation)
        self._operations.append(operation)

    def promote(self, last: Node) -> None:
        """Verified cells up to ``last`` join every sequence; whatever else is at their positions is freed."""
        stop = last.position + 1
        if stop <= self.shared:
            return
        winner = lowest_sequence(last.sequences)
        self.queue(SequenceRemove(self.cells.everyone & ~(1 << winner), self.shared, stop))
        self.queue(SequenceCopy(winner, self.cells.everyone, self.shared, stop))
        self.shared = stop

    def release_partition(self, run: InFlightRun) -> None:
        """A speculative run is over: its partition can serve another one."""
        if run.partition is None:
            return
        self.queue(SequenceRemove(self.partitions.sequence_set(run.partition), self.shared, END))
        self.partitions.give_back(run.partition)
        run.partition = None

    def _share_root(self) -> None:
        """The newest token is in no live run: all cells from its position on are stale, and its own is everyone's."""
        self.queue(SequenceRemove(self.cells.everyone, self.shared, END))
        self.root.sequences = self.cells.everyone
        self.shared = self.root.position + 1

    def _name_branches(self, nodes: list[Node], partition: int) -> None:
        """Gives every leaf a sequence of the partition, and every node the sequences of the leaves below it."""
        branch = 0
        for node in reversed(nodes):
            if node is self.root:
                continue
            if node.first_child is None:
                node.sequences = 1 << self.partitions.sequence(partition, branch)
                branch += 1
            elif len(node.children) == 1:
                node.sequences = node.first_child.sequences
            else:
                for child in node.children.values():
                    node.sequences |= child.sequences

    def _submit(
        self,
        kind: RunKind,
        tokens: list[int],
        positions: list[int],
        sequences: list[int],
        partition: int | None = None,
        first_output_row: int = 0,
    ) -> InFlightRun:
        run = Run(
            run_id=self._next_run_id,
            epoch=self.epoch,
            kind=kind,
            tokens=tuple(tokens),
            positions=tuple(positions),
            sequences=tuple(sequences),
            first_output_row=first_output_row,
            kv_operations=tuple(self._operations),
        )
        self.cells.allocate(run.positions, run.sequences)
        self._operations.clear()
        self._next_run_id += 1
        in_flight = InFlightRun(run, partition)
        self.in_flight.append(in_flight)
        self.commands.append(SubmitRun(run))
        return in_flight

    def _check_tree(self, tip: Node, tree: DraftTree) -> None:
        if not tip.alive or not self.partitions.free:
            raise InvariantError("a policy submits a draft below a dead token, or without a free partition")
        if tree.leaves > self.limits.branches or len(tree.tokens) > self.limits.nodes:
            raise InvariantError(
                f"the drafter returned {len(tree.tokens)} tokens on {tree.leaves} branches, "
                f"{self.limits.nodes} on {self.limits.branches} were asked for"
            )
