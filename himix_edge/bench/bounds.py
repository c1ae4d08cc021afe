"""The floor of every phase at the best rates that the machine showed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from himix_edge.analysis.floors import (
    Phase,
    projection_floor,
    step_floor,
    stored_bytes,
    vision_floor,
)
from himix_edge.bench.candidates import DECODED, Candidate
from himix_edge.bench.limits import Limits
from himix_edge.bench.measure import Measurement

FloorAt = Callable[[float, float], Phase]  # operations a second, bytes a second


@dataclass(frozen=True)
class Floor:
    """Milliseconds at the least.

    Attributes:
        fp32, int8: with products in the one or the other.
        fp32_bound, int8_bound: what takes the longer then, "compute" or "memory"; or "both", of
            phases together that differ in it.
    """

    fp32: float
    int8: float
    fp32_bound: str
    int8_bound: str

    def __add__(self, other: Floor) -> Floor:
        same = self.fp32_bound == other.fp32_bound, self.int8_bound == other.int8_bound
        return Floor(
            self.fp32 + other.fp32,
            self.int8 + other.int8,
            self.fp32_bound if same[0] else "both",
            self.int8_bound if same[1] else "both",
        )


def floors(measured: Measurement, candidate: Candidate, limits: Limits) -> dict[str, Floor]:
    """By phase, for those that have one, and of all to the first token.

    Where the projections' time can't be told from the encoder's, their floor is in "vision".
    """
    config, stored = measured.manifest.config, stored_bytes(measured.manifest)
    images, plan = config.image_slots, measured.plan

    def at(floor: FloorAt) -> Floor:
        fp32, int8 = (floor(rate, limits.bandwidth) for rate in (limits.fp32, limits.int8))
        return Floor(1e3 * fp32.seconds, 1e3 * int8.seconds, fp32.bound, int8.bound)

    def step(tokens: int, slots: int) -> Floor:
        return at(lambda *rates: step_floor(config.decoder, stored, tokens, slots, *rates))

    slots, later = images + plan.text, DECODED // 2  # a decoded token's place, halfway
    found = {"vision": at(lambda *rates: vision_floor(config, stored, *rates))}
    if candidate == "himix":
        projection = at(lambda *rates: projection_floor(config, stored, *rates))
        if measured.projection_share is None:
            found["vision"] += projection
        else:
            found["projection"] = projection
    found["prefill"] = step(plan.text if candidate == "himix" else slots, slots)
    first, *others = found.values()
    for other in others:
        first += other
    found["first_token"] = first
    found["first_decode"] = step(1, slots + 1)
    found["decode_short"] = step(1, slots + 1 + later)
    if plan.long is not None:
        found["decode_long"] = step(1, images + plan.long + later)
    return found
