"""The oldest Triton that pyproject.toml allows compiles and interprets the kernels: ``--oldest-triton PATH`` runs their tests.

PATH is a virtual environment, made at the first call: this one's packages with that Triton, and a NumPy that its interpreter
takes, in front of them.
"""

import os
import re
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = ["tests/test_interpreter.py", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*_triton.py"))]


def oldest():
    """Major and minor."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(found[1] for text in wanted if (found := re.match(r"triton>=(\d+\.\d+)", text)))


def run(*command):
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def python(request):
    folder = request.config.getoption("--oldest-triton")
    if folder is None:
        pytest.skip("--oldest-triton PATH makes an environment for it and runs it, many minutes on two cores")
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        Path(own, "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")  # behind its own packages
        run(python, "-m", "pip", "install", "-q", "--no-deps", f"triton=={oldest()}.*", "numpy<2.4")
    return python


@pytest.mark.parametrize("what", ["compiled", "interpreted"])
def test_the_oldest_triton(what, python):
    there = run(python, "-c", "from importlib.metadata import version; print(version('triton'))")
    assert conftest.release(there) == conftest.release(oldest())
    tests = ["tests/compile/test_compile.py", "tests/compile/test_dry_run.py"] if what == "compiled" else INTERPRETED
    run(python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *tests)


def test_a_numpy_that_the_interpreter_does_not_take():
    message = "numpy is 2.4.1; allowed: numpy<2.4 with Triton 3.6.0, whose interpreter runs the kernels' tests"
    assert conftest.numpy_problem("3.6.0", "2.4.1") == message
    for fine in (("3.6.0", "2.3.5"), ("3.7.0", "2.4.1"), ("3.9.0", "3.0"), (None, "2.4.1")):
        assert conftest.numpy_problem(*fine) is None
