"""The other side of ``beside_llama_cpp.py``: runs in an interpreter that has llama_cpp, and needs nothing else.

Called with a GGUF file. Each line of input, ``rows N`` or ``generate N TOKEN ..``, is answered by one line: CPU ms.
"""

import sys
import time

import llama_cpp as api  # type: ignore[import-not-found, unused-ignore]

CONTEXT = 256


class Model:
    """A model and one context, both on one thread."""

    def __init__(self, path: str) -> None:
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(path.encode(), parameters)
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 1024
        settings.n_threads = settings.n_threads_batch = 1
        self._context = api.llama_init_from_model(self._model, settings)
        self._batch = api.llama_batch_init(1024, 0, 1)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def decode(self, tokens: list[int], start: int, all_logits: bool) -> None:
        """Computes ``tokens`` from position ``start`` on; logits of all of them or of the last one."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row] = token, start + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = all_logits or row == len(tokens) - 1
        if api.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")

    def forget(self, start: int) -> None:
        """Frees the cells from position ``start`` on."""
        api.llama_memory_seq_rm(api.llama_get_memory(self._context), 0, start, -1)

    def rows(self, count: int) -> float:
        """CPU ms of one forward pass of ``count`` rows after 256 cells."""
        began = time.process_time()
        self.decode(list(range(count)), CONTEXT, all_logits=True)
        spent = time.process_time() - began
        self.forget(CONTEXT)
        return 1e3 * spent

    def generate(self, count: int, prompt: list[int]) -> float:
        """CPU ms of a greedy generation, its prompt included."""
        self.forget(0)
        began = time.process_time()
        text, at = list(prompt), 0
        for _ in range(count):
            self.decode(text[at:], at, all_logits=False)
            at = len(text)
            logits = api.llama_get_logits_ith(self._context, -1)
            text.append(_argmax(logits, self._vocabulary))
        spent = time.process_time() - began
        self.forget(0)
        self.decode(list(range(CONTEXT)), 0, all_logits=False)
        return 1e3 * spent


def _argmax(logits, count: int) -> int:  # type: ignore[no-untyped-def]
    import numpy as np  # llama_cpp depends on it

    return int(np.ctypeslib.as_array(logits, (count,)).argmax())


def main() -> None:
    """Answers until the input ends."""
    model = Model(sys.argv[1])
    model.decode(list(range(CONTEXT)), 0, all_logits=False)
    print(api.__version__, flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        values = list(map(int, numbers))
        print(model.rows(values[0]) if what == "rows" else model.generate(values[0], values[1:]), flush=True)


if __name__ == "__main__":
    main()
