"""Exact: the files of deploy/ parse, and name nothing that the server does not have."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from onebit.engine.diversity import LEAST_TOKENS

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
METRIC = re.compile(r"\bonebit_[a-z0-9_]+")


@pytest.fixture(scope="module")
def figures(server):
    """All that /metrics has after one answer: {name: labels}."""
    body = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 8 * LEAST_TOKENS, "seed": 3}
    server.service.served[1].runner.engine.probe_every = 5
    server.post("/v1/completions", body)
    server.wait_for(lambda: server.figure("entropy_nats_count") > 0)
    server.wait_for(lambda: server.figure("kv_entropy_bits_count") > 0)
    found = {}
    for line in server.get("/metrics").text.splitlines():
        if match := re.match(r"(onebit_\w+)(?:\{(.*)\})? ", line):
            found[match[1]] = set(re.findall(r'(\w+)="', match[2] or "")) | {"instance", "job"}
    return found


def rules():
    groups = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels():
    return json.loads((DEPLOY / "grafana.json").read_text("utf-8"))["panels"]


def expressions():
    return [rule["expr"] for rule in rules()] + [t["expr"] for panel in panels() for t in panel["targets"]]


@pytest.mark.parametrize("expression", expressions())
def test_expressions_name_metrics_and_labels_that_exist(expression, figures):
    assert expression.count("(") == expression.count(")")
    names = METRIC.findall(expression)
    assert names or expression.startswith("up{")
    for name in names:
        assert name in figures
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", expression):
        if name in figures:
            assert set(re.findall(r"(\w+)=", matchers)) <= figures[name]
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        assert set(labels.split(", ")) <= set.union(*(figures[name] for name in names))


def test_the_page_reads_metrics_that_exist(figures):
    script = (ROOT / "src/onebit/serve/static/dashboard.js").read_text("utf-8")
    for name in METRIC.findall(script):
        assert any(name + ending in figures for ending in ("", "_bucket", "_sum")), name


def test_alerts_are_complete():
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found) > 8
    for rule in found:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


@pytest.mark.skipif(
    not shutil.which("promtool"), reason="left out: promtool is not here (apt install prometheus)"
)
def test_alerts_fire_where_they_should():
    result = subprocess.run(
        ["promtool", "test", "rules", Path(__file__).with_name("alerts.yml")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_an_example_that_fires_and_one_that_does_not():
    examples = yaml.safe_load(Path(__file__).with_name("alerts.yml").read_text("utf-8"))["tests"]
    asked = [
        (one["alertname"], bool(one.get("exp_alerts"))) for e in examples for one in e["alert_rule_test"]
    ]
    assert set(asked) == {(rule["alert"], fires) for rule in rules() for fires in (True, False)}


def test_the_dashboard_imports():
    dashboard = json.loads((DEPLOY / "grafana.json").read_text("utf-8"))
    asked = {given["name"] for given in dashboard["__inputs"]}
    used = set(re.findall(r"\$\{(\w+)\}", json.dumps(dashboard)))
    assert used == asked
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r'"\$(\w+)\\?"', " ".join(expressions()))) == variables
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def unit():
    parser = configparser.ConfigParser(strict=False)
    parser.optionxform = str
    parser.read(DEPLOY / "onebit.service")
    return parser["Service"]


def commands():
    recipe = (DEPLOY / "Containerfile").read_text("utf-8")
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", recipe, re.MULTILINE)[1])
    return [entry, shlex.split(unit()["ExecStart"])]


@pytest.mark.parametrize("command", commands(), ids=["container", "unit"])
def test_commands_use_options_that_exist(command):
    from typer.main import get_command

    from onebit.cli import app

    serve = get_command(app).get_command(None, "serve")
    known = {option for parameter in serve.params for option in parameter.opts}
    assert Path(command[0]).name == "onebit" and command[1] == "serve"
    assert {word for word in command if word.startswith("--")} <= known


def test_the_unit_has_as_many_threads_as_cores():
    first, last = unit()["CPUAffinity"].split("-")
    text = (DEPLOY / "onebit.service").read_text("utf-8")
    assert f"ONEBIT_THREADS={int(last) - int(first) + 1}\n" in text


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="left out: systemd-analyze is not here")
def test_systemd_understands_the_unit(tmp_path):
    text = (DEPLOY / "onebit.service").read_text("utf-8")
    # The program must exist.
    copy = tmp_path / "onebit.service"
    copy.write_text(text.replace("/opt/onebit/bin/onebit", "/bin/true"))
    result = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    complaints = [line for line in result.stderr.splitlines() if "onebit.service" in line]
    assert complaints == []
