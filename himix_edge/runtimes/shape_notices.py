"""What to say of a picture whose shape or size a model sees little of."""

from __future__ import annotations

from himix_edge.config import ResizeMode

FAR_FROM_SQUARE = 3.0  # longer edge to shorter; films have up to 2.4, and panoramas more
TINY_EDGE = 16  # pixels


def shape_notices(width: int, height: int, resize: ResizeMode, size: int) -> tuple[str, ...]:
    """A sentence for each thing about it that makes answers doubtful; of most pictures, none.

    Args:
        width, height: the picture's, upright.
        resize: how it becomes the model's `size` x `size`.
    """
    picture, notices = f"this {width} x {height} picture", []
    if min(width, height) < TINY_EDGE:
        notices.append(
            f"{picture} has fewer than {TINY_EDGE} pixels along an edge: of the model's "
            f"{size} x {size} most are made up in between"
        )
    ratio = max(width, height) / min(width, height)
    if ratio < FAR_FROM_SQUARE:
        return tuple(notices)
    if resize == "crop":
        notices.append(
            f"crop keeps the middle {_percent(1 / ratio)} of {picture}; "
            "run --resize pad shows all of it"
        )
    elif resize == "squash":
        edges = ("width", "height") if width > height else ("height", "width")
        notices.append(
            f"squash shrinks the {edges[0]} of {picture} {ratio:,.0f} times as much as its "
            f"{edges[1]}; run --resize pad keeps its shape, and --resize crop that of its middle"
        )
    else:
        notices.append(
            f"pad gives {picture} {_percent(1 / ratio)} of what the model sees, and the rest to "
            "the margin; run --resize crop shows its middle larger"
        )
    return tuple(notices)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.2g} %"
