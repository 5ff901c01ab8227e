"""A tiny model that the command line can talk to."""

from pathlib import Path

from pipelines import LAYERS, VOCABULARY
from tiny_models import save_tiny
from tokenizers import Tokenizer, models, pre_tokenizers


def save_talker(folder: Path) -> Path:
    """A random model of eight layers whose vocabulary are the words w0 .. w159; no text ends by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = save_tiny(folder, num_hidden_layers=LAYERS, eos_token_id=None)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
