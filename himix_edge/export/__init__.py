"""From a checkpoint to a bundle: two ONNX graphs, verified against the model, and all they need.

ranges.py     how large the values within the model get; wide.py keeps in fp32 what fp16 can't hold
graphs.py     the two halves of the model as torch modules
onnx.py       torch modules -> ONNX graphs of the portable dialect
rewrites/     from there to the native dialect, and to ONNX Runtime's own operators
dialects.py   what a graph may consist of
chat.py       a Jinja chat template -> its pieces
expected.py   what the model in torch says
sessions.py   the graphs in ONNX Runtime
verify.py     the one against the other
bundle.py     all of it, in one folder; card.py writes what people read of it

recipes.py    which of two ways a bundle's weights are quantized:
              quantize.py and quantize_vision.py, in ONNX Runtime's operators: nbits.py in
              blocks, int8.py by output, smooth.py so that activations round well;
              weight_only.py, for TensorRT
quantized_bundle.py has it all, in one folder; cost.py says what it costs
"""
