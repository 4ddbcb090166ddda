"""Whole models by llama.cpp on a CPU, for `benchmarks.cpu_models`: random weights, decoding and reading a prompt.

    PYTHON -m benchmarks.peers.llama THREADS FOLDER

Serves (`benchmarks.peers.served`); what is given is {"config", "kinds", "context", "prompt", "steps"}. The weights of
one layer stand in all of them, since speed does not depend on numbers; embeddings and head are Q8_0 in all kinds, as
the head is int8 on the other side. Files stay in FOLDER.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.ggml import Ggml
from benchmarks.peers.served import serve


def write_model(path: Path, config: dict[str, int], kind: str, ggml: Ggml) -> None:
    """A GGUF file of a Llama with random weights of a kind, and no vocabulary."""
    import gguf

    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    keys, size, vocab = config["num_key_value_heads"], config["head_dim"], config["vocab_size"]
    writer = gguf.GGUFWriter(str(path.with_suffix(".half")), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)
    shapes = {
        "attn_q": (heads * size, width),
        "attn_k": (keys * size, width),
        "attn_v": (keys * size, width),
        "attn_output": (width, heads * size),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    types = {name: getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "Q4_0", "Q8_0")}

    def weight(shape: tuple[int, int], kind: str) -> np.ndarray:
        w = rng.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
        return w if kind == "F32" else ggml.quantized(w, kind).reshape(shape[0], -1)

    layer = {name: weight(shape, kind) for name, shape in shapes.items()}
    ends = weight((vocab, width), "Q8_0")
    ones = np.ones(width, np.float32)
    writer.add_tensor("token_embd.weight", ends, raw_dtype=types["Q8_0"])
    for n in range(config["num_hidden_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{n}.{name}.weight", ones)
        for name, w in layer.items():
            writer.add_tensor(f"blk.{n}.{name}.weight", w, raw_dtype=types[kind])
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", ends, raw_dtype=types["Q8_0"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".half").replace(path)


class Llama:
    """A model in memory.

    Args:
        path: a GGUF file. threads: of it. context: positions. extra: whether weights may be repacked for SIMD or AMX.
    """

    def __init__(self, path: Path, threads: int, context: int, extra: bool):
        import llama_cpp as api

        self.api = api
        given = api.llama_model_default_params()
        given.n_gpu_layers = 0
        given.use_extra_bufts = extra
        self.model = api.llama_model_load_from_file(str(path).encode(), given)
        how = api.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch = context, context, context
        how.n_threads = how.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, how)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp could not load {path}")

    def read(self, tokens: list[int]) -> None:
        """Read tokens behind those that were read."""
        many = (self.api.llama_token * len(tokens))(*tokens)
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(many, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def forget(self) -> None:
        """Begin anew."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def logits(self, vocab: int) -> np.ndarray:
        """Of the last token."""
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (vocab,)).copy()

    def free(self) -> None:
        """Give the memory back."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


def main() -> None:
    """Serve."""
    import llama_cpp

    threads, folder = int(sys.argv[1]), Path(sys.argv[2])
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    ggml = Ggml(threads)
    models: list[Llama] = []

    def prepare(given: dict[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, float], dict[str, str]]:
        while models:
            models.pop().free()
        cases: dict[str, Callable[[], Any]] = {}
        failed: dict[str, str] = {}
        vocab = given["config"]["vocab_size"]
        for kind in given["kinds"]:
            try:
                path = folder / f"{given['name']}-{kind}.gguf"
                if not path.is_file():
                    write_model(path, given["config"], kind, ggml)
                    ggml.release()
                model = Llama(path, threads, given["context"], given["extra"])
                models.append(model)
                for count in (given["prompt"], 1):  # of what is timed, so that a crash comes before it
                    model.forget()
                    model.read([n % vocab for n in range(count)])
                if not np.isfinite(model.logits(vocab)).all():
                    raise FloatingPointError("logits are not finite")
            except Exception as e:
                failed[f"llama.cpp {kind}"] = f"{type(e).__name__}: {e}"[:200]
                continue
            read = [0]

            def decode(model: Llama = model, read: list[int] = read) -> None:
                for _ in range(given["steps"]):
                    if read[0] == 0 or read[0] + 1 >= given["context"]:
                        model.forget()
                        read[0] = 0
                    model.read([1 + read[0] % 7])
                    read[0] += 1

            def prompt(model: Llama = model, read: list[int] = read) -> None:
                model.forget()
                read[0] = 0
                model.read([n % vocab for n in range(given["prompt"])])

            cases[f"llama.cpp {kind} decode"], cases[f"llama.cpp {kind} prompt"] = decode, prompt
        return cases, dict.fromkeys(cases, 0.0), failed

    serve(prepare, ["llama-cpp-python"])


if __name__ == "__main__":
    main()
