"""Nothing is sent: all commands, in a network namespace of their own and under strace.

Where either is not permitted, Python's own sockets are watched alone, and the test is skipped for
what it could not see: libraries in C.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.reliability.table import tried

ROOT = Path(__file__).parents[2]
# Arguments: a folder to work in, the checkpoints of a HiMix and of a vanilla model. What Python
# itself does on the network is printed at the end.
SESSION = """
import contextlib, dataclasses, io, json, os, sys
connected = []
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.sendmsg")
sys.addaudithook(lambda event, args: connected.append(event) if event in NETWORK else None)
early = []  # whether onnxruntime was ever imported before it was told to be silent

class Watch:
    def find_spec(self, name, *_):
        if name == "onnxruntime" and os.environ.get("ORT_DISABLE_TELEMETRY") != "1":
            early.append(name)

sys.meta_path.insert(0, Watch())
from himix_edge import cli, errors, pipeline
from himix_edge.training import recipe

def stop(*_):  # an export has been done already, and takes long
    raise errors.TrainingError("trained")

pipeline.export_bundle = stop
out, checkpoint, vanilla = sys.argv[1:]
os.chdir(out)
mini = recipe.RECIPES["shapes-ablation"]
phases = tuple(dataclasses.replace(phase, steps=1, scenes=2) for phase in mini.phases)
recipe.RECIPES["shapes-ablation"] = dataclasses.replace(mini, phases=phases)
codes = {}
for line in (
    "--version", "models", "flops", "doctor", "plan --device cpu", "scene -o scene.png",
    "scene --count 40 -o album", f"export --checkpoint {checkpoint} -o bundle", "info bundle",
    "run scene.png describe --bundle bundle --max-tokens 3", "build bundle --dry-run",
    "eval bundle --scenes 1", "quantize bundle -o int8 --decoder int8 --vision int8",
    "bench int8 --rounds 1 --text 4", f"convert {vanilla} --calibration album -o converted",
    "train --recipe shapes-ablation --scenes 1 -o trained", "run missing.png describe",
    "export --encoder ./modle", "export --help",
):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main(line.split())
        except SystemExit as end:
            codes[line] = 0 if end.code in (0, None) else f"{end.code}: {said.getvalue()[-300:]}"
import himix_edge
with himix_edge.load("bundle", threads=1) as model:
    model.chat("scene.png").ask("describe", max_tokens=3).read()
print(json.dumps([connected, early, codes]))
"""


def works(*command: str) -> bool:
    if not shutil.which(command[0]):
        return False
    done = subprocess.run([*command, "true"], capture_output=True, check=False, timeout=30)
    return done.returncode == 0


def namespace() -> list[str] | None:
    """The command that runs another without a network; None where none may."""
    commands = (["unshare", "-n"], ["unshare", "-r", "-n"])
    return next((command for command in commands if works(*command)), None)


@tried(
    "Network",
    "every command and the library, in a network namespace under strace, with a link planted where "
    "ONNX Runtime's reports write in the temporary folder",
    "no socket of the internet is opened; nothing is written but the output",
)
@pytest.mark.slow
def test_nothing_is_sent_and_nothing_is_left(tmp_path: Path) -> None:
    for name, design in (("himix", "himix"), ("vanilla", "vanilla")):
        tiny.tiny_checkpoint(tmp_path / name, tiny.tiny_config(design))  # type: ignore[arg-type]
    home, temporary, out = (tmp_path / name for name in ("home", "tmp", "out"))
    for folder in (home, temporary, out):
        folder.mkdir()
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    (temporary / ".ses").symlink_to(thesis)

    log = tmp_path / "strace.log"
    isolated = namespace()
    calls = "trace=socket,connect,sendto,sendmsg,sendmmsg"
    strace = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", calls, "-o", str(log)]
    traced = works(*strace)
    command = [*(isolated or []), *(strace if traced else []), sys.executable, "-c", SESSION]
    done = subprocess.run(
        [*command, str(out), str(tmp_path / "himix"), str(tmp_path / "vanilla")],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "OMP_NUM_THREADS": "1",
            "HIMIX_EDGE_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    connected, early, codes = json.loads(done.stdout.splitlines()[-1])
    failed = {line: code for line, code in codes.items() if code}
    assert {line.split()[0] for line in failed} == {"run", "export", "train", "build"}, failed
    assert failed["train --recipe shapes-ablation --scenes 1 -o trained"] == "1: Error: trained\n"
    assert (connected, early) == ([], [])
    assert thesis.read_text() == "years of work"
    left = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    assert [name for name in left if not name.startswith(".cache/matplotlib/fontlist")] == []
    names = {path.name for path in temporary.iterdir()}
    assert {name for name in names if not name.startswith("torchinductor_")} == {".ses"}
    if not traced:
        pytest.skip("strace is not permitted: what libraries in C send was not seen")
    text = log.read_text(errors="replace")
    assert re.findall(r".*AF_INET.*", text) == []
    if not isolated:
        pytest.skip("network namespaces are not permitted: the host's network was there")
