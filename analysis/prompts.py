"""Prompts for measuring what speculation by looking up the text so far is worth. Fixed before anything was tuned."""

from dataclasses import dataclass

_LIGHTHOUSE = (
    "The lighthouse at the end of the harbour was built in 1862, after three ships were lost in a single winter. Its "
    "lamp burned whale oil at first, then paraffin, and since 1934 it has run on electricity. Every evening the keeper "
    "climbed one hundred and twelve steps to light it, and every morning he climbed them again to put it out."
)
_MISSPELT = _LIGHTHOUSE.replace("harbour", "harbor").replace("electricity", "electrisity").replace("evening", "evning")
_SHAPE = """class Shape:
    def __init__(self, radius):
        self.radius = radius

    def area(self):
        return 3.14159 * self.radius * self.radius

    def perimeter(self):
        return 2 * 3.14159 * self.radius

    def scaled(self, factor):
        return Shape(self.radius * factor)"""
_RICE = """- Wash the rice until the water runs clear
- Bring the water to a boil with a pinch of salt
- Add the rice and stir it once
- Cover the pot and let it simmer for fifteen minutes
- Take the pot off the heat and let it rest"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to ask for. ``chat``: through the model's chat template. ``repeats``: the answer quotes the prompt."""

    name: str
    text: str
    repeats: bool
    chat: bool = True
    temperature: float = 0.0


PROMPTS = (
    Prompt(
        "correct the spelling",
        f"Correct the spelling mistakes in this text and give the whole text back.\n\n{_MISSPELT}",
        repeats=True,
    ),
    Prompt("copy and summarise", f"Copy this paragraph and then summarise it.\n\n{_LIGHTHOUSE}", repeats=True),
    Prompt("number a list", f"Give this list back with every item numbered.\n\n{_RICE}", repeats=True),
    Prompt(
        "rename a class",
        f"Before the review:\n\n```python\n{_SHAPE}\n```\n\n"
        "After the review, with the class renamed to Circle:\n\n```python\n",
        repeats=True,
        chat=False,
    ),
    # sampled, as stories are: greedy text of so small a model soon repeats itself
    Prompt("story", "Write a story about a fox who learns to play the violin.", repeats=False, temperature=0.8),
    Prompt("letter", "Write a letter to a friend about your first week at sea.", repeats=False, temperature=0.8),
)
