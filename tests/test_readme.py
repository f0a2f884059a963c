"""The README's example runs as written, and its commands are the ones that are tested."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(example, folder):
    script = folder / "example.py"
    script.write_text(example)
    return subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True, env=os.environ, check=False)


def test_first_example_runs_as_written(tmp_path):
    done = run(EXAMPLES[0], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tensor(" in done.stdout
    assert (tmp_path / "my-moe" / "config.json").is_file()
    assert (tmp_path / "my-dense" / "config.json").is_file()


def test_stock_model_of_the_second_example_runs_on_these_experts(tmp_path):
    check = "import torch\nprint(stock(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward())\n"
    done = run(EXAMPLES[1] + check, tmp_path)
    assert done.returncode == 0, done.stderr


def test_examples_are_short():
    assert len(EXAMPLES) == 2
    for example in EXAMPLES:
        lines = [line for line in example.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(lines) <= 15


def test_test_command_is_marked():
    (command,) = re.findall(r"<!-- test command -->\n```\n(.*?)\n```", README, flags=re.DOTALL)
    assert " -m pytest" in command
