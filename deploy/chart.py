"""Write deploy/helm/README.md, the table of the chart's values, from values.yaml: `python deploy/chart.py`."""

from __future__ import annotations

import re
from pathlib import Path

CHART = Path(__file__).parent / "helm"
HEAD = """\
# Backpack Serving

Gateways, the intervention service and, by KubeRay, replicas of a Backpack language model. What is needed in the
cluster, and how it is operated: `docs/operating.md` of the repository.

    helm install backpack backpack-*.tgz --values mine.yaml
    helm test backpack

This file is made from `values.yaml` by `python deploy/chart.py`.

| value | default | meaning |
|---|---|---|
"""
KEY = re.compile(r"(?P<indent> *)(?P<name>\w+):(?P<rest>.*)")


def table(values: str) -> list[tuple[str, str, str]]:
    """(dotted name, default, meaning) of every value: of groups, too, where a comment says something of them."""
    rows: list[tuple[str, str, str]] = []
    path: list[tuple[int, str]] = []
    above: list[str] = []
    for line in values.splitlines():
        if line.lstrip().startswith("#"):
            above.append(line.lstrip("# ").strip())
        elif found := KEY.fullmatch(line):
            indent = len(found["indent"])
            path = [(at, name) for at, name in path if at < indent] + [(indent, found["name"])]
            default, _, beside = found["rest"].partition(" #")
            meaning = " ".join([*above, beside.strip()]).strip()
            if default.strip() or meaning:
                rows.append((".".join(name for _, name in path), default.strip(), meaning))
            above = []
        else:
            above = []
    return rows


def readme(values: str) -> str:
    def cell(text: str, code: bool = False) -> str:
        text = text.replace("|", "\\|")
        return f"`{text}`" if code and text else text

    rows = (f"| `{name}` | {cell(default, True)} | {cell(meaning)} |" for name, default, meaning in table(values))
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    (CHART / "README.md").write_text(readme((CHART / "values.yaml").read_text("utf-8")), "utf-8")
