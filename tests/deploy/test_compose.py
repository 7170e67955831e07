"""docker-compose.yml and the Dockerfile, read by the tools that read them: what they promise, in sentences."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from backpack_serving.auth.keys import ApiKeySecret
from backpack_serving.cli import secrets
from backpack_serving.settings import Settings
from packaging.requirements import Requirement
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
DATABASE = "postgres:5432/backpack"
PROCESSES = {"gateway", "http", "inference", "interventions", "migrations"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file as Compose itself resolves it."""
    command = [BIN / "docker-compose", "--profile", "setup", "config", "--format", "json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BACKPACK_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def _ours(compose: dict[str, Any]) -> dict[str, Any]:
    return {name: s for name, s in compose["services"].items() if "build" in s}


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_process_is_a_target_and_runs_as_nobody_special() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.M)[1:]
    by_name = {m[1]: stage for stage in stages if (m := re.match(r"\S+ AS (\S+)", stage))}
    assert "compileall" in by_name["python"], "or every health check compiles what it loads of Python's library"
    assert by_name.keys() >= PROCESSES
    for name in PROCESSES:
        base = "process" if name == "inference" else "service"
        assert by_name[name].startswith(f"{base} AS")
        assert re.findall(r"^USER (\S+)", by_name[base] + by_name[name], re.M)[-1] == "10001"
        assert ("HEALTHCHECK" in by_name[name]) == (name != "migrations"), "what serves has a probe"
    for name, packages in (("service", "services"), ("inference", "engine")):
        theirs, ours = (by_name[name].index(f"from={stage}") for stage in (packages, "ours"))
        assert theirs < ours, "so that a release needn't bring other people's packages again"


def test_each_process_is_stopped_by_the_signal_that_it_drains_on(compose: dict[str, Any]) -> None:
    """Kubernetes sends what the image names, and Ray drains a node on SIGTERM only; `serve run` obeys SIGINT only."""
    assert not re.search(r"^STOPSIGNAL", DOCKERFILE.read_text(), re.M)
    signals = {name: service.get("stop_signal", "SIGTERM") for name, service in _ours(compose).items()}
    assert {name for name, signal in signals.items() if signal != "SIGTERM"} == {"inference"}
    assert signals["inference"] == "SIGINT"


@pytest.mark.parametrize(
    "module", ["gateway.bootstrap", "http.bootstrap", "interventions.bootstrap", "interventions.postgres", "cli.main"]
)
def test_what_the_small_images_run_is_installed_there(module: str) -> None:
    """They have our dependencies, PostgreSQL's driver and OpenTelemetry: with nothing else it can be imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    there = _with_dependencies([*project["dependencies"], *extras["postgres"], *extras["otel"]])
    homes = {name: set(map(_canonical, found)) for name, found in metadata.packages_distributions().items()}
    missing = {name for name, found in homes.items() if not found & {*there, _canonical(project["name"])}}
    assert {"torch", "ray", "numpy"} <= missing
    program = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import backpack_serving.{module}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _with_dependencies(requirements: list[str]) -> set[str]:
    """Names of distributions, with all that they need in turn."""
    found: set[tuple[str, str]] = set()

    def visit(line: str, extra: str = "") -> None:
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": extra}):
            return
        for wanted in ("", *needed.extras):
            if (needed.name, wanted) not in found:
                found.add((needed.name, wanted))
                for below in metadata.requires(needed.name) or []:
                    visit(below, wanted)

    for line in requirements:
        visit(line)
    return {_canonical(name) for name, _ in found}


def test_images_and_files_name_settings_that_exist(compose: dict[str, Any]) -> None:
    text = DOCKERFILE.read_text() + json.dumps(compose) + (ROOT / "deploy" / "ray" / "serve.yaml").read_text()
    named = {name.lower() for name in re.findall(r"BACKPACK_([A-Z_]+)", text)}
    assert named
    assert named <= Settings.model_fields.keys()


def test_one_model_is_served_by_all_who_read_it(compose: dict[str, Any]) -> None:
    for name in ("gateway", "http", "inference", "interventions"):
        service = compose["services"][name]
        (mount,) = (v for v in service["volumes"] if v["target"] == "/model")
        assert service["environment"]["BACKPACK_MODEL"] == mount["target"], name
        assert (mount["type"], mount["read_only"]) == ("bind", True)
        assert Path(mount["source"]) == ROOT / "models" / "weights" / "micro"


def test_only_clients_and_people_get_in_and_only_from_this_machine(compose: dict[str, Any]) -> None:
    published = {
        name: {(p["host_ip"], p["published"]) for p in service["ports"]}
        for name, service in compose["services"].items()
        if service.get("ports")
    }
    assert published == {
        "gateway": {("127.0.0.1", "8470")},
        "interventions": {("127.0.0.1", "8471")},
        "http": {("127.0.0.1", "8480")},
        "grafana": {("127.0.0.1", "3000")},
    }
    assert compose["networks"]["inside"]["internal"] is True
    for name in compose["services"].keys() - published.keys() - {"secrets"}:
        assert list(compose["services"][name]["networks"]) == ["inside"], name


def test_our_processes_have_no_privileges(compose: dict[str, Any]) -> None:
    assert {s["build"]["target"] for s in _ours(compose).values()} == PROCESSES
    for name, service in _ours(compose).items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("read_only", False) == (name != "inference"), name


def test_no_log_fills_the_disk(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
    assert re.search(r"^ENV .*RAY_ROTATION_MAX_BYTES=\d+ ", DOCKERFILE.read_text(), re.M), "replicas' in Ray's"


def test_images_of_others_have_versions(compose: dict[str, Any]) -> None:
    others = [s["image"] for s in compose["services"].values() if "build" not in s]
    assert len(others) == 3
    assert all(re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.?\d*[a-z-]*", image) for image in others), others


def test_no_password_is_written_anywhere(compose: dict[str, Any]) -> None:
    made = secrets.make(DATABASE)
    assert {name: s["file"] for name, s in compose["secrets"].items()} == {
        name: str(ROOT / "var" / "secrets" / name) for name in made
    }
    for name, service in compose["services"].items():
        for variable in service.get("environment") or {}:
            assert "PASSWORD" not in variable or variable.endswith("_FILE"), (name, variable)
            assert not variable.endswith(("_KEY", "DATABASE")), (name, variable)
    assert len(set(made.values()) & set(secrets.make(DATABASE).values())) == 0, "new ones every time"


def test_who_has_which_secret(compose: dict[str, Any]) -> None:
    has = {
        name: {s["source"] for s in service["secrets"]}
        for name, service in compose["services"].items()
        if service.get("secrets")
    }
    assert has == {
        "postgres": {"database_owner_password", "database_service_password"},
        "migrations": {"owner_database"},
        "interventions": {"backpack_database", "backpack_admin_key", "backpack_service_key"},
        "inference": {"backpack_service_key"},
        "gateway": {"backpack_service_key"},
        "grafana": {"grafana_password"},
    }


def test_grafana_and_prometheus_find_each_other_and_the_processes(compose: dict[str, Any]) -> None:
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (job,) = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    scraped = {name for found in job["dns_sd_configs"] for name in found["names"]}
    assert scraped == PROCESSES - {"migrations"}
    assert all("inside" in compose["services"][name]["networks"] for name in (*scraped, "prometheus", "grafana"))


# ---- backpack secrets


def _make_secrets(folder: Path, *options: str) -> Result:
    from backpack_serving.cli.main import app

    return CliRunner().invoke(app, ["secrets", str(folder), *options])


def test_secrets_are_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    made = _make_secrets(folder)
    assert (made.exit_code, f"made {len(secrets.make(DATABASE))} secrets" in made.output) == (0, True), made.output
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = {file.name: file.read_text() for file in folder.iterdir()}
    again = _make_secrets(folder)
    assert (again.exit_code, "found" in again.output) == (0, True)
    assert {file.name: file.read_text() for file in folder.iterdir()} == before

    # They are settings where they are mounted, and keys of ours.
    settings = Settings(_secrets_dir=folder)
    assert settings.database == before["backpack_database"]
    assert str(ApiKeySecret.parse(settings.key_for("admin"))) == before["backpack_admin_key"]
    assert settings.key_for("replica") == before["backpack_service_key"]
    assert before["database_service_password"] in settings.database
    assert before["database_owner_password"] in before["owner_database"]


def test_secrets_have_a_folder_of_their_own(tmp_path: Path) -> None:
    """A folder with other files was closed to everybody else, and all of it went into the Secret."""
    tmp_path.chmod(0o755)
    (tmp_path / "notes.txt").write_text("mine")
    refused = _make_secrets(tmp_path)
    assert (refused.exit_code, "notes.txt, which is no secret" in " ".join(refused.output.split())) == (1, True)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("place", ["db example/backpack", "db.example", "me@db/backpack", "postgresql://db/backpack"])
def test_secrets_of_a_database_that_can_not_be_are_refused(tmp_path: Path, place: str) -> None:
    refused = _make_secrets(tmp_path / "s", "--database", place)
    assert (refused.exit_code, "HOST:PORT/NAME" in refused.output) == (1, True), refused.output
    assert not (tmp_path / "s").exists()


def test_secrets_of_another_database_are_not_taken_for_those_asked_for(tmp_path: Path) -> None:
    for _ in range(2):
        made = _make_secrets(tmp_path, "--database", "[fd00::1]:5432/backpack?sslmode=require")
        assert made.exit_code == 0, made.output
    refused = _make_secrets(tmp_path, "--database", "db.example/backpack")
    assert (refused.exit_code, "another database than" in refused.output) == (1, True), refused.output


def test_half_of_the_secrets_are_not_completed_in_silence(tmp_path: Path) -> None:
    _make_secrets(tmp_path)
    (tmp_path / "backpack_database").unlink()
    refused = _make_secrets(tmp_path)
    assert refused.exit_code == 1
    assert "only some of the secrets; bring back backpack_database, or empty it" in " ".join(refused.output.split())
    assert not (tmp_path / "backpack_database").exists()


def test_the_service_role_is_made_by_a_script_that_the_shell_can_read() -> None:
    script = ROOT / "deploy" / "postgres" / "service_role.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    shell = shutil.which("sh")
    assert shell
    assert subprocess.run([shell, "-n", script], check=False).returncode == 0
    assert f"CREATE ROLE {secrets.SERVICE} LOGIN" in script.read_text()
