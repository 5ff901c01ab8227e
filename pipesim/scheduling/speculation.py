"""What is in flight: the trie of speculated tokens below the committed text, and the runs that compute it.

The trie's root is the last committed token. A commit moves the root to the child that holds the committed token;
every other child dies with its whole subtree. A run lives while any of its nodes does, whichever branch that is on.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipesim.errors import InvariantError
from pipesim.scheduling.runs import Run


@dataclass(eq=False, slots=True)
class InFlightRun:
    """The head's ledger of one submitted run."""

    run: Run
    partition: int | None = None
    live_nodes: int = 0
    is_prefill: bool = False
    useful_rows: int = 0
    cancelled: bool = False

    @property
    def run_id(self) -> int:
        """The run's number, increasing in launch order."""
        return self.run.run_id


class Node:
    """One token of the trie. ``run`` is None until a submitted run carries it in row ``row``."""

    __slots__ = (
        "alive",
        "children",
        "confidence",
        "first_child",
        "parent",
        "position",
        "row",
        "run",
        "sequences",
        "token",
    )

    def __init__(self, token: int, position: int, parent: "Node | None" = None, confidence: float = 1.0) -> None:
        self.token = token
        self.position = position
        self.parent = parent
        self.confidence = confidence
        self.run: InFlightRun | None = None
        self.row = 0
        self.sequences = 0
        self.alive = True
        self.children: dict[int, Node] = {}
        self.first_child: Node | None = None

    def attach(self, run: InFlightRun, row: int) -> None:
        """Says that row ``row`` of ``run`` computes this node."""
        self.run, self.row, self.sequences = run, row, run.run.sequences[row]
        run.live_nodes += 1

    def add_child(self, token: int, confidence: float = 1.0) -> "Node":
        """Hangs a new node under this one. Raises InvariantError if that token hangs there already."""
        if token in self.children:
            raise InvariantError(f"token {token} was drafted twice at position {self.position + 1}")
        child = self.children[token] = Node(token, self.position + 1, self, confidence)
        if self.first_child is None:
            self.first_child = child
        return child

    def subtree(self) -> "Iterator[Node]":
        """This node and everything below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def first_leaf(self) -> "Node":
        """The end of branch 0: follows first children as long as there are any."""
        node = self
        while node.first_child is not None:
            node = node.first_child
        return node

    def path(self) -> tuple[int, ...]:
        """Tokens below the trie's root down to this node."""
        tokens: list[int] = []
        node = self
        while (parent := node.parent) is not None:
            tokens.append(node.token)
            node = parent
        return tuple(tokens[::-1])


def advance(root: Node, token: int) -> Node:
    """Commits ``token`` below ``root``: returns the new root and marks all that contradicts it as dead."""
    chosen = root.children.pop(token, None)
    root.alive = False
    for rejected in root.children.values():
        for node in rejected.subtree():
            node.alive = False
            node.parent = None  # no cycle is left for the garbage collector
            if node.run is not None:
                node.run.live_nodes -= 1
    root.children = {}
    if root.run is not None:
        root.run.live_nodes -= 1
    if chosen is None:
        chosen = Node(token, root.position + 1)
    chosen.parent = None
    return chosen
