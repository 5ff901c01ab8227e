"""Sends messages over links by themselves."""

from pipesim.simulation.links import LinkModel, Passage


def pass_over(link: LinkModel, now: int, size_bytes: int) -> Passage:
    """A message's passage, where it is known at once."""
    found: list[Passage] = []
    link.send(now, size_bytes, lambda passage, _: found.append(passage), None)
    return found[0]
