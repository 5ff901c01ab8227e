"""Drafting with a model: a smaller one of the same vocabulary, or any other that runs in this process."""

import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from backends.drafting.base import WIDTH, Abandoned, Context, Drafter, never
from backends.models.exact import LARGEST_TILE
from backends.models.stage_model import StageModel
from backends.reference import PREFILL_CHUNK
from backends.sampling import Sampling, softmax
from pipesim.errors import BadInputError
from pipesim.scheduling.commands import RequestDraft
from pipesim.scheduling.runs import END, KvOperation, Run, RunKind, SequenceCopy, SequenceRemove
from pipesim.scheduling.tree import Candidate

_NODES = 128  # tree nodes computed per request at most, one sequence and one KV cell each
_EVERYONE = (1 << _NODES + 1) - 1
_sessions = itertools.count()

Path = tuple[int, ...]


class ModelDrafter(Drafter):
    """Drafts with ``model``, which holds all layers of the draft model; texts of up to ``max_context`` tokens.

    Of models of one family the larger ones often have a few more embeddings, none of which stands for a token. Only
    tokens below ``vocabulary``, the target's, are proposed (None: all); after one that the draft model does not know,
    nothing is.

    Candidates rank by the target's own noise (see ``sampling.py``), so at any temperature the best one is what this
    model would have sampled; the confidence is the plain softmax probability. All branches of a level are one batch.
    KV cells stay between requests: only what the text does not share with the last request is computed anew.
    """

    def __init__(self, model: StageModel, max_context: int, vocabulary: int | None = None) -> None:
        if not (model.is_first and model.is_last):
            raise BadInputError("model drafter: the draft model must hold all of its layers")
        if not 0 < max_context <= model.config.max_context:
            raise BadInputError(
                f"model drafter: max_context {max_context} must be between 1 and the draft model's "
                f"{model.config.max_context}"
            )
        super().__init__()
        self._model, self._max_context, self._vocabulary = model, max_context, vocabulary
        self._session: int | None = None  # of the draft model, while there is a text
        self._forget()

    def _forget(self) -> None:
        self._cached = array("i")  # tokens whose cells every sequence holds
        self._agreed = 0  # so many of them are known to be the text's
        self._nodes: dict[Path, int] = {}  # computed tree nodes below them -> their sequence
        self._ranked: dict[Path, list[Candidate]] = {}  # () stands for the end of the context
        self._operations: list[KvOperation] = []  # to be carried out before the next run
        self._runs = 0

    def start(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """A new generation begins, with empty KV cells."""
        self.end()
        self._session = next(_sessions)
        self._model.open_session(self._session, self._max_context + _NODES, _NODES + 1, sampling)
        self._forget()
        super().start(prompt, sampling)

    def another(self) -> Self:
        """As the base's."""
        fresh = super().another()
        fresh._session = None
        return fresh

    def end(self) -> None:
        """As the base's."""
        if self._session is not None:
            self._model.close_session(self._session)
            self._session = None

    def prepare(self, context: Context, request: RequestDraft, abandoned: Callable[[], bool]) -> None:
        """Brings the KV cells to ``context`` and computes the candidates that follow it."""
        self._request, self._abandoned = request, abandoned
        new = context[min(self._agreed, request.frontier) :]
        if len(context) > self._max_context or max(new, default=0) >= self._model.config.vocabulary:
            self._ranked = {(): []}  # beyond its reach it proposes nothing
            return
        self._settle(context)
        for start in range(len(self._cached), len(context), PREFILL_CHUNK):
            tokens = tuple(context[start : start + PREFILL_CHUNK])
            kind = RunKind.PREFILL if len(tokens) > LARGEST_TILE else RunKind.CANONICAL
            positions = tuple(range(start, start + len(tokens)))
            unread = len(tokens) - (start + len(tokens) == len(context))
            rows = self._compute(kind, tokens, positions, (_EVERYONE,) * len(tokens), unread)
            self._cached.extend(tokens)
            for logits in rows:
                self._ranked[()] = self._rank(logits, context)

    def candidates_after(self, context: Context, path: Path) -> Sequence[Candidate]:
        """The model's candidates after ``context + path``; the first call of a level computes the whole level."""
        if path not in self._ranked:
            self._compute_level(self._level(path), context)
        return self._ranked.get(path, [])

    def trace(
        self, tokens: Sequence[int], sampling: Sampling, abandoned: Callable[[], bool] = never
    ) -> list[tuple[Candidate, ...]] | None:
        """As the base's, in one pass over ``tokens``."""
        if len(tokens) > self._max_context:
            raise BadInputError(f"model drafter: a text of {len(tokens)} tokens exceeds max_context")
        self.start(tokens, sampling)
        self._abandoned = abandoned
        found: list[tuple[Candidate, ...]] = []
        for start in range(0, len(tokens) - 1, PREFILL_CHUNK):
            chunk = tuple(tokens[start : min(start + PREFILL_CHUNK, len(tokens) - 1)])
            positions = tuple(range(start, start + len(chunk)))
            try:
                rows = self._compute(RunKind.PREFILL, chunk, positions, (_EVERYONE,) * len(chunk), 0)
            except Abandoned:
                return None
            self._cached.extend(chunk)
            ranked = (self._rank(row, Context(self.text, at + 1)) for row, at in zip(rows, positions, strict=True))
            found += map(tuple, ranked)
        return found

    def _settle(self, context: Context) -> None:
        """Keeps the cells that ``context`` shares with what is computed; frees the others."""
        known = min(self._agreed, self._request.frontier, len(self._cached))
        pairs = enumerate(zip(self._cached[known:], context[known:], strict=False), known)
        base = next((at for at, (kept, token) in pairs if kept != token), min(len(self._cached), len(context)))
        path: Path = ()
        if base == len(self._cached):
            while base + len(path) < len(context) and (*path, context[base + len(path)]) in self._nodes:
                path = (*path, context[base + len(path)])
        ranked = self._ranked.get(path) if base == len(self._cached) else None
        if path:
            sequence = self._nodes[path]
            self._operations.append(SequenceRemove(_EVERYONE & ~(1 << sequence), base, END))
            self._operations.append(SequenceCopy(sequence, _EVERYONE, base, base + len(path)))
            self._operations.append(SequenceRemove(_EVERYONE, base + len(path), END))
        else:
            self._operations.append(SequenceRemove(_EVERYONE, base, END))
        del self._cached[base:]
        self._cached.extend(path)
        self._agreed = min(len(self._cached), self._request.frontier)
        self._nodes, self._ranked = {}, {}
        if len(self._cached) == len(context):
            if not ranked:  # its last row must be computed again, to know what follows it
                self._operations.append(SequenceRemove(_EVERYONE, len(context) - 1, END))
                self._cached.pop()
            else:
                self._ranked[()] = ranked

    def _level(self, path: Path) -> list[Path]:
        """The branches that grow at ``path``'s depth, as ``grow_tree`` will ask for them one by one.

        Every branch above continues before any of them forks. A tip too many costs a row; one too few costs a batch.
        """
        above = [(parent, ranked) for parent, ranked in self._ranked.items() if ranked and len(parent) + 1 == len(path)]
        going = [(parent, ranked) for parent, ranked in above if ranked[0][1] >= self._request.cutoff]
        tips = [path, *((*parent, ranked[0][0]) for parent, ranked in going)]
        for parent, ranked in going:
            tips += [(*parent, token) for token, confidence in ranked[1:] if confidence > self._request.split]
        unknown = [tip for tip in dict.fromkeys(tips) if tip not in self._ranked]
        return unknown[: min(max(1, self._request.branches), _NODES - len(self._nodes))]

    def _compute_level(self, paths: list[Path], context: Context) -> None:
        base = len(context)
        if not paths or base + len(paths[0]) > self._max_context:
            return
        for path in paths:
            self._nodes[path] = len(self._nodes) + 1
            if len(path) > 1:
                parent = self._nodes[path[:-1]]
                self._operations.append(SequenceCopy(parent, 1 << self._nodes[path], base, base + len(path) - 1))
        rows = self._compute(
            RunKind.SPECULATIVE,
            tuple(path[-1] for path in paths),
            tuple(base + len(path) - 1 for path in paths),
            tuple(1 << self._nodes[path] for path in paths),
            0,
        )
        for path, logits in zip(paths, rows, strict=True):
            self._ranked[path] = self._rank(logits, context.then(path))

    def _compute(
        self, kind: RunKind, tokens: Path, positions: Path, sequences: Path, first_output_row: int
    ) -> npt.NDArray[np.float32]:
        run = Run(self._runs, 0, kind, tokens, positions, sequences, first_output_row, tuple(self._operations))
        self._runs += 1
        self._operations = []
        assert self._session is not None, "start comes first"
        logits = self._model.logits(self._session, run, None, self._model.admit(self._session, run), self._abandoned)
        if logits is None:
            # The admitted cells hold nothing: free them, and whatever tree stood below the cached text.
            self._operations = [SequenceRemove(_EVERYONE, len(self._cached), END)]
            self._nodes, self._ranked = {}, {}
            raise Abandoned
        return logits[:, : self._vocabulary].numpy()

    def _rank(self, logits: npt.NDArray[np.float32], text: Context) -> list[Candidate]:
        """The ``WIDTH`` best candidates for what follows ``text``; equals rank by token id."""
        history = np.array(text[:]) if self.sampling.needs_history else ()
        scores = self.sampling.scores(logits, len(text), history)
        width = min(WIDTH, len(scores))
        best = np.sort(np.argpartition(-scores, width - 1)[:width])
        best = best[np.argsort(-scores[best], kind="stable")]
        shares = softmax(logits)
        return [(int(token), float(shares[token])) for token in best if np.isfinite(scores[token])]
