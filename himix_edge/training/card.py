"""The model card of a model of the shapes world."""

from __future__ import annotations

from collections.abc import Mapping

from himix_edge.config import HiMixConfig
from himix_edge.shapes.benchmark import NOTICE
from himix_edge.training.log import LogLine
from himix_edge.training.loop import Phase
from himix_edge.training.recipe import Recipe

COLUMNS = (
    "phase",
    "what is trained",
    "steps",
    "scenes a step",
    "questions a scene",
    "learning rate",
    "minutes",
    "right at the end",
)
WHAT = {
    "encoder": "vision encoder, from dense labels: for each patch the shape, colour, size, place "
    "and ranks of the object that covers it",
    "language": "decoder, answering from a perfect eye's symbols in the image's place in the "
    "cache; no pictures",
    "projections": "the paper's stage 1: the image's way into the decoder alone",
    "finetune": "the paper's stage 2: that and the decoder, encoder frozen",
    "practice": "more of stage 2, on what it left hard",
}


def model_card(
    recipe: Recipe, seed: int, log: Mapping[str, LogLine], accuracy: str, scenes: int
) -> str:
    """The card as Markdown.

    Args:
        log: the last line of each phase.
        accuracy: the table, measured through the exported bundle.
        scenes: how many held-out scenes it was measured on.
    """
    phases = "\n".join(_phase_row(phase, log[phase.task]) for phase in recipe.phases)
    return f"""\
# {recipe.config.design}-{recipe.name}-demo

A demo model of himix-edge. {NOTICE}

{_architecture(recipe.config)}

## Data

Scenes are drawn as training goes, from seed {seed}; no scene is seen twice, none of them is held
out for the test. The world is described in `docs/shapes.md`.

## Training

{_beginning(recipe)} AdamW, no weight decay, 3 % warm-up, cosine decay, as in the paper's
table 7. The command that does it again:

    himix-edge train --recipe {recipe.name} --design {recipe.config.design} --seed {seed}

| {" | ".join(COLUMNS)} |
| {" | ".join(["---"] * len(COLUMNS))} |
{phases}

## Accuracy

On {scenes} held-out scenes, greedy, through the exported bundle in ONNX Runtime. "describe" counts
as right only if the size, colour and shape of every object is named and nothing else; every other
answer must be the right sentence word for word. "chance" is the better of guessing and of always
giving the commonest answer.

{accuracy}

## Limits

No text, no photographs, no overlapping objects, no other shapes or colours, English only.

## Licence

Apache-2.0, like the project; trained on data that the project draws itself.
"""


def _beginning(recipe: Recipe) -> str:
    if recipe.encoder:
        return f"The encoder is that of `{recipe.encoder.name}`, frozen; all else begins at random."
    return """\
Nothing was pretrained elsewhere: the first two phases stand in for a pretrained encoder and a
pretrained language model."""


def _architecture(config: HiMixConfig) -> str:
    vision, decoder = config.vision, config.decoder
    return (
        f"Encoder: CLIP-type ViT, {vision.image_size} px in patches of {vision.patch_size}, "
        f"{vision.num_image_tokens} image tokens, {vision.num_hidden_layers} layers of "
        f"{vision.hidden_size}. Decoder: Llama-type, {decoder.num_hidden_layers} layers of "
        f"{decoder.hidden_size}, {decoder.num_attention_heads} heads over "
        f"{decoder.num_key_value_heads} of keys and values, vocabulary {decoder.vocab_size}. "
        f"Design: {config.design}."
    )


def _phase_row(phase: Phase, line: LogLine) -> str:
    right = ", ".join(f"{kind} {share:.0%}" for kind, share in line.right.items())
    numbers = (phase.steps, phase.scenes, len(phase.asked) or "-", f"{phase.learning_rate:g}")
    cells = (phase.task, WHAT[phase.task], *numbers, f"{line.seconds / 60:.0f}", right)
    return f"| {' | '.join(str(cell) for cell in cells)} |"
