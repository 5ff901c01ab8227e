"""A node as the drafter: a newer request, or text that contradicts it, makes it drop the older one between levels."""

import asyncio
import logging
import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from backends.compute import ComputeLoop
from backends.control import (
    TO_DRAFTER,
    ConfigureDrafter,
    DraftOrder,
    DraftReply,
    EndText,
    ExtendText,
    FromDrafter,
    Planted,
    Ready,
    StartText,
    ToDrafter,
    TraceReply,
    TraceText,
    pack,
    unpack,
)
from backends.drafting.base import Drafter
from backends.drafting.ngram import NgramDrafter
from backends.drafting.planted import Draw, PlantedDrafter
from backends.lease import Lease
from backends.logs import event, name_node
from pipesim.errors import InvariantError
from pipesim.scheduling.commands import RequestDraft

if TYPE_CHECKING:
    from backends.pacing import DrafterPace

_log = logging.getLogger(__name__)


class DrafterLease(Lease):
    """The drafter of one head. What arrives on the draft stream is carried out in order; each session has its text."""

    def __init__(self, order: ConfigureDrafter, compute: ComputeLoop) -> None:
        super().__init__(order.token, compute)
        name_node("drafter")
        self._replies: asyncio.Queue[FromDrafter | None] = asyncio.Queue()
        self._received = 0
        self._latest: dict[int, int] = {}  # session -> its newest message that makes the orders before it pointless
        self._heard: dict[int, array[int]] = {}  # session -> its text, ahead of the drafter's while that is at work
        self._order = order
        self._loaded: Drafter | None = None
        self._texts: dict[int, Drafter] = {}
        self._paces: dict[int, DrafterPace] = {}  # by session
        compute.submit(self._load, self.fail)

    def _load(self) -> None:
        start = time.monotonic()
        if self._order.drafter == "planted":  # it needs to know the text first
            import pipesim.simulation.acceptance  # noqa: F401  # takes long: later, it would look like a hang
        else:
            self._loaded = load_drafter(self._order)
        event(_log, logging.INFO, "loaded", drafter=self._order.drafter, seconds=round(time.monotonic() - start, 3))
        self.tell(Ready())

    def receive(self, data: bytes) -> None:
        """Takes one message of the draft stream. Raises FrameError for anything else."""
        message = unpack(TO_DRAFTER, data)
        self._received += 1
        if isinstance(message, ExtendText):
            self._heard.setdefault(message.session, array("i")).extend(message.tokens)
        else:
            self._latest[message.session] = self._received
        number = self._received
        if isinstance(message, StartText):
            self._heard[message.session] = array("i", message.prompt)
            self._new_pace(message)
        pace = self._paces.get(message.session)
        if isinstance(message, DraftOrder) and message.hop and pace:
            order = pace.order(message.hop)
            self.compute.submit(lambda: self._keep_pace(message, pace, order), self.fail)
        else:
            self.compute.submit(lambda: self._carry_out(message, number), self.fail)

    def _new_pace(self, message: StartText) -> None:
        if message.origin is not None and self._order.emulated is not None:
            from backends.emulation import EmulatedDrafter, from_bytes
            from backends.pacing import DrafterPace

            part = from_bytes(EmulatedDrafter, self._order.emulated)
            self._paces[message.session] = DrafterPace(part, len(message.prompt), message.origin)

    async def answer(self, context: Any) -> None:
        """Sends the replies, until :meth:`hang_up`."""
        while (reply := await self._replies.get()) is not None:
            await context.write(pack(reply))

    def hang_up(self) -> None:
        """The draft stream is over."""
        self._replies.put_nowait(None)

    def _carry_out(self, message: ToDrafter, number: int) -> None:
        if self.closed or self.failed:
            return
        match message:
            case StartText(session, prompt, sampling, planted):
                self._begin(session, sampling.seed, planted).start(prompt, sampling)
            case ExtendText(session, tokens):
                self._text(session).extend(tokens)
            case DraftOrder(session, request):
                self._replies.put_nowait(self._draft(session, request, number))
            case EndText(session):
                self._end(session)
            case TraceText():
                self._trace(message, number)

    def _begin(self, session: int, seed: int, planted: Planted | None) -> Drafter:
        """The drafter of a new text, or of one that begins anew."""
        if planted:
            self._texts[session] = plant(planted, seed, self._order.vocabulary)
        elif session not in self._texts:
            if self._loaded is None:
                raise InvariantError(f"the drafter {self._order.drafter} got a text without what it shall replay")
            self._texts[session] = self._loaded.another()
        return self._texts[session]

    def _text(self, session: int) -> Drafter:
        if session not in self._texts:
            raise InvariantError(f"the drafter {self._order.drafter} got work for session {session}, which has no text")
        return self._texts[session]

    def _end(self, session: int) -> None:
        if session in self._texts:
            self._texts.pop(session).end()
        self._latest.pop(session, None)
        self._heard.pop(session, None)
        self._paces.pop(session, None)

    def _trace(self, message: TraceText, number: int) -> None:
        def abandoned() -> bool:
            return self._abandoned(message.session, number)

        drafter = self._begin(message.session, message.sampling.seed, message.planted)
        candidates = drafter.trace(message.tokens, message.sampling, abandoned)
        detours = drafter.detours(message.tokens, abandoned)
        if candidates is not None and not abandoned():
            reply = TraceReply(message.session, tuple(candidates), None if detours is None else tuple(detours))
            self._replies.put_nowait(reply)
        self._end(message.session)

    def _abandoned(self, session: int, number: int) -> bool:
        """Whether message ``number`` was overtaken by another one of its session; shows a sign of life."""
        self.compute.checkpoint()
        return self.closed or self._latest.get(session, number) > number

    def _draft(self, session: int, request: RequestDraft, number: int) -> DraftReply:
        def abandoned() -> bool:
            return self._abandoned(session, number)

        def news() -> Sequence[int]:
            return self._heard.get(session, array("i"))[request.frontier :]

        start = time.monotonic()
        tree = None if abandoned() else self._text(session).draft(request, abandoned, news)
        end = time.monotonic()
        event(
            *(_log, logging.DEBUG, "abandoned" if tree is None else "drafted"),
            session=session,
            draft=request.request_id,
            tokens=0 if tree is None else len(tree.tokens),
            ms=1e3 * (end - start),
        )
        return DraftReply(session, request.request_id, tree, start, end)

    def _keep_pace(self, order: DraftOrder, pace: "DrafterPace", number: int) -> None:
        """Drafts as the drafter of an emulated cluster: overtaken when that would be."""
        if self.closed or self.failed:
            return
        self.compute.checkpoint()
        request, drafter = order.request, self._text(order.session)
        levels, tree = 1, None
        if begun := pace.begin(number, request.frontier + len(request.path)):
            tree = drafter.draft(request, lambda: self.closed or pace.is_overtaken(number, levels))
            levels = drafter.levels if tree else request.max_nodes
        nodes = len(tree.tokens) if tree else 0
        start, end, abandoned, hops = pace.leave(number, begun, levels, nodes, self.compute.pause, lambda: self.closed)
        reply = DraftReply(order.session, request.request_id, None if abandoned else tree, start, end, hops)
        self._replies.put_nowait(reply)


def load_drafter(order: ConfigureDrafter) -> Drafter:
    """The drafter that a head asks for, without text. Only drafters that are models need PyTorch.

    Raises:
        BadInputError: there is no such model, or it does not fit the target.
    """
    if order.drafter == "ngram":
        return NgramDrafter()
    import torch

    from backends.drafting.layer_skip import LayerSkipDrafter
    from backends.drafting.model import ModelDrafter
    from backends.models.devices import DTYPES, open_device
    from backends.models.loading import open_model
    from backends.models.stage_model import StageModel

    device, dtype = open_device(order.device, order.dtype), DTYPES[order.dtype]
    source = open_model(order.model if order.drafter == "layer-skip" else order.drafter)
    if order.drafter == "layer-skip":
        return LayerSkipDrafter(
            source, order.max_context, order.skip_layers, dtype, order.threads, device, order.kernels
        )
    config = source.config
    max_context = min(order.max_context, config.max_context)
    if isinstance(dtype, str) and source.blocks("model.layers.0.mlp.down_proj.weight") is None:
        dtype = torch.bfloat16  # it is the target's text that must be exact, not the draft
    model = StageModel(source, 0, config.layers, dtype, order.threads, device=device, kernels=order.kernels)
    return ModelDrafter(model, max_context, order.vocabulary)


def plant(planted: Planted, seed: int, vocabulary: int) -> PlantedDrafter:
    """A drafter that is right and wrong at the very positions at which the simulation's is, given the same seed."""
    return PlantedDrafter(planted.known_text, vocabulary, _simulated_draw(planted.acceptance, seed, vocabulary))


def _simulated_draw(acceptance: dict[str, float | str], seed: int, vocabulary: int) -> Draw:
    from pydantic import TypeAdapter  # only this drafter needs the scenario schema

    from pipesim.scenario import PositionalAcceptance
    from pipesim.simulation.acceptance import DrawnTruth

    settings = TypeAdapter[PositionalAcceptance](PositionalAcceptance).validate_python(acceptance)
    truth = DrawnTruth(settings, seed, 0, vocabulary)

    def draw(position: int) -> list[tuple[bool, float]]:
        right = truth.next(position, 0)
        return [(token == right, confidence) for token, confidence in truth.candidates(position, 0, depth=1)]

    return draw
