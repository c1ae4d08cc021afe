"""How close is close: the one table of tolerances, all absolute, in fp32 unless said otherwise."""

MODEL_LOGITS = 2e-5  # our decoder against transformers', random weights
ATTENTION = 1e-6  # mixture attention against the loop over equations 5 and 6
CACHED_DECODE = 2e-5  # token by token over a cache against one full forward pass
HALF_PRECISION_NORM = 1e-2  # RMSNorm in fp16 or bf16, of values of order 1, against the formula
VISION_FEATURES = 1e-5  # our encoder's X_v against transformers' hidden states
REFERENCE_LOGITS = 2e-5  # the whole model against Algorithm 1 in float64
IMAGE_KV = 5e-6  # what an image leaves in the cache against its formula in float64
PIXEL_VALUES = 1e-6  # our preprocessing against transformers' processors
REDUCED_PIXELS = 0.05  # a picture decoded, cut or padded smaller, against the whole of it
ENGINE_LOGITS = 2e-5  # an engine's logits against the model's, random weights
PROBABILITIES = 1e-6  # our sampling distribution (float64) against transformers' (float32)
GRAPH_LOGITS = 2e-5  # an exported decoder graph's logits, keys and values against torch
STACKED_PROJECTIONS = 1e-6  # one wide product against a product for each layer
SHAPE_AREA = 0.06  # a drawn shape's area, in squared radii, against geometry: the outline's pixels
HALF_GRAPH = 2e-2  # a float16 graph against torch in fp32, over the tensor's largest value
BFLOAT16_CONSTANTS = 1e-2  # a widened bfloat16 encoder, whose constants are rounded too
ROUNDING_STEPS = 1e-3  # quantized weights against the formula, in steps of their block
DEQUANTIZED_WEIGHTS = 1e-6  # as the kernels read them, over the largest of their column
INT8_ACTIVATIONS = 0.04  # a quantized graph, whose kernels round inputs to int8, against fp32 ones
REWRITE = 1e-5  # a graph before and after a rewrite, in fp32
HALF_REWRITE = 2e-2  # the same in float16, values of order 1 to 5
HALF_PRODUCT = 1e-3  # a product of 128 terms in float16, over the largest of its results
HALF_KV_COSINE = 0.999  # keys and values of a float16 graph against torch in fp32, at least
LARGEST_MAGNITUDES = 2e-5  # what was seen within a model against its formulas in float64
DEQUANTIZED_GRAPH = (
    5e-3  # a float16 graph over codes against the same over weights, over the largest
)
INT8_KV_COSINE = 0.998  # keys and values over int8 weights, a tiny encoder of random ones
RUNNING_SUMS = 1e-9  # a fit from running sums in float64 against numpy's least squares: 5e-12
FIT_FIGURES = 1e-6  # a fit's figures in other batches, or interrupted: 1e-9
FIT_WEIGHTS = 1e-6  # fitted projections, in fp32, against ridge regression over all rows: 9e-8
JUDGED_KL = 2e-6  # KL of the next token (fp32 logits, float64 from there) against numpy
REPLAYED_KL = 1e-9  # of a student with the teacher's own cache: 2e-13
HALF_KL = 0.03  # of a bfloat16 teacher with random projections, against fp32: 0.007 of 0.94
REPLAY_LOGITS = 1e-4  # a teacher's own cache in a HiMix decoder, against transformers: 1e-5
DISTIL_LOSS = 1e-6  # a batch's loss against its definition in float64: 2e-8
REPLAYED_LOSS = 1e-6  # KL between a teacher and a student with its very cache, in nats: 2e-8
HALF_GRADIENTS = 0.05  # of projections, through a decoder in float16: 0.0025; in bfloat16: 0.021
UNDERFLOW = 2e-3  # of gradients of logits in float16; 0.05 where they are not scaled
