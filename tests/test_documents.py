"""Tests of the Markdown documents: linked files, commands, flags, and tables of results."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from tools import report
from utils import options

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "results/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("results/*/README.md")]),
]
STUDIES = sorted(ROOT.glob("results/*/tables.csv"))
PROGRAMS = {
    "train_sr.py": options.create_train_sr_parser,
    "train_detector.py": options.create_train_detector_parser,
    "test.py": options.create_test_parser,
}
PARSED_ELSEWHERE = {"--nnodes", "--nproc_per_node", "--rdzv-backend", "--rdzv-endpoint"}  # flags of torchrun


def read_document(document: str) -> str:
    """Return the text of a document, whose path is relative to the project folder."""
    return (ROOT / document).read_text(encoding="utf-8")


def commands_of_document(document: str) -> list[list[str]]:
    """Return one list of words per command in the bash code blocks of a document."""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", read_document(document), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                commands.append(words)
    return commands


def collect_flags_of_programs_and_tools() -> set[str]:
    """Return one set of all command-line flags of the three programs, torchrun and the Python files of other folders."""
    flags = set(PARSED_ELSEWHERE)
    for make_parser in PROGRAMS.values():
        flags.update(make_parser()._option_string_actions)
    for folder in ("tools", "benchmarks", "results/*", "utils"):
        for source in ROOT.glob(f"{folder}/*.py"):
            flags.update(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", source.read_text()))
    return flags


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_links_to_exists(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", read_document(document)):
        if not target.startswith("http"):
            assert (ROOT / document).parent.joinpath(target.split("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_program_and_script_in_the_commands_of_a_document_exists(document):
    for words in commands_of_document(document):
        for word in words:
            if (
                re.fullmatch(r"(script|results)/[\w/]+\.sh|\w+\.py", word)
                and "NAME" not in word
                and "STUDY" not in word
            ):
                assert (ROOT / word).exists(), words
        if "-m" in words:
            module = words[words.index("-m") + 1]
            if module.startswith("tools."):
                assert (ROOT / f"{module.replace('.', '/')}.py").exists(), words


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_the_programs_accept_the_commands_of_a_document(document):
    checked = 0
    for words in commands_of_document(document):
        if words[0] == "python" and words[1] in PROGRAMS:
            PROGRAMS[words[1]]().parse_args(words[2:])
            checked += 1
    assert checked > 0


@pytest.mark.parametrize("document", ["README.md", "docs/safety.md", "docs/integrations.md", "docs/results.md"])
def test_every_flag_that_a_document_mentions_exists(document):
    mentioned = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", read_document(document)))
    foreign = set()
    for line in read_document(document).splitlines():
        if line.startswith(("pip ", "npm ")):
            foreign.update(re.findall(r"--[\w-]+", line))
        if "deepsafe eval" in line:
            foreign.add("--model")
    assert mentioned - foreign <= collect_flags_of_programs_and_tools()


def test_the_readme_has_at_most_170_lines():
    assert len(read_document("README.md").splitlines()) <= 170


def test_the_tables_of_the_documents_follow_from_the_committed_scores(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert report.main(["--refresh", "README.md", "docs/results.md", "--check"]) == 0


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.parent.name)
def test_the_folder_of_a_study_contains_exactly_the_score_tables_that_its_tables_use(study):
    with study.open(newline="") as file:
        used = {(study.parent / row["scores"]).resolve() for row in csv.DictReader(file)}
    committed = set(study.parent.glob("scores/*.csv"))
    own = {path for path in used if study.parent in path.parents}
    assert own == committed
    assert all(path.exists() for path in used)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.parent.name)
def test_each_study_has_a_script_and_a_readme(study):
    assert (study.parent / "run.sh").exists()
    assert (study.parent / "README.md").exists()


def test_the_results_folder_contains_no_json_files():
    assert not list((ROOT / "results").rglob("*.json"))


def test_the_performance_document_says_at_its_beginning_that_no_gpu_was_used():
    assert "never run on a GPU" in " ".join(read_document("docs/performance.md").split())[:400]


def test_the_project_cannot_be_installed_as_packages_named_models_data_or_utils():
    text = read_document("pyproject.toml")
    assert "[project]" not in text
    assert "packages" not in text
    assert not (ROOT / "setup.py").exists()
