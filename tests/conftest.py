"""What several tests share: the project's root, its real data where they are, a copy of the project to run the pipeline in."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = Path(__file__).with_name("params.yaml")   # params.yaml as it is shipped
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--no-first-run"]


@pytest.fixture(scope="session")
def root():
    return ROOT


LONGEST = ("test_pipeline", "test_notebooks", "test_invalidation", "test_site", "test_score", "test_training", "test_predict", "test_project")


def pytest_collection_modifyitems(items):
    "The longest modules first, so that no process is left alone with one of them at the end"
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def environment():
    "The environment's own programs first, one thread per process so that parallel tests do not crowd each other"
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


@pytest.fixture(scope="session")
def project(tmp_path_factory, environment):
    "Make a copy of the project's tracked and new files as a repository of its own"
    def make(name, library=True): # without the library's notebooks, which no stage reads, a site is built in half the time
        folder = tmp_path_factory.mktemp(name)
        files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
                               check=True).stdout.decode().split("\0")
        for file in filter(None, files):
            kept = file in ("reports/choices/README.md", "reports/elsewhere/README.md", "reports/ensembles/README.md", "reports/studies/log.md")   # folders that stages depend on
            if file.startswith("reports/") and not kept or file == "dvc.lock" or not (ROOT / file).is_file(): continue
            if not library and re.match(r"nbs/\d", file): continue
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file)
        (folder / "reports").mkdir(exist_ok=True)
        shutil.copy2(SHIPPED, folder / "params.yaml")   # the user's own may say anything
        for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm",
                                                                      "copy"]):
            subprocess.run(command, cwd=folder, check=True)
        return folder
    return make


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None: pytest.skip("no Chromium on this machine; install it with: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()
