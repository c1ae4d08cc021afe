"""From ONNX graphs to engines of TensorRT, kept in the bundle under the key of what they fit."""
