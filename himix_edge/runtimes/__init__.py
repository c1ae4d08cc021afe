"""The device's part: a bundle and an image in, text out. numpy, Pillow, tokenizers and one engine.

load_image, pixel_values   an image of any kind -> [1, 3, H, W]        preprocess.py
open_engine                where: CPU, CUDA, TensorRT                  devices.py, providers.py
Engine.encode              -> the image's keys and values              base.py, ort.py, trt.py
Engine.open, Engine.step   a cache that begins with them, and grows    kvcache.py
generate                   prefill, sample, decode                     generate.py, sampling.py
ChatTemplate, Tokenizer    a conversation -> token ids                 chat.py, tokenizer.py
Conversation               turn after turn on one cache                conversation.py
Model                      all of it, by name                          model.py
"""

from __future__ import annotations

from himix_edge.runtimes.conversation import Conversation, EncodedImage
from himix_edge.runtimes.generate import Answer
from himix_edge.runtimes.model import Model, load
from himix_edge.runtimes.sampling import SamplingOptions

__all__ = ["Answer", "Conversation", "EncodedImage", "Model", "SamplingOptions", "load"]
