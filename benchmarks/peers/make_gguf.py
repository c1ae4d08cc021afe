"""llama.cpp's files of a Hugging Face folder: F16, and Q4_0 and Q8_0 made of it.

    python make_gguf.py HF_FOLDER FOLDER

Runs in llama.cpp's environment. The file has no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from safetensors import safe_open

QUANTIZED = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}
THREADS = 2


def write_f16(source: Path, file: Path) -> None:
    """Matrices in F16, norms and biases in F32."""
    config = json.loads((source / "config.json").read_text())
    layers = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    with safe_open(source / "model.safetensors", "np") as weights:
        for name in weights.keys():  # noqa: SIM118 - no dictionary
            array = weights.get_tensor(name)
            stored = array.astype(np.float32 if array.ndim == 1 else np.float16)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """All three."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    whole = folder / "f16.gguf"
    write_f16(source, whole)
    for name, kind in QUANTIZED.items():
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype, how.nthread = kind, THREADS
        to = folder / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(to).encode(), how):
            raise RuntimeError(f"llama.cpp could not write {to}")


if __name__ == "__main__":
    main()
