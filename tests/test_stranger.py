"""A stranger's package, installed into an environment of its own: found, trained, checked, and missed when it is gone."""

import ast
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "stranger"
RULE = "log_sum"


class Environment:
    """A virtual environment that sees the packages of this one, saelens_lite among them."""

    def __init__(self, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        here = self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        shared = [sysconfig.get_path("purelib"), *{str(Path(p)) for p in sys.path if p.endswith("-packages")}]
        lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(shared)]
        Path(here, "shared.pth").write_text("\n".join(lines) + "\n")

    def run(self, *args: object, code: int = 0) -> subprocess.CompletedProcess:
        """Run a Python of the environment, which must end with exit code `code`. Return the finished process."""
        command = [str(self.python), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def cli(self, *args: object, code: int = 0) -> subprocess.CompletedProcess:
        """Return the command line of saelens_lite in it."""
        return self.run("-m", "saelens_lite.cli", *args, code=code)

    def pip(self, *args: object) -> None:
        """Run this environment's pip on the other environment, without downloads."""
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python]
        done = subprocess.run([*pip, *args], capture_output=True, text=True, check=False, cwd=self.folder)
        assert done.returncode == 0, done.stderr


def test_the_package_is_short():
    (rule,) = [
        n for n in ast.parse((PACKAGE / "log_sum_sae.py").read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)
    ]
    lines = ast.unparse(rule).splitlines()
    assert len([line for line in lines if line.strip()]) <= 15


@pytest.mark.slow
def test_from_pip_install_to_pip_uninstall(cache_folder, tmp_path):
    source = shutil.copytree(PACKAGE, tmp_path / "source")  # building leaves files beside what is built
    env = Environment(tmp_path / "venv")
    assert RULE not in [row["name"] for row in json.loads(env.cli("plugins", "--json").stdout)]
    env.pip("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", source)

    row = next(row for row in json.loads(env.cli("plugins", "--json").stdout) if row["name"] == RULE)
    assert (row["distribution"], row["version"], row["status"]) == ("log-sum-sae", "1.2", "ok")
    assert row["paper"].startswith("Candès")

    settings = ("--d-sae", 48, "--n-tokens", 4096, "--batch-size", 128, "--lr", 3e-3, "--options.coefficient", 0.5)
    trained = env.cli(
        "train", cache_folder, "--hook", "blocks.1.hook_resid_pre", "--sparsity", RULE, *settings, "--out", tmp_path / "run"
    )
    assert f"run: {RULE}, L0 " in trained.stdout
    dictionary = tmp_path / "run/dictionary"
    env.cli("eval", dictionary, "--n-tokens", 500, "--json", tmp_path / "eval.json")
    assert "fvu" in (tmp_path / "eval.json").read_text()
    checked = json.loads(env.cli("plugins", "--check", RULE, "--json").stdout)
    assert {check["status"] for check in checked["checks"]} <= {"ok", "not checked"}
    assert not env.cli("inspect", dictionary).stderr

    env.pip("uninstall", "--quiet", "--yes", "log-sum-sae")
    missing = "the file was written with log-sum-sae 1.2, which supplies it: pip install 'log-sum-sae==1.2'"
    inspected = env.cli("inspect", dictionary)
    assert json.loads(inspected.stdout)["metadata"]["saelens_lite"]["options"]["coefficient"] == 0.5
    said = env.run("-c", f"import saelens_lite as sl; sl.Dictionary.load({str(dictionary)!r})", code=1).stderr
    for text in (inspected.stderr, said.splitlines()[-1]):
        assert f"no sparsity plugin is called '{RULE}'" in text
        assert missing in text
