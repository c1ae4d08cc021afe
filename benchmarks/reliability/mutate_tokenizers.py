"""Mutated tokenizer.json files, each loaded, encoding and decoding: it works, or an error of ours.

    python -m benchmarks.reliability.mutate_tokenizers --count 2500

A worker that ends, or a file that takes more than its limit of memory, is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.reliability.tokenizers_json import TEXTS, corpus, mutated
from benchmarks.reliability.workers import kilobytes, reset_peak, run_workers

ADDRESS_SPACE = 3 << 30  # bytes of a worker
CONTEXT = 4096  # tokens


def outcome_of(data: bytes) -> str:
    """What becomes of a file: "works", or the name of our error; "wrong: ..." for all else."""
    from himix_edge.contract import Chat
    from himix_edge.errors import BundleError, PromptError
    from himix_edge.runtimes.chat import ChatTemplate
    from himix_edge.runtimes.tokenizer import Detokenizer, Tokenizer

    worked = 0
    try:
        chat = ChatTemplate("{{ messages[-1].content }}", Chat())
        tokenizer = Tokenizer(data, chat, Path("tokenizer.json"))
        for text in (*TEXTS, "a red circle " * 1000):
            with contextlib.suppress(PromptError, BundleError):
                ids = tokenizer.encode_turn((), text, CONTEXT)
                detokenizer = Detokenizer(tokenizer)
                for token in ids[:50]:
                    detokenizer.push(token)
                tokenizer.decode(ids)
                worked += 1
        found = "works" if worked else "PromptError or BundleError of every text"
    except BundleError:
        found = "BundleError on loading"
    except BaseException as error:  # noqa: BLE001 (that is what is looked for)
        found = f"wrong: {error!r}"[:300]
    return found


def work(first: int, step: int, count: int) -> None:
    """Prints one line of JSON for each file: the outcome, seconds, and megabytes at the peak."""
    files = corpus()
    for data in files:
        outcome_of(json.dumps(data).encode())
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for seed in range(first, count, step):
        name, text = mutated(files, seed)
        print(json.dumps({"seed": seed, "name": name}), flush=True)
        reset_peak()
        before, start = kilobytes("VmRSS"), time.process_time()
        outcome = outcome_of(text)
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
    results = run_workers("benchmarks.reliability.mutate_tokenizers", options.count)
    print(f"{len(results):,} files")
    for outcome, number in sorted(Counter(r.outcome.split(":")[0] for r in results).items()):
        print(f"{outcome:24} {number:6,}")
    sys.exit(results.show_worst())


if __name__ == "__main__":
    main()
