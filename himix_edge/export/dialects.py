"""What a graph may consist of, by the family of runtimes it is for."""

from __future__ import annotations

import onnx_ir

from himix_edge.errors import ExportError

PORTABLE_OPSET = 18
NATIVE_OPSET = 24
ORT_OPSET = 23  # the first with RMSNormalization
ORT_DOMAIN = "com.microsoft"  # of ONNX Runtime's own operators

# What the parser of TensorRT 10.1 imports, and that of every later one.
# https://github.com/onnx/onnx-tensorrt/blob/10.1-GA/docs/operators.md
PORTABLE_OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh
    CumSum DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand
    EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization GRU
    HardSigmoid HardSwish Hardmax Identity If ImageScaler InstanceNormalization IsInf IsNaN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LRN LSTM LpNormalization
    LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg
    NonMaxSuppression NonZero Not OneHot Or Pad ParametricSoftplus Pow PRelu QuantizeLinear
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize ReverseSequence RNN RoiAlign Round ScaledTanh Scan
    Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
    Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Upsample Where Xor
""".split()  # noqa: SIM905 - a column of 150 strings reads worse
)


# What ONNX has had for language models since opset 23, and 24.
NATIVE_OPERATORS = frozenset(("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"))

# ONNX Runtime's own, all of which it has on a CPU, and those of ONNX's that it runs well there.
ORT_OPERATORS = frozenset(
    (
        "Attention",
        "RMSNormalization",
        f"{ORT_DOMAIN}::GroupQueryAttention",
        f"{ORT_DOMAIN}::MultiHeadAttention",
        f"{ORT_DOMAIN}::QuickGelu",
    )
)

_EXPECTED = {
    "portable": "those that TensorRT 10.1 imports",
    "native": "those, and ONNX's for language models",
    "ort": "those, and ONNX Runtime's for language models",
}


def require_portable(graph: onnx_ir.Model) -> None:
    """Checks that a graph keeps to the portable dialect.

    Raises:
        ExportError: another opset, or operators that the dialect lacks: all of them.
    """
    _require(graph, "portable", PORTABLE_OPSET, PORTABLE_OPERATORS)


def require_native(graph: onnx_ir.Model) -> None:
    """Checks that a graph keeps to the native dialect.

    Raises:
        ExportError: another opset, or operators that the dialect lacks: all of them.
    """
    _require(graph, "native", NATIVE_OPSET, PORTABLE_OPERATORS | NATIVE_OPERATORS)


def require_ort(graph: onnx_ir.Model) -> None:
    """Checks that a graph keeps to the ort dialect.

    Raises:
        ExportError: another opset, or operators that the dialect lacks: all of them.
    """
    _require(graph, "ort", ORT_OPSET, PORTABLE_OPERATORS | ORT_OPERATORS)


def _require(graph: onnx_ir.Model, dialect: str, opset: int, operators: frozenset[str]) -> None:
    found = graph.opset_imports.get("")
    if found != opset:
        raise ExportError(
            f"the graph has another opset than the {dialect} dialect",
            expected=str(opset),
            found=str(found),
        )
    used = {f"{node.domain}::{node.op_type}".removeprefix("::") for node in graph.graph.all_nodes()}
    used |= {"::".join(identifier[:2]) for identifier in graph.functions}
    if foreign := sorted(used - operators):
        raise ExportError(
            f"the graph has operators that the {dialect} dialect lacks",
            expected=_EXPECTED[dialect],
            found=", ".join(foreign),
            fix="write that part of the model in plainer operations",
        )
