"""Mutated pictures, each through `load_image` and `pixel_values`: an array or an ImageError.

    python -m benchmarks.reliability.mutate_pictures --count 12000

A worker that ends, or takes more than its limit of memory or a minute, is a failure of the picture
it had. Warnings are errors.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import warnings
from collections import Counter

from benchmarks.reliability.pictures import corpus, mutated
from benchmarks.reliability.workers import kilobytes, reset_peak, run_workers

ADDRESS_SPACE = 3 << 30  # bytes of a worker


def outcome_of(data: bytes) -> str:
    """What becomes of a picture: "array" or "ImageError"; "wrong: ..." for all else."""
    from himix_edge.config import PreprocessConfig
    from himix_edge.errors import ImageError
    from himix_edge.runtimes.preprocess import load_image, pixel_values

    try:
        pixels = pixel_values(load_image(data), PreprocessConfig(64))
    except ImageError:
        return "ImageError"
    except BaseException as error:  # noqa: BLE001 (that is what is looked for)
        return f"wrong: {error!r}"[:300]
    return "array" if pixels.shape == (1, 3, 64, 64) else f"wrong: {pixels.shape}"


def work(first: int, step: int, count: int) -> None:
    """Prints one line of JSON for each picture: the outcome, seconds, and megabytes at the peak."""
    files = corpus()
    for data in files.values():
        outcome_of(data)  # imports the decoders
    warnings.simplefilter("error")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for seed in range(first, count, step):
        name, data = mutated(files, seed)
        print(json.dumps({"seed": seed, "name": name}), flush=True)
        reset_peak()
        before, start = kilobytes("VmRSS"), time.process_time()
        outcome = outcome_of(data)
        seconds = time.process_time() - start
        megabytes = (kilobytes("VmHWM") - before) / 1024
        print(json.dumps({"outcome": outcome, "s": seconds, "MB": megabytes}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12_000)
    parser.add_argument("--worker", type=int, nargs=2)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options.count)
        return
    results = run_workers("benchmarks.reliability.mutate_pictures", options.count)
    print(f"{len(results):,} pictures")
    kinds = Counter((r.name.split()[0], r.outcome.split(":")[0]) for r in results)
    for (kind, outcome), number in sorted(kinds.items()):
        print(f"{kind:9} {outcome:11} {number:6,}")
    sys.exit(results.show_worst())


if __name__ == "__main__":
    main()
