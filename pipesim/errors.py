"""The project's exceptions. Every message names the field or part, the value, and what to do."""


class PipesimError(Exception):
    """Base of all errors that pipesim raises on purpose; the command line exits with status 1."""


class BadInputError(PipesimError):
    """The user gave something that cannot work; the command line exits with status 2."""


class InvariantError(PipesimError):
    """The scheduler's world broke one of its own rules: a defect in pipesim or in a stage, never bad input."""


class KvCapacityError(PipesimError):
    """More KV cells were asked for than the table has left."""


class StageFailedError(PipesimError):
    """A stage, or the drafter, died, hung or answered nonsense during a generation."""
