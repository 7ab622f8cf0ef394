from pathlib import Path

import pytest
import yaml

from cluster.config import Config, yaml_file
from cluster.config.file import load_config
from cluster.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "deepsplit.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text))
    return str(caught.value).splitlines()[1:]


def test_reads_a_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: {path: /m/v3}\nexperts: {workers: 3, shares: [3, 2.5, 1]}\n"))
    assert config.model.path == Path("/m/v3")
    assert config.experts.worker_shares() == (3, 2.5, 1)
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_relative_model_path_is_from_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", "model: {path: ../models/demo}")
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("a/deepsplit.yaml"))
    assert config.model.path == tmp_path / "a" / "../models/demo"
    assert config.model.path.is_absolute()


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
model:
  path: m
attention:
  replica: 1
  replicas: two
experts:
  workers: 3
  workers: 2
  device: tpu
gateway: 8000
dispatch: {placement: {}}
workers: 3
"""
    assert problems(tmp_path, text) == [
        "  line 4: attention.replica: unknown key; did you mean attention.replicas?",
        "  line 5: attention.replicas: must be a whole number, but is 'two'",
        "  line 8: experts.workers: set twice; the first is on line 7, keep one",
        "  line 9: experts.device: must be one of cpu or cuda, but is 'tpu'",
        "  line 10: gateway: must be a section of `key: value` lines, but is 8000",
        "  line 11: dispatch.placement: unknown key; did you mean attention.placement or experts.placement "
        "or experts.pools.placement or gateway.placement?",
        "  line 12: workers: unknown key; did you mean experts.workers or experts.pools.workers?",
    ]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("experts: {workers: 2, shares: [1, 2, 3]}", "experts.shares: has 3 entries, but experts.workers is 2"),
        ("experts: {shares: [1, 0]}", "experts.shares: every share must be above 0, but they are [1.0, 0.0]"),
        ("experts: {shares: [1, .inf]}", "experts.shares[1]: must be a finite number, but is inf"),
        ("experts: {shares: 3}", "experts.shares: must be a list, such as [3, 1], but is 3"),
        ("experts: {replicas_per_expert: 3}", "experts.replicas_per_expert: 3 copies of each expert need as many"),
        ("dispatch: {call_timeout_s: 90}", "dispatch.call_timeout_s: must be below dispatch.dispatch_timeout_s (90.0)"),
        ("dispatch: {dispatch_timeout_s: 40}", "dispatch.uncovered_timeout_s: must not be above dispatch.dispatch_"),
        ("experts: {heartbeat_timeout_s: 0.1}", "experts.heartbeat_timeout_s: must be above experts.heartbeat_int"),
        ("attention: {engine_args: {load_format: dummy}}", "attention.engine_args.load_format: cannot be set here"),
        ("attention: {max_num_seqs: 0}", "attention.max_num_seqs: must be at least 1, but is 0"),
        ("gateway: {port: 70000}", "gateway.port: must be at most 65535, but is 70000"),
        ("gateway: {host: [a]}", "gateway.host: must be text, but is a list"),
        ("experts: {placement: {num_cpus: many}}", "experts.placement.num_cpus: must be a number, but is 'many'"),
        ("experts: {max_per_node: many}", "experts.max_per_node: must be a whole number"),
        ("experts: {threads:}", "experts.threads: must be a whole number, but is empty"),
        ("experts: {pin_cores: true}", "experts.pin_cores: must be one of auto, always or never, but is True"),
        ("experts: {pin_cores: always, device: cuda}", "experts.pin_cores: is always, but these workers compute on"),
        ("experts: {workers: 1, pools: [{name: a, workers: 1, device: cuda, pin_cores: always}]}",
         "experts.pools[0].pin_cores: is always, but this pool computes on GPUs: leave it out"),
        ("experts: {workers: 1, pin_cores: never, pools: [{name: a, workers: 1}]}", "experts.pin_cores: is set per"),
        ("attention: {pin_cores: always}", "attention.pin_cores: is always, but the number of cores is not set: set"),
        ("attention: {pin_cores: always, device: cuda}", "attention.pin_cores: is always, but attention runs on GPUs"),
        ("zzz: 1", "zzz: unknown key; valid here: admission, attention, dispatch, experts, gateway, internal_tls, "),
        ("gateway: {host: 0.0.0.0}", "gateway.host: 0.0.0.0 can be reached from other machines, but there are no API"),
        ("gateway: {grpc_port: 8000}", "gateway.grpc_port: is gateway.port (8000) too"),
        ("gateway: {max_body_mib: 600}", "gateway.max_bodies_mib: 512 is below gateway.max_body_mib (600), so the"),
        ("gateway: {max_bodies_mib: 0}", "gateway.max_bodies_mib: must be at least 1, but is 0"),
        ("gateway: {max_sequences: 0}", "gateway.max_sequences: must be at least 1, but is 0"),
        ("gateway: {idle_timeout_s: 0}", "gateway.idle_timeout_s: must be above 0"),
        ("gateway: {first_request_timeout_s: 0}", "gateway.first_request_timeout_s: must be above 0"),
        ("gateway: {write_stall_s: 0}", "gateway.write_stall_s: must be above 0"),
        ("gateway: {stream_idle_timeout_s: 0}", "gateway.stream_idle_timeout_s: must be above 0"),
        ("gateway: {connection_max_age_s: .inf}", "gateway.connection_max_age_s: must be a finite number"),
        ("gateway: {sse_comment_interval_s: 0}", "gateway.sse_comment_interval_s: must be above 0"),
        ("gateway: {cors_origins: https://a.b}", "gateway.cors_origins: must be a list, such as [a, b], but is 'h"),
        ('gateway: {cors_origins: ["*", "https://a.b"]}', 'gateway.cors_origins: "*" allows every origin: leave the'),
        ("gateway: {cors_origins: [https://a.b/]}", "gateway.cors_origins[0]: 'https://a.b/' is not an origin as"),
        ("gateway: {cors_origins: [a.b]}", "gateway.cors_origins[0]: 'a.b' is not an origin as browsers send it"),
        ("gateway: {cors_origins: [https://a.b:443]}", "gateway.cors_origins[0]: 'https://a.b:443' is not an origin"),
        ("gateway: {cors_origins: [https://A.b]}", "gateway.cors_origins[0]: 'https://A.b' is not an origin"),
        ("gateway: {tls: {cert_file: a}}", "gateway.tls.key_file: missing; it must be set"),
    ],
)
def test_wording(tmp_path: Path, section: str, expected: str) -> None:
    (problem,) = problems(tmp_path, f"model: {{path: m}}\n{section}\n")
    assert problem.startswith(f"  line 2: {expected}")


def test_model_path_missing(tmp_path: Path) -> None:
    assert problems(tmp_path, "model: {name: x}") == ["  line 1: model.path: missing; it must be set"]
    assert problems(tmp_path, "ray: {}") == ["  model: missing; it must be set"]


def test_section_with_every_key_commented_out(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: {path: /m}\nexperts:\n  # workers: 3\n"))
    assert config.experts.workers == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty: it needs at least"),
        ("# only a comment\n", "is empty"),
        ("- a\n", ":1: expected sections such as `model:`, found a list"),
        ("model:\n  path: [\n", ":3:1: not valid YAML"),
        ("model:\n\tpath: m\n", ":2:1: not valid YAML"),
        ("model: !!python/object:os.system {}\n", ":1:8: not valid YAML"),
    ],
)
def test_not_a_mapping(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


def test_file_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*nope.yaml: No such file"):
        load_config(tmp_path / "nope.yaml")


def test_file_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "x.yaml")


def test_relative_paths_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: {path: m}\n"
        "gateway: {host: 0.0.0.0, keys_file: keys.yaml, tls: {cert_file: tls/c.pem, key_file: /abs/k.pem}}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert config.gateway.keys_file == tmp_path / "keys.yaml"
    assert config.gateway.tls is not None
    assert (config.gateway.tls.cert_file, config.gateway.tls.key_file) == (tmp_path / "tls/c.pem", Path("/abs/k.pem"))


def test_prompts_in_the_log_need_the_level_that_writes_them(tmp_path: Path) -> None:
    text = "model: {path: m}\nlogging:\n  format: json\n  prompts: true\n"
    (problem,) = problems(tmp_path, text)
    assert problem.startswith("  line 4: logging.prompts: request bodies are debug lines")
    config = load_config(write(tmp_path, text + "  level: debug\n"))
    assert config.logging.of_serve == {"encoding": "JSON", "log_level": "INFO", "enable_access_log": False}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("{path: m, aliases: [a, a]}", "model.aliases[1]: 'a' is listed twice: keep one"),
        ("{path: /x/m, aliases: [m]}", "model.aliases[0]: 'm' is the model's name already: leave it out"),
        ("{path: m, name: n, aliases: [b, n]}", "model.aliases[1]: 'n' is the model's name already: leave it out"),
        ('{path: m, aliases: [""]}', "model.aliases[0]: is empty: give a name, or leave it out"),
        ("{path: m, aliases: gpt}", "model.aliases: must be a list, such as [a, b], but is 'gpt'"),
    ],
)
def test_every_alias_is_a_name_of_its_own(tmp_path: Path, model: str, expected: str) -> None:
    assert problems(tmp_path, f"model: {model}\n") == [f"  line 1: {expected}"]


def test_what_lists_of_names_and_origins_may_hold(tmp_path: Path) -> None:
    origins = "[https://chat.example.com, http://localhost:3000, app://obsidian.md, 'http://[::1]:8080']"
    config = load_config(
        write(tmp_path, f"model: {{path: m, name: n, aliases: [m, gpt-4o]}}\ngateway: {{cors_origins: {origins}}}\n")
    )
    assert config.model.aliases == ("m", "gpt-4o")
    assert len(config.gateway.cors_origins) == 4
    text = 'model: {path: m}\ngateway: {cors_origins: ["*"], sse_comment_interval_s: null}\n'
    config = load_config(write(tmp_path, text))
    assert (config.gateway.cors_origins, config.gateway.sse_comment_interval_s) == (("*",), None)


@pytest.mark.parametrize("loader", [yaml.SafeLoader, yaml.CSafeLoader])
def test_every_yaml_loader_tells_lines_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: type[yaml.SafeLoader]
) -> None:
    monkeypatch.setattr(yaml_file, "_FASTEST", loader)
    text = "model: {path: m,\n  nme: x}\n# no\nexperts:\n  workers: &n 3\n  shares: [1, 2,\n    zero]\n"
    text += "ray: {num_cpus: *n}\n"
    assert problems(tmp_path, text) == [
        "  line 2: model.nme: unknown key; did you mean model.name?",
        "  line 7: experts.shares[2]: must be a number, but is 'zero'",
    ]
    tab = write(tmp_path, "model:\n\tpath: m\n")
    with pytest.raises(ConfigError, match=r":2:1: not valid YAML: .*\(indent with spaces\)"):
        load_config(tab)
