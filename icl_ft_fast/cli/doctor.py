"""`icl-ft-fast doctor`: what this machine is, how fast it can be at best, and what is installed."""

from __future__ import annotations

from icl_ft_fast.cli.options import Commands, add_device_option, add_json_option, command, later


def add(commands: Commands) -> None:
    """Add the command."""
    doctor = command(
        commands,
        "doctor",
        later("doctor", "run_doctor"),
        "show this machine: hardware, speed limits, energy meters, installed packages",
        "icl-ft-fast doctor\nicl-ft-fast doctor --device cuda --json",
    )
    add_device_option(doctor)
    add_json_option(doctor)
