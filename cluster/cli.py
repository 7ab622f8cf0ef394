"""The command `deepsplit`. Imports neither Ray nor torch: what needs them runs in other processes."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import click

from cluster.config.file import load_config
from cluster.errors import DeepsplitError, StartupError
from cluster.keys.api_keys import key_hash, new_key
from cluster.keys.editor import add_key, snippet
from cluster.keys.file import tenant_name_fault
from cluster.launch.launcher import BUILDER, down, up, up_detached
from cluster.launch.running import grpc_target, rest_url, restart_experts, scale, status
from cluster.launch.state import ClusterState, StateFolder
from cluster.launch.supervisor import Stopped
from cluster.plan.bandwidth import bandwidth_gb_per_s
from cluster.plan.checks import check_files, check_model, load_model, plan_for, validate
from cluster.plan.host_cores import this_host
from cluster.plan.plan import to_json
from cluster.plan.step_time import GFLOP_PER_S, HostSpeed
from cluster.plan.text import plan_text

_DEFAULTS = (Path("deepsplit.yaml"), Path("examples/local.yaml"))
_NETWORK_GB_PER_S = 1.25
_SPEED = click.FloatRange(0, min_open=True)
_CONFIG = click.Path(path_type=Path, dir_okay=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Serves DeepSeek-V3-class models with attention and experts in different processes."""


@cli.command("up")
@click.argument("config_file", metavar="[CONFIG]", type=_CONFIG, required=False)
@click.option("--detach", is_flag=True, help="Return when ready and leave the cluster running.")
@click.option("--builder", default=BUILDER, hidden=True, help="Import string of the application's builder.")
def up_command(config_file: Path | None, detach: bool, builder: str) -> None:
    """Start everything that CONFIG describes and stay; Ctrl-C stops it.

    Without CONFIG it is deepsplit.yaml here, or else examples/local.yaml here.
    """
    path = config_file or _default_config()
    config = load_config(path)
    for _ in check_files(config, time.time()):
        pass
    check_model(config)
    start = up_detached if detach else up
    start(config, StateFolder(), _print_addresses, builder)


@cli.command("validate")
@click.argument("config_file", metavar="CONFIG", type=_CONFIG)
def validate_command(config_file: Path) -> None:
    """Check CONFIG, keys and certificates, the model's config.json and index, and its shards if they are there."""
    for checked in validate(load_config(config_file), time.time()):
        click.echo(f"ok  {checked}")


@cli.command("plan")
@click.argument("config_file", metavar="CONFIG", type=_CONFIG)
@click.option("--nodes", "nodes_file", metavar="FILE", type=_CONFIG, help="YAML list of the nodes that there are.")
@click.option("--cores", type=click.IntRange(1), help="Cores of a host; this one's without.")
@click.option("--bandwidth", type=_SPEED, metavar="GB/S", help="Memory bandwidth of a host; this one's is measured.")
@click.option("--network", type=_SPEED, metavar="GB/S", help="Network of a host, each way; 1.25 without (10 Gbit/s).")
@click.option("--gflops", type=_SPEED, metavar="GFLOP/S", help="Matrix products of a core; 400 without (AVX-512).")
@click.option("--json", "as_json", is_flag=True, help="All of it, as JSON, sizes in bytes.")
def plan_command(
    config_file: Path, nodes_file: Path | None, cores: int | None, bandwidth: float | None, network: float | None,
    gflops: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Show what CONFIG would run where, memory, traffic, whether it fits, and what a decode step would take.

    Without --nodes, a local cluster is held against this machine's free memory. Steps are estimated for hosts like this
    one, unless the options say what another has.
    """
    config = load_config(config_file)
    spec = load_model(config)[0]
    here = len(this_host().all)
    speed = HostSpeed(
        cores or here, bandwidth or bandwidth_gb_per_s(here), gflops or GFLOP_PER_S,
        None if config.ray.address is None and nodes_file is None else network or _NETWORK_GB_PER_S,
    )  # fmt: skip
    plan = plan_for(config, spec, nodes_file, speed)
    click.echo(to_json(plan) if as_json else plan_text(plan))
    plan.check()


@cli.command("status")
@click.option("--json", "as_json", is_flag=True, help="All of it, as JSON.")
def status_command(as_json: bool) -> None:
    """Show what runs, where, and who holds which experts."""
    report = status(StateFolder())
    click.echo(json.dumps(report, indent=2) if as_json else _table(report))


@cli.command("scale")
@click.argument("wanted", metavar="ROLE=NUMBER...", nargs=-1, required=True)
@click.option("--timeout", "wait_s", default=600.0, metavar="SECONDS", help="How long to wait; 600 if not set.")
def scale_command(wanted: tuple[str, ...], wait_s: float) -> None:
    """Have another number of expert workers or attention replicas, without a pause: experts=4 attention=2.

    Where experts.pools has several, each has its own number: experts.NAME=4.

    It lasts until the cluster is stopped; the configuration says what the next one starts with.
    """
    scale(StateFolder(), _roles(wanted), wait_s, lambda text: click.echo(text, err=True))


@cli.command("restart")
@click.argument("role", type=click.Choice(["experts"]))
@click.option("--timeout", "wait_s", default=600.0, metavar="SECONDS", help="How long to wait; 600 if not set.")
def restart_command(role: str, wait_s: float) -> None:
    """Replace every expert worker by a new process, one after the other, without a pause."""
    restart_experts(StateFolder(), wait_s, lambda text: click.echo(text, err=True))


def _roles(wanted: tuple[str, ...]) -> dict[str, int]:
    roles: dict[str, int] = {}
    for one in wanted:
        role, _, number = one.partition("=")
        known = role in ("experts", "attention") or (role.startswith("experts.") and role != "experts.")
        if not known or not number.isdecimal() or int(number) < 1 or role in roles:
            raise click.BadParameter(f"{one!r} is not one of experts=NUMBER, experts.POOL=NUMBER and attention=NUMBER, "
                                     f"each at most once, NUMBER at least 1", param_hint="ROLE=NUMBER")  # fmt: skip
        roles[role] = int(number)
    return roles


@cli.group("key")
def key_group() -> None:
    """API keys of the gateway's tenants."""


@key_group.command("new")
@click.option("--tenant", metavar="NAME", required=True, help="Whose key it is; a new tenant has no limits yet.")
@click.option("--keys-file", metavar="FILE", type=_CONFIG, help="Add the key's hash to this file (mode 0600).")
def key_new_command(tenant: str, keys_file: Path | None) -> None:
    """Make an API key and print it, this once. Keys files hold its hash only; a gateway follows its file."""
    fault = tenant_name_fault(tenant)
    if fault is not None:
        raise click.BadParameter(f"{tenant!r} {fault}", param_hint="--tenant")
    key = new_key()
    if keys_file is not None and add_key(keys_file, tenant, key_hash(key)):
        click.echo(f"added to {keys_file}; the key, which is shown only now:", err=True)
    else:
        where = f"{keys_file} is not laid out so that a key can be added to it; " if keys_file else ""
        click.echo(f"{where}put this below `tenants:` in the keys file:\n", err=True)
        click.echo(snippet(tenant, key_hash(key)), err=True)
        click.echo("The key, which is shown only now:", err=True)
    click.echo(key)


@cli.command("down")
def down_command() -> None:
    """Stop the cluster; of a cluster that was joined, only the application."""
    click.echo("stopped" if down(StateFolder()) else "nothing is running")


def _default_config() -> Path:
    for path in _DEFAULTS:
        if path.exists():
            click.echo(f"using {path}", err=True)
            return path
    raise StartupError("no CONFIG given and no deepsplit.yaml here: run `deepsplit up CONFIG`")


def _print_addresses(state: ClusterState) -> None:
    """What the user needs once all is ready; on stdout."""
    config = state.parsed_config()
    url = rest_url(config)
    body = {"model": config.model.served_name, "prompt": "def fibonacci(n):", "max_tokens": 48, "temperature": 0}
    click.echo(f"\nREST      {url}/v1")
    if (target := grpc_target(config)) is not None:
        click.echo(f"gRPC      {target}")
    click.echo(f"Ray       {state.address}")
    if state.root:
        click.echo(f"logs      {state.root}/session_latest/logs")
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.gateway.keys_file else ""
    json_type = "-H 'Content-Type: application/json'"
    click.echo(f"\n  curl -s {url}/v1/completions{key} {json_type} -d {shlex.quote(json.dumps(body))}\n")
    sys.stdout.flush()


def _table(report: dict[str, object]) -> str:
    lines = [f"model      {report['model']} ({report['state']})", f"placement  epoch {report['placement_epoch']}"]
    for role in ("attention", "experts"):
        processes = report[role]
        assert isinstance(processes, list)
        for process in processes:
            held = process.get("experts", {})
            span = f"{sum(map(len, held.values()))} experts in {len(held)} layers, {process['address']}" if held else ""
            lines.append(
                f"{role:<10} {process['id']}  pid {process['pid']}  node {process['node']}  {process['state']}  {span}"
            )
            lines += [f"{'':<10} {process[said]}" for said in ("cores", "form") if process.get(said)]
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    """Entry point: every expected error is one message on stderr and exit code 1."""
    try:
        cli(standalone_mode=False)
    except DeepsplitError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)


if __name__ == "__main__":
    main()
