"""Questions from many threads about shared images: wrong answers, memory and open files over time.

    python benchmarks/threads.py BUNDLE --questions 5000 --threads 8

The right answer to each question is the one that it gets alone, about an image that was encoded for
it. Then all threads ask at random about the shared images, one turn or two, while the interpreter
switches between them every 10 microseconds. Linux alone: memory and open files are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np

import himix_edge
from himix_edge.runtimes.conversation import EncodedImage
from himix_edge.runtimes.model import Model
from himix_edge.shapes.questions import KINDS, ask
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import random_scene

IMAGES = 12
SWITCH_SECONDS = 1e-5
FURTHER = "How many objects are there?"  # the second turn
Key = tuple[int, str, bool]  # image, question, whether a second turn follows


def answers(model: Model, image: EncodedImage, key: Key) -> list[str]:
    talk = model.chat(image)
    questions = [key[1], FURTHER] if key[2] else [key[1]]
    return [talk.ask(question).read() for question in questions]


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) - 1  # but the one that lists them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=8)
    given = parser.parse_args()
    model = himix_edge.load(given.bundle, threads=1)
    rng = np.random.default_rng(11)
    scenes = [random_scene(rng) for _ in range(IMAGES)]
    pictures = [render(scene) for scene in scenes]
    keys: list[Key] = []
    for i, scene in enumerate(scenes):
        asked = [found.text for kind in KINDS if (found := ask(kind, scene, rng))]
        keys += [(i, text, further) for text in asked for further in (False, True)]
    expected = {key: answers(model, model.encode(pictures[key[0]]), key) for key in keys}
    shared = [model.encode(picture) for picture in pictures]
    counts = {"asked": 0, "wrong": 0}
    memory: list[float] = []
    descriptors: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        draw = random.Random(number)
        while True:
            with lock:
                if counts["asked"] >= given.questions:
                    return
                counts["asked"] += 1
                if counts["asked"] % (given.questions // 10) == 0:
                    memory.append(round(resident_megabytes(), 1))
                    descriptors.append(open_files())
            key = draw.choice(keys)
            if answers(model, shared[key[0]], key) != expected[key]:
                with lock:
                    counts["wrong"] += 1

    sys.setswitchinterval(SWITCH_SECONDS)
    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(given.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = round(time.perf_counter() - began, 1)
    distinct = len({tuple(found) for found in expected.values()})
    report = {**counts, "distinct": distinct, "seconds": seconds, "resident_megabytes": memory}
    print(json.dumps({"threads": given.threads, **report, "open_files": descriptors}))


if __name__ == "__main__":
    main()
