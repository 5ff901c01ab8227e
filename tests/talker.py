"""A tiny model that the command line can talk to."""

from backends.models.random_models import save_talker

__all__ = ["save_talker"]
