"""`python -m benchmarks.peers [NAME ...]`: make the environments of the peers (all by default), under .venv-peers/."""

import subprocess
import sys

from benchmarks.peers import ENVIRONMENTS, ROOT


def main() -> None:
    """Make each environment that is named."""
    names = sys.argv[1:] or list(ENVIRONMENTS)
    if unknown := sorted(set(names) - set(ENVIRONMENTS)):
        raise SystemExit(f"unknown peer: {', '.join(unknown)}; expected {', '.join(ENVIRONMENTS)}")
    for name in names:
        install, remove = ENVIRONMENTS[name]
        subprocess.run([sys.executable, "-m", "venv", str(ROOT / name)], check=True)
        pip = [str(ROOT / name / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", *install], check=True)
        if remove:
            subprocess.run([*pip, "uninstall", "--yes", *remove], check=True)


if __name__ == "__main__":
    main()
