"""pipesim: speculative LLM inference over pipelines of machines, decided once, simulated and executed."""

__version__ = "0.1.0"
