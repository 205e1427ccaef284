"""The peer's virtual environment: the last TRL with a PPO trainer, and every other library shared with us."""

from __future__ import annotations

import site
import subprocess
import sys
import venv
from pathlib import Path

PEER = "trl==1.12.0"
"""The last release that holds a PPO trainer."""
FOLDER = Path(__file__).parents[1] / ".peer"


def peer_python(folder: Path) -> Path:
    """The Python of a virtual environment that holds the peer, and sees our libraries behind it.

    Made anew where it was made beside other libraries than those of the Python that runs now: `installed` names them.
    """
    marker = folder / "installed"
    if not marker.is_file() or marker.read_text(encoding="utf-8").strip() != sys.prefix:
        _make(folder)
        marker.write_text(sys.prefix + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def _make(folder: Path) -> None:
    venv.create(folder, clear=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "ours.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), PEER]
    subprocess.run(install, check=True, stdout=sys.stderr)
