"""From a checkpoint to a bundle: two ONNX graphs, verified against the model, and all they need.

graphs.py     the two halves of the model as torch modules
onnx.py       torch modules -> ONNX graphs
dialects.py   what a graph may consist of
chat.py       a Jinja chat template -> its pieces
verify.py     the graphs in ONNX Runtime against the model in torch
bundle.py     all of it, in one folder
"""
