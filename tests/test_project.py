"""Notebooks, package and settings agree."""
import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest


def run(command, root, environment, **kwargs):
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done


def test_package_is_what_the_notebooks_export(project, environment):
    folder = project("export")
    before = {str(p): p.read_text() for p in (folder / "levit_study").rglob("*.py")}
    for path in (folder / "levit_study").rglob("*.py"):
        if path.name != "__init__.py": path.unlink()
    run(["nbdev_export"], folder, environment)
    after = {str(p): p.read_text() for p in (folder / "levit_study").rglob("*.py")}
    assert sorted(before) == sorted(after)
    assert [name for name in before if before[name] != after[name]] == [], "edit the notebooks, run nbdev_export, commit both"


def test_notebooks_are_clean(project, environment):
    folder = project("clean")
    run(["nbdev_clean"], folder, environment)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True).stdout
    assert changed == "", f"run nbdev_clean and commit:\n{changed}"


def test_style(root, environment):
    run([sys.executable, "-m", "ruff", "check", "."], root, environment)


@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate", "report", "site"])
def test_stage_notebook_takes_parameters(root, stage):
    cells = json.loads((root / "nbs" / "study" / f"{stage}.ipynb").read_text())["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1
    assert not any(c.get("outputs") for c in cells), "the notebooks of the pipeline are committed without outputs"


def test_an_experiment_keeps_the_comments_of_params_yaml(root, tmp_path):
    """`dvc exp run -S` writes params.yaml anew; comments inside its lists would be lost."""
    from dvc.utils.hydra import apply_overrides
    path = tmp_path / "params.yaml"
    text = (root / "tests/params.yaml").read_text()
    path.write_text(text)
    apply_overrides(path, ["losses.focal.gamma=3"])
    said = [line.split("#", 1)[1].strip() for line in text.splitlines() if "#" in line]
    kept = path.read_text()
    assert "gamma: 3 " in kept and len(said) > 100
    assert [comment for comment in said if comment not in kept] == []


@pytest.mark.parametrize("name", ["phantom_ct", "phantom_mr", "synapse", "acdc", "acdc_unet", "acdc_best"])
def test_an_experiment_changes_what_it_names_and_nothing_else(root, tmp_path, name):
    """What a YAML anchor shares, `dvc exp run -S` would change in both places, or in neither."""
    from dvc.utils.hydra import apply_overrides
    from ruamel.yaml import YAML
    read = YAML(typ="safe").load
    path = tmp_path / "params.yaml"
    path.write_text((root / "tests/params.yaml").read_text())
    expected = read(path)
    entry = expected["datasets"][name]
    entry["training"]["epochs"], entry["data"]["size"], entry["data"]["split"]["valid"] = 99, 320, 0.3
    entry["data"]["structures"] = dict(entry["data"]["structures"], stomach=99)
    changes = "training.epochs=99", "data.size=320", "+data.split.valid=0.3", "+data.structures.stomach=99"
    if "valid" in read(path)["datasets"][name]["data"]["split"]: changes = *changes[:2], changes[2][1:], changes[3]
    if "stomach" in read(path)["datasets"][name]["data"]["structures"]: changes = *changes[:3], changes[3][1:]
    apply_overrides(path, [change.replace("+", f"+datasets.{name}.") if "+" in change else f"datasets.{name}.{change}" for change in changes])
    assert read(path) == expected


def test_each_experiment_in_the_documents_changes_the_study_that_it_runs(root, tmp_path):
    """A value of a data set or a loss that the study does not run, or that DVC does not write, would train nothing new."""
    from dvc.utils.hydra import apply_overrides
    from levit_study.params import load_params
    from ruamel.yaml import YAML
    path = tmp_path / "params.yaml"
    texts = [file.read_text() for file in (root / "README.md", *sorted(root.glob("docs/*.md")), *sorted(root.glob("data/raw/*/README.md")))]
    commands = {line for text in texts for line in re.findall(r"^dvc exp run .*|(?<=`)dvc exp run [^`]*", text, re.M)}
    changes = {command: [word for option, word in pairwise(shlex.split(command)) if option == "-S"] for command in commands}
    changes = {command: words for command, words in changes.items() if words}
    assert len(changes) >= 15
    for command, words in changes.items():
        words = [word if "[" in word else word.split(",")[0] for word in words]   # of several values in a row the first
        path.write_text((root / "tests/params.yaml").read_text())
        apply_overrides(path, words)
        content = YAML(typ="safe").load(path)
        for word in words:
            keys, _, value = word.lstrip("+").partition("=")
            where = content
            for key in keys.split("."): where = where[key]
            assert where == YAML(typ="safe").load(value), (command, word)
            part, name = keys.split(".")[:2]
            if part in ("datasets", "losses"): assert name in content["study"][part], (command, word)
        load_params(path)


def written_pages(root):
    "What people read in the project: path -> Markdown without blocks of code"
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("own/*.md"), *root.glob("data/**/README.md"), root / "reports/studies/log.md"]
    texts = {path: path.read_text() for path in pages}
    for path in root.glob("nbs/**/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        texts[path] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return {path: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for path, text in texts.items()}


def places(text):
    "The anchors of a page's headings, as GitHub and the site make them"
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_each_link_leads_somewhere(root):
    pages, dead = written_pages(root), []
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
            if re.match(r"[a-z]+:|/", link): continue  # of the web, of the site
            file, _, place = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            if not target.exists(): dead.append(f"{page.relative_to(root)}: {link}")
            elif place and target in pages and place not in places(pages[target]): dead.append(f"{page.relative_to(root)}: {link}")
    assert dead == [] and len(pages) > 100
