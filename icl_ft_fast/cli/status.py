"""`icl-ft-fast status`, `pause` and `resume`: a study that runs in another terminal, or on another machine."""

from __future__ import annotations

from pathlib import Path

from icl_ft_fast.cli.options import OUTPUT, Commands, add_json_option, amount, command, later


def add(commands: Commands) -> None:
    """Add the three commands."""
    help = "the --out of compare"
    status = command(
        commands,
        "status",
        later("status", "run_status"),
        "what a study is at: arms done and running, accuracy so far, time left, last error",
        "icl-ft-fast status out/run1\nicl-ft-fast status out/run1 --watch",
    )
    status.group("data").add_argument("folder", type=Path, metavar="OUT", help=help)
    output = status.group(OUTPUT)
    output.add_argument("--watch", action="store_true", help="print it again until the study ends")
    output.add_argument("--every", type=amount, default=5.0, metavar="SECONDS", help="time between prints of --watch")
    add_json_option(status)
    for name, summary in (
        ("pause", "let a study finish the runs that it is at, and begin no others"),
        ("resume", "let a paused study go on"),
    ):
        parser = command(commands, name, later("status", f"run_{name}"), summary, f"icl-ft-fast {name} out/run1")
        parser.group("data").add_argument("folder", type=Path, metavar="OUT", help=help)
