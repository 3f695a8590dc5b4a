"""Words that make a native reader stumble, and names that say nothing: neither comes back once it is mended."""
import ast
import json
import re

import pytest

# Phrases that were mended in README, docs, notebooks and comments. Each is a pattern, with what to write in its place.
PHRASES = {
    r"\banew\b": "again",
    r"\bat hand\b": "available",
    r"knows? no links|takes\s+no files": "has no links; cannot be written to",
    r"of (anybody|one)'s own\b|of the user's\b": "your own",
    r"\bbe told (one|apart by)|can be told\b|is told here": "given, estimated, checked",
    r"\bstands? (beside|below each other|under `)": "is shown beside, is set under",
    r"(numbers|sources|pathology|items|readings) stand in\b": "are in",
    r"points (its|the other) way with the whole": "the whole interval lies on the claimed side",
    r"\botherwise than\b": "other than",
    r"must not gain by": "gains nothing by",
    r"\ball the same\b": "anyway",
    r"knows nothing of\b": "knows nothing about",
    r"\bso far can\b|so little does": "can be that far apart",
    r"goes on where it was\b": "resumes where it stopped",
    r"the way of predicting that": "prediction settings",
    r"\btakes one over\b": "applies one",
    r"\bshall (see|be)\b": "should see",
    r"\b(goes?|going) on (from|with|there|as if|as it)\b": "resumes from, continues with",
    r"\b(held|hold) still\b": "frozen",
    r"\bsort of (device|machine)\b": "type of device",
    r"\bwho (also )?(chose|choose)\b|patients? (also )?cho(se|oses?) (the|an) epoch|chose nothing": "the epoch was chosen on them; used for no choice",
    r"\bto be (trusted|had)\b": "can be trusted, is available",
    r"\b(ratios|one) (are|is what ratios are) to\b": "ratios refer to",
    r"\b(are|were) others\b": "differ",
    r"\bwhat follows from (it|them|these)\b": "name it: tables, figures",
    r"\bstands? (below|there|on the|in the order)\b": "is listed below, is there",
    r"\bwish to stop\b": "request to stop",
    r"where the system knows how": "where the system supports that",
    r"\beach with each\b": "in pairs",
    r"\bpassed over for\b": "skipped for",
    r"\bbut for the\b": "except for the",
    r"what (it|they|is above) (said|says) (is above|why)": "the reason is above",
}
# Of these nothing is known from the name. Where a room decides trained numbers a new name would train again, so what is there may stay.
NAMES = {"own", "found", "kind", "way", "told", "said", "luck"}
KEPT = {
    "bench": {"kind"}, "data/dataset": {"found"}, "data/jobs": {"kind"}, "data/phantom": {"kind"}, "data/splits": {"kind"},
    "evaluation/metrics": {"found"}, "evaluation/score": {"found"}, "evaluation/targets": {"found"},
    "evidence/ranking": {"own"}, "evidence/statistics": {"found"}, "evidence/tables": {"found"}, "kinds": {"kind"},
    "losses/interface": {"kind"}, "params": {"kind"}, "sections": {"kind"}, "settings": {"kind"},   # `kind` is a key of params.yaml
}
# Strings that decide what is trained, or are in published tables: a better word would train again.
LATER = {"encoder held still for ", "the validation patients chose the epoch and are reported on"}


def prose(root):
    "The texts that people read, by their file: pages, notebooks' Markdown, comments of params.yaml and dvc.yaml, the published studies"
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted((root / "data").glob("*/*.md")), *sorted((root / "data/raw").glob("*/README.md"))]
    pages += [root / "reports/studies/log.md", *sorted((root / "reports/studies").glob("*/answer.md"))]
    for path in pages: yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield path.name, "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for name in ("params.yaml", "dvc.yaml"):
        yield name, "\n".join(re.findall(r"#.*", (root / name).read_text(encoding="utf-8")))


def sayings(root):
    "What the package says, by its file: docstrings, messages, captions, comments"
    for path in sorted((root / "levit_study").rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        yield name, "\n".join([*(each for each in strings if " " in each and not any(late in each for late in LATER)), *re.findall(r" # (.*)", text)])


def foreign(text):
    "What in a text is on the list: (words, what to write)"
    return [(match[0], better) for pattern, better in PHRASES.items() for match in re.finditer(pattern, text, re.I)]


def test_no_foreign_phrase_in_what_people_read(root):
    hits = [f"{name}: {words!r}, better: {better}" for name, text in (*prose(root), *sayings(root)) for words, better in foreign(text)]
    assert hits == []


def test_a_foreign_phrase_is_noticed():
    assert foreign("The store is made anew.") == [("anew", "again")] and foreign("The store is made again.") == []


def named(code):
    "The names that code gives to variables and arguments"
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.id
        if isinstance(node, ast.arg): yield node.arg


def test_names_say_what_they_hold(root):
    "No new variable with an empty name"
    package, new = root / "levit_study", {}
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).with_suffix("").as_posix()
        names = NAMES & set(named(path.read_text(encoding="utf-8")))
        if names - KEPT.get(room, set()): new[room] = names - KEPT.get(room, set())
    assert new == {}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_empty_name_is_noticed(name):
    assert name in set(named(f"{name} = 1")) and name in set(named(f"def f({name}): pass"))
