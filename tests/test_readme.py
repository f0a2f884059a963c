"""The README's example runs as written, and its commands are the ones that are tested."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_example_runs_as_written(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "tensor(" in done.stdout
    assert (tmp_path / "my-moe" / "config.json").is_file()
    assert (tmp_path / "my-dense" / "config.json").is_file()


def test_example_is_short():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for line in example.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 15


def test_test_command_is_marked():
    (command,) = re.findall(r"<!-- test command -->\n```\n(.*?)\n```", README, flags=re.DOTALL)
    assert command.endswith("-m pytest")
