"""The Grafana dashboard and the alerts: every expression asks for what our processes really tell Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import promql_parser
import pytest
import yaml
from backpack_serving.observability import exposition, metrics

from tests.conftest import free_port
from tests.e2e.conftest import copy, running

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "backpack.json"
RULES = DEPLOY / "prometheus" / "rules.yml"


def _panels() -> Iterator[tuple[str, str]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "5s").replace("$installation", ".+")
            yield panel["title"], expression


def _alerts() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def _asked(expression: str) -> set[str]:
    """The names of the series that an expression reads."""
    found: set[str] = set()

    def note(node: Any) -> bool:
        selector = getattr(node, "vector_selector", node)
        if isinstance(selector, promql_parser.VectorSelector):
            found.add(selector.name)
        return True

    promql_parser.walk(promql_parser.parse(expression), note)
    assert found, expression
    return found


@pytest.mark.parametrize(("title", "expression"), [*_panels(), *_alerts()])
def test_an_expression_asks_for_metrics_that_there_are(title: str, expression: str) -> None:
    assert _asked(expression) <= metrics.names(), title


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    def base(name: str) -> str:
        return re.sub("_(bucket|sum|count|total)$", "", name)

    shown = {base(name) for _, expression in _panels() for name in _asked(expression)}
    assert {base(name) for name in metrics.names() if name.startswith("backpack_")} <= shown


def test_a_single_error_that_is_an_alert_is_counted_from_zero() -> None:
    """Of a series that begins at 1, `increase` is 0: the first damage, often the only one, told nobody."""
    asked = re.search('reason=~"(.*?)"', dict(_alerts())["BackpackDamage"])
    assert asked
    told = metrics.Metrics()
    told.calls("gateway")
    for reason in asked[1].split("|"):
        labels = {"part": "gateway", "reason": reason}
        assert told.registry.get_sample_value("backpack_errors_total", labels) == 0, reason


def test_every_panel_is_of_the_chosen_installations_alone() -> None:
    """A cluster's Prometheus has the processes of all that runs there."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            series = re.findall(r"(?:backpack|process)_\w+(.{0,14})", target["expr"])
            assert set(series) == {"{installation="}, target["expr"]


def test_panels_lie_side_by_side() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool isn't installed: apt install prometheus")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    shutil.copy(RULES, tmp_path)
    shutil.copy(Path(__file__).parent / "rules_test.yml", tmp_path)
    shutil.copy(DEPLOY / "prometheus" / "prometheus.yml", tmp_path)
    for command in ("check config prometheus.yml", "test rules rules_test.yml"):
        done = subprocess.run(["promtool", *command.split()], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = {
        t["alertname"]
        for group in yaml.safe_load((tmp_path / "rules_test.yml").read_text())["tests"]
        for t in group["alert_rule_test"]
    }
    assert tested == {name for name, _ in _alerts()}, "every alert has a test"


async def _ask(port: int, expression: str) -> list[Any]:
    def get() -> Any:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=30) as answer:
            return json.load(answer)

    answer = await asyncio.to_thread(get)
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


@pytest.mark.skipif(not shutil.which("prometheus"), reason="no Prometheus here: apt install prometheus")
async def test_every_panel_shows_something_of_a_loaded_system(tmp_path: Path) -> None:
    async with running(tmp_path / "state", slots=4) as system:
        assert system.metrics is not None
        address = exposition.listen(system.metrics.registry, "127.0.0.1:0")
        targets = {"targets": [address], "labels": {"installation": "here"}}
        scraped = {"job_name": "backpack", "static_configs": [targets]}
        config = tmp_path / "prometheus.yml"
        config.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [scraped]}))
        port = free_port()
        prometheus = subprocess.Popen(  # not asyncio's: see tests.commands
            [
                "prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
            ]
        )  # fmt: skip
        try:
            key = await system.tenant(copy("king", "ship"))
            empty: list[str] = []
            for _ in range(60):  # under load until every panel has something, or for a minute
                await asyncio.gather(*(system.stream(key, "The story of the king", max_tokens=8) for _ in range(4)))
                with pytest.raises(grpc.aio.AioRpcError):
                    await system.stream(key, "", max_tokens=8)
                await asyncio.sleep(0.5)
                try:
                    empty = [title for title, expression in _panels() if not await _ask(port, expression)]
                except OSError:
                    continue  # Prometheus is still starting
                if not empty:
                    return
            raise AssertionError(f"nothing to see: {empty}")
        finally:
            prometheus.terminate()
            await asyncio.to_thread(prometheus.wait)


def test_the_guide_says_what_to_do_for_every_alert() -> None:
    guide = (DEPLOY.parent / "docs" / "operating.md").read_text()
    assert set(re.findall(r"^\| (Backpack\w+) \|", guide, re.M)) == {name for name, _ in _alerts()}
