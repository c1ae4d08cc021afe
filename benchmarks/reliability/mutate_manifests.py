"""Mutated manifests and graphs, each opened and asked one question: it works, or an error of ours.

    python -m benchmarks.reliability.mutate_manifests --count 2500

The bundle is the built-in demo model's. A worker that ends, or that takes more than its limit of
memory, is a failure.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.reliability.manifests import mutate
from benchmarks.reliability.workers import kilobytes, reset_peak, run_workers
from himix_edge.bundles import demo_bundle
from himix_edge.errors import HimixError

ADDRESS_SPACE = 4 << 30  # bytes of a worker


def outcome_of(bundle: Path) -> str:
    """What becomes of a bundle: "works", or the name of our error; "wrong: ..." for all else."""
    from PIL import Image

    import himix_edge

    try:
        model = himix_edge.load(bundle, device="cpu", threads=1)
        model.generate(Image.new("RGB", (20, 20)), "describe", max_tokens=2).read()
    except HimixError as error:
        return type(error).__name__
    except BaseException as error:  # noqa: BLE001 (that is what is looked for)
        return f"wrong: {error!r}"[:300]
    return "works"


def work(first: int, step: int, count: int) -> None:
    """Prints one line of JSON for each bundle: the outcome, seconds, and megabytes at the peak."""
    source = demo_bundle(lambda *_: None)
    outcome_of(source)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        for seed in range(first, count, step):
            name = mutate(source, bundle, seed)
            print(json.dumps({"seed": seed, "name": name}), flush=True)
            reset_peak()
            before, start = kilobytes("VmRSS"), time.process_time()
            outcome = outcome_of(bundle)
            seconds = time.process_time() - start
            megabytes = (kilobytes("VmHWM") - before) / 1024
            print(json.dumps({"outcome": outcome, "s": seconds, "MB": megabytes}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2500)
    parser.add_argument("--worker", type=int, nargs=2)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options.count)
        return
    demo_bundle(lambda *_: None)  # exported here, if it was not yet
    results = run_workers("benchmarks.reliability.mutate_manifests", options.count)
    print(f"{len(results):,} bundles")
    for outcome, number in sorted(Counter(r.outcome.split(":")[0] for r in results).items()):
        print(f"{outcome:24} {number:6,}")
    sys.exit(results.show_worst())


if __name__ == "__main__":
    main()
