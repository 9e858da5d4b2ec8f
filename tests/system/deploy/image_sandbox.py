"""The image's environment without a container engine: read-only root, any user, empty volumes.

Needs Linux, root and the permission to make mount namespaces. The image's own steps of `ENV`,
`ENTRYPOINT` and `HEALTHCHECK` are taken from its Dockerfile.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ladderstitch
from tests.deploy.dockerfile import environment

ROOT = Path(__file__).resolve().parents[3]
USER_ID = 12345
"""A user id without an entry in /etc/passwd."""


def readable_paths() -> list[Path]:
    """Return the folders that Python and the package need, outermost first."""
    packages = [Path(ladderstitch.__file__).parents[1], ROOT / "kernels", ROOT / "loadtest"]
    return [Path(sys.base_prefix), Path(sys.prefix), *packages]


def hidden_roots() -> list[Path]:
    """Return the top-level folders that keep other users out, such as /root."""
    roots = {Path("/", path.parts[1]) for path in readable_paths()}
    return sorted(root for root in roots if not root.stat().st_mode & 0o001)


def mount_script(inputs: dict[Path, str], *, volumes: bool = True) -> str:
    """Return shell commands that set up the file systems, then run "$@" as `USER_ID`:0.

    /tmp and the home folder are empty volumes, or read-only without `volumes`. `inputs` has the
    path below /run of each file or folder that the command reads.
    """
    home = environment()["HOME"]
    keep = Path(home).parent / "keep"
    lines = [
        "set -e",
        f"mount -t tmpfs -o mode=0755 tmpfs {Path(home).parent}",
        f"mkdir -m {775 if volumes else 755} {home} && mkdir {keep}",
        "mount -t tmpfs -o mode=0755 tmpfs /run && mkdir /run/secrets",
        *(f"cp -r {source} /run/{target}" for source, target in inputs.items()),
        "chmod -R a+rX,go-w /run",
    ]
    moved = [
        path for path in readable_paths() if any(path.is_relative_to(h) for h in hidden_roots())
    ]
    for number, path in enumerate(moved):
        lines.append(f"mkdir {keep}/{number} && mount --bind {path} {keep}/{number}")
    lines += [f"mount -t tmpfs -o mode=0755 tmpfs {hidden}" for hidden in hidden_roots()]
    for number, path in enumerate(moved):
        lines.append(f"mkdir -p {path} && mount --bind {keep}/{number} {path}")
    lines += [
        f"mount -t tmpfs -o mode={1777 if volumes else 755} tmpfs /tmp",
        f"mount -t tmpfs -o mode={1777 if volumes else 755} tmpfs /var/tmp",
        "mount -o remount,bind,ro /",
        f"cd {home}",
        f'exec setpriv --reuid {USER_ID} --regid 0 --clear-groups --no-new-privs "$@"',
    ]
    return "\n".join(lines)


def command_in_image(inputs: dict[Path, str], *command: str, volumes: bool = True) -> list[str]:
    """Return a command that runs another one with the image's variables, user and volumes."""
    variables = environment() | {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join(map(str, readable_paths()[2:])),
        "COLUMNS": "200",
    }
    assignments = [f"{name}={value}" for name, value in variables.items()]
    script = mount_script(inputs, volumes=volumes)
    return ["unshare", "-m", "sh", "-c", script, "sh", "env", "-i", *assignments, *command]


def skip_without_namespaces() -> None:
    """Skip the test where this user cannot make a mount namespace."""
    missing = [tool for tool in ("unshare", "setpriv", "wget") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, unshare, setpriv and wget; missing: {missing or 'root'}")
    probe = "mount -t tmpfs tmpfs /home && mount -o remount,bind,ro /"
    done = subprocess.run(["unshare", "-m", "sh", "-c", probe], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount namespaces are not allowed here: {shlex.quote(done.stderr.strip())}")
