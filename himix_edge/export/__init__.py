"""From a checkpoint to a bundle: two ONNX graphs, verified against the model, and all they need.

graphs.py     the two halves of the model as torch modules
onnx.py       torch modules -> ONNX graphs
dialects.py   what a graph may consist of
chat.py       a Jinja chat template -> its pieces
expected.py   what the model in torch says
sessions.py   the graphs in ONNX Runtime
verify.py     the one against the other
bundle.py     all of it, in one folder
quantize.py   a graph's weights in 4 or 8 bits; cost.py measures it, quantized_bundle.py has it all
"""
