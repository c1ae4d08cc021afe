"""The forms of an encoder that a peer's tools make of its fp32 ONNX file.

    python make_encoders.py onnxruntime FILE FOLDER    int8.onnx: dynamic, weights per channel
    python make_encoders.py openvino FILE FOLDER       int8-weights.xml, int8-static.xml

Each runs in the environment of the peer whose tools it uses.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

CALIBRATION_IMAGES = 8


def by_onnxruntime(source: Path, folder: Path) -> None:
    """MatMulInteger for every product with a weight, activations quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = folder / "prepared.onnx"
    large = {"save_as_external_data": True, "all_tensors_to_one_file": True}
    quant_pre_process(
        str(source),
        str(prepared),
        skip_symbolic_shape=True,
        external_data_location="prepared.onnx.data",
        **large,
    )
    quantize_dynamic(
        str(prepared),
        str(folder / "int8.onnx"),
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )
    for left in folder.glob("prepared.onnx*"):
        left.unlink()


def by_openvino(source: Path, folder: Path) -> None:
    """Weights alone (the CPU plugin then quantizes activations as they come); weights and both."""
    import nncf
    import openvino as ov

    weights = nncf.compress_weights(
        ov.convert_model(source), mode=nncf.CompressWeightsMode.INT8_SYM
    )
    ov.save_model(weights, folder / "int8-weights.xml", compress_to_fp16=False)
    model = ov.convert_model(source)
    shape, draw = tuple(model.inputs[0].shape), np.random.default_rng(0)
    images = [draw.standard_normal(shape, np.float32) for _ in range(CALIBRATION_IMAGES)]
    static = nncf.quantize(
        model,
        nncf.Dataset(images),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CALIBRATION_IMAGES,
    )
    ov.save_model(static, folder / "int8-static.xml", compress_to_fp16=False)


if __name__ == "__main__":
    make = {"onnxruntime": by_onnxruntime, "openvino": by_openvino}[sys.argv[1]]
    make(*map(Path, sys.argv[2:4]))
