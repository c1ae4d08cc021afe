"""`python -m himix_edge.export_demo FOLDER`: the demo model's bundle; see `bundles.demo_bundle`.

Each line on stdout is a JSON object: a phase and how much of all is done, or at the end an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from himix_edge.bundles import DEMO_CHECKPOINT
from himix_edge.errors import HimixError
from himix_edge.remedies import is_out_of_memory, reason_of, remedy_for


def main(folder: Path) -> int:
    """Exports into an empty folder; returns the exit status."""
    try:
        from himix_edge.export.bundle import export_bundle
        from himix_edge.models.checkpoints import read_checkpoint

        export_bundle(read_checkpoint(DEMO_CHECKPOINT), folder, progress=_report)
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        _say(missing=error.name)
    except HimixError as error:
        _say(failed=error.failed, expected=error.expected, found=error.found, fix=error.fix)
    except OSError as error:
        _say(failed=reason_of(error), fix=remedy_for(error))
    except Exception as error:  # noqa: BLE001 (whoever started this process says it in one line)
        memory = "not enough memory" if is_out_of_memory(error) else None
        _say(failed=memory or f"{type(error).__name__}: {error}")
    else:
        return 0
    return 1


def _report(phase: str, share: float) -> None:
    _say(phase=phase, share=share)


def _say(**said: object) -> None:
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
