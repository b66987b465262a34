"""libllama, llama.cpp's library, by ctypes: an oracle for GGUF files and a peer in decoding.
`python tests/peers.py` fetches it ready-made for Linux.

    llama = LlamaCpp(FOLDER)                     # of libllama.so and its backends
    model = llama.load("model.gguf")
    model.tokenize("hello"), model.logits(ids)   # of the last token
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from configurator import ROOT

FOLDER = ROOT / "data" / "cache" / "llama_cpp" / "package" / "bins" / "linux-x64"  # where tests/peers.py puts it
Opaque = ctypes.c_byte * 1024  # structures of parameters, passed in memory: a longer tail does no harm


class Params(ctypes.Structure):
    _fields_ = [("n_ctx", ctypes.c_uint32), ("rest", Opaque)]


class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6)]


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def quiet(*_) -> None:
    """Its log: one function for all who load the library, which calls the last that it was given."""


class LlamaCpp:
    def __init__(self, folder: Path):
        for name in ("libggml-base", "libggml", "libllama"):
            (path,) = [p for p in folder.glob(f"{name}.*") if ".so" in p.name and "-common" not in p.name]
            self.lib = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            if name == "libggml":
                self.lib.ggml_backend_load_all_from_path(str(folder).encode())
        self.lib.llama_log_set(quiet, None)
        for name, result, arguments in (
            ("llama_model_default_params", Params, []), ("llama_context_default_params", Params, []),
            ("llama_model_load_from_file", ctypes.c_void_p, [ctypes.c_char_p, Params]),
            ("llama_init_from_model", ctypes.c_void_p, [ctypes.c_void_p, Params]),
            ("llama_model_get_vocab", ctypes.c_void_p, [ctypes.c_void_p]),
            ("llama_vocab_n_tokens", ctypes.c_int32, [ctypes.c_void_p]),
            ("llama_tokenize", ctypes.c_int32, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p,
                                                ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]),
            ("llama_batch_get_one", Batch, [ctypes.c_void_p, ctypes.c_int32]),
            ("llama_decode", ctypes.c_int32, [ctypes.c_void_p, Batch]),
            ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
            ("llama_set_n_threads", None, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
            ("llama_free", None, [ctypes.c_void_p]), ("llama_model_free", None, [ctypes.c_void_p]),
        ):
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments

    def load(self, path: Path, n_ctx: int = 512) -> "Model":
        return Model(self, path, n_ctx)


class Model:
    def __init__(self, llama: LlamaCpp, path: Path, n_ctx: int):
        self.lib = lib = llama.lib
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx
        self.params, self.vocab = params, lib.llama_model_get_vocab(self.model)
        self.size = lib.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8
        out = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), out, room, False, special)
        assert count >= 0
        return list(out[:count])

    @contextmanager
    def reader(self, threads: int = 1) -> Iterator[Callable[[list[int]], np.ndarray]]:
        """A function that reads the next ids of a new text and gives the logits (V,) after the last of them, which the
        next call overwrites."""
        context = self.lib.llama_init_from_model(self.model, self.params)
        assert context
        self.lib.llama_set_n_threads(context, threads, threads)

        def read(ids: list[int]) -> np.ndarray:
            tokens = (ctypes.c_int32 * len(ids))(*ids)
            assert self.lib.llama_decode(context, self.lib.llama_batch_get_one(tokens, len(ids))) == 0
            return np.ctypeslib.as_array(self.lib.llama_get_logits(context), (self.size,))

        yield read
        self.lib.llama_free(context)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of the last token, after all of them at once, by one thread."""
        with self.reader() as read:
            return read(ids).copy()
