"""Which isolation layers this machine offers, and the command line that enters them.

Always required: the seccomp filter, resource limits, a freshly executed interpreter with a clean
environment, SIGKILL from outside. Of the mount namespace (bubblewrap) and Landlock at least one. Whatever
else is missing is listed in `Layers.missing`, to be warned about and recorded.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from evolve.verify import cgroups

UNPRIVILEGED = 65534
"""User and group id of sandboxed interpreters (nobody)."""

PACKAGES = (
    *("numpy", "numpy.libs", "scipy", "scipy.libs", "sympy", "mpmath", "gmpy2", "gmpy2.libs"),
    *("py_landlock", "math_verify", "latex2sympy2_extended", "antlr4"),
)
"""What of the environment's packages is visible inside; the rest is not mounted."""

MODULES = (
    *("launcher", "zygote", "preload", "arithmetic"),
    *("grading", "numerals", "notation", "units", "structure", "printed", "formulas", "fingerprints"),
)
"""What of this package itself is visible inside."""

INSIDE = "/sandbox"
"""Where `MODULES` and `PACKAGES` are mounted inside."""

# LD_BIND_NOW: symbols bound lazily would be bound again, and pages copied, in every forked process.
ENVIRONMENT = {
    "PATH": "/usr/bin",
    "LANG": "C.UTF-8",
    "HOME": "/",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "LD_BIND_NOW": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # A bounded cache writes to its entries' links at every hit, which copies their pages in every node.
    "SYMPY_CACHE_SIZE": "None",
}


class SandboxUnavailable(RuntimeError):
    """This machine lacks a layer that is required. The message says which, and how to add it."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The isolation that will be entered, once per interpreter server."""

    bwrap: tuple[str, ...] | None
    """bubblewrap's path and namespace options, or None where it is missing or refused."""
    uid: int | None
    """User to become inside, or None to stay the (unprivileged) user."""
    landlock: int
    """Landlock ABI version; 0: none."""
    cgroup: str | None = None
    """Directory in which memory control groups can be made, or None."""
    seccomp: bool = True
    """False only in tests, which show that something then breaks."""
    limits: bool = True
    """As `seccomp`."""
    missing: tuple[str, ...] = ()
    """What is not there, and what to do about it."""

    @property
    def tier(self) -> str:
        """One word a layer, for the run's record: `namespaces+landlock7+seccomp+limits+uid`."""
        parts = []
        if self.bwrap:
            parts.append("namespaces" if "--unshare-net" in self.bwrap else "mounts")
        if self.landlock:
            parts.append(f"landlock{self.landlock}")
        parts += ["seccomp"] * self.seccomp + ["limits"] * self.limits + ["cgroup"] * (self.cgroup is not None)
        if self.uid is not None:
            parts.append(f"uid{self.uid}")
        return "+".join(parts)


def landlock_version() -> int:
    """The kernel's Landlock ABI version, 0 where it is off or absent."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, int(found))


def _namespace_options(root: bool) -> Iterable[tuple[str, ...]]:
    """Ways to enter namespaces, strongest first."""
    common = ("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--new-session")
    user = ("--unshare-user", "--disable-userns", "--uid", str(UNPRIVILEGED), "--gid", str(UNPRIVILEGED))
    if root:
        # A real, other user id inside, so that limits per user bind; CAP_SETUID and CAP_SETGID are
        # given up by the launcher with uid 0.
        keep = ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
        yield (*common, "--unshare-net", *keep)
        yield (*common, *keep)
    else:
        yield (*common, "--unshare-net", *user, "--cap-drop", "ALL")
        yield (*common, "--unshare-net", "--unshare-user", *user[2:], "--cap-drop", "ALL")
        yield (*common, "--unshare-user", *user[2:], "--cap-drop", "ALL")


def site_paths() -> dict[str, Path]:
    """Where each of `PACKAGES` lies, by name; those not installed are left out."""
    found: dict[str, Path] = {}
    for name in PACKAGES:
        if name.endswith(".libs"):
            owner = found.get(name.removesuffix(".libs"))
            if owner is not None and (owner.parent / name).is_dir():
                found[name] = owner.parent / name
            continue
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found[name] = Path(next(iter(spec.submodule_search_locations)))
    # latex2sympy2 asks for the version of its parser's runtime.
    for path in found["antlr4"].parent.glob("antlr4_python3_runtime-*.dist-info"):
        found[path.name] = path
    return found


def interpreter() -> Path:
    """The real interpreter behind a virtual environment's link."""
    return Path(sys.executable).resolve()


def _mounts() -> list[str]:
    """bubblewrap arguments: everything read-only, nothing of the machine but libraries and packages."""
    arguments: list[str] = []
    binds: list[tuple[str, Path, str]] = []
    roots = [Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"), Path("/etc/ld.so.cache")]
    for path in (Path("/lib"), Path("/lib64")):
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), str(path)]
        else:
            roots.append(path)
    base = Path(sys.base_prefix).resolve()
    prefixes = [base / "bin", base / "lib"] if base != Path("/usr") else [interpreter()]
    binds += [("--ro-bind-try", path, str(path)) for path in (*roots, *prefixes)]
    here = Path(__file__).parent
    binds += [("--ro-bind", here / f"{name}.py", f"{INSIDE}/verify/{name}.py") for name in MODULES]
    binds += [("--ro-bind", source, f"{INSIDE}/site/{name}") for name, source in site_paths().items()]
    # bubblewrap makes parent directories private to the user it runs as, who is not the one inside.
    parents = {str(parent) for _, _, inside in binds for parent in Path(inside).parents}
    for parent in sorted(parents - {"/"}):
        arguments += ["--perms", "0755", "--dir", parent]
    for option, source, inside in binds:
        arguments += [option, str(source), inside]
    # Not --dev: through its terminals, which anybody inside may make, nodes could hear of each other.
    arguments += ["--perms", "0755", "--dir", "/dev"]
    for name in ("null", "zero", "random", "urandom"):
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    return [*arguments, "--remount-ro", "/"]


def command(layers: Layers, kind: str, fd: int, memory_mb: int) -> list[str]:
    """The command line that starts an interpreter server of `kind` on channel `fd`, inside `layers`."""
    mib = 1 << 20
    limits = {
        "CORE": 0,
        "FSIZE": 0,
        "NOFILE": 16,
        "AS": 2 * memory_mb * mib,
        "DATA": memory_mb * mib,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "SIGPENDING": 64,
        "STACK": 8 * mib,
        "NPROC": 16384,
    }
    inside = layers.bwrap is not None
    sites = sorted({str(path.parent) for path in site_paths().values()})
    paths = [f"{INSIDE}/site"] if inside else sites
    base = str(Path(sys.base_prefix).resolve())
    here = str(Path(__file__).parent)
    outside = [p for p in (here, "/usr/lib", "/usr/lib64", "/lib", "/lib64", base) if Path(p).exists()]
    settings = {
        "kind": kind,
        "fd": fd,
        "uid": layers.uid,
        "landlock": None if not layers.landlock else ["/"] if inside else [*outside, *sites],
        "paths": paths,
        "limits": limits if layers.limits else {},
    }
    launcher = f"{INSIDE}/verify/launcher.py" if inside else str(Path(__file__).parent / "launcher.py")
    program = [str(interpreter()), "-s", "-S", "-P", "-B", launcher, json.dumps(settings)]
    if layers.bwrap is None:
        return program
    environment = [part for name, value in ENVIRONMENT.items() for part in ("--setenv", name, value)]
    return [*layers.bwrap, *_mounts(), "--clearenv", *environment, "--chdir", "/", "--", *program]


def _works(layers: Layers) -> str:
    """Try to run an interpreter inside `layers`; the empty string, or why it failed."""
    try:
        done = subprocess.run(
            command(layers, "probe", 0, 512),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=ENVIRONMENT,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        return "it did not end within 30 s"
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip()[-300:] or f"exit status {done.returncode}"


@functools.cache
def detect() -> Layers:
    """The strongest layers that work here.

    Raises:
        SandboxUnavailable: a required layer is missing.
    """
    root = os.geteuid() == 0
    missing: list[str] = []
    try:
        from evolve.verify.seccomp import compile_filter

        compile_filter()
    except (ImportError, RuntimeError, OSError) as error:
        raise SandboxUnavailable(
            f"no seccomp filter: {error}. Install libseccomp (Debian: apt-get install libseccomp2) and"
            " the Python package pyseccomp."
        ) from error
    landlock = landlock_version()
    if importlib.util.find_spec("py_landlock") is None:
        landlock = 0
        missing.append("Landlock: the Python package py-landlock is not installed")
    elif landlock == 0:
        missing.append("Landlock: needs Linux 5.13 or newer with `landlock` in the kernel's lsm= list")
    elif landlock < 6:
        missing.append(f"Landlock ABI {landlock}: signals are scoped only from ABI 6 (Linux 6.12)")
    plain = Layers(None, UNPRIVILEGED if root else None, landlock)
    layers, reason = _with_namespaces(plain)
    if layers.bwrap is None:
        missing.append(f"namespaces: {reason}")
        missing.append("a sleeping process may outlive a supervisor that is killed, without a pid namespace")
        reason = "Landlock is missing" if landlock == 0 else _works(layers)
        if reason:
            raise SandboxUnavailable(
                "neither a mount namespace nor Landlock can be had, and one of them is required: "
                + "; ".join([*missing, reason])
            )
    elif "--unshare-net" not in layers.bwrap:
        missing.append("network namespace: refused here; sockets are still refused by seccomp")
    group = cgroups.find()
    if group is None:
        missing.append(cgroups.MISSING)
    return replace(layers, cgroup=None if group is None else str(group), missing=tuple(missing))


def _with_namespaces(plain: Layers) -> tuple[Layers, str]:
    """`plain` inside bubblewrap with the strongest options that work; or `plain`, and why none does."""
    path = shutil.which("bwrap")
    if path is None:
        return plain, "bubblewrap is not installed (Debian: apt-get install bubblewrap)"
    reason = ""
    for options in _namespace_options(plain.uid is not None):
        layers = replace(plain, bwrap=(path, *options))
        reason = _works(layers)
        if not reason:
            return layers, ""
    hint = "user namespaces must be allowed (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces>0)"
    return plain, f"bubblewrap failed ({reason}); {hint}"


def without(layers: Layers, *names: str) -> Layers:
    """`layers` with some switched off (`namespaces`, `landlock`, `seccomp`, `limits`, `cgroup`). Only tests do this."""
    for name in names:
        if name == "namespaces":
            layers = replace(layers, bwrap=None)
        elif name == "landlock":
            layers = replace(layers, landlock=0)
        elif name == "seccomp":
            layers = replace(layers, seccomp=False)
        elif name == "limits":
            layers = replace(layers, limits=False)
        elif name == "cgroup":
            layers = replace(layers, cgroup=None)
        else:
            raise ValueError(f"no such layer: {name!r}")
    return layers
