from pathlib import Path

import pytest

from exo.worker.protocol.remote_host import HostsError, RemoteHost, account, host_of, read_hosts

GUARDED = ("-m", "exo.worker.guard")


def hosts_in(tmp_path: Path, text: str) -> tuple[RemoteHost, ...]:
    (tmp_path / "hosts.toml").write_text(text)
    return read_hosts(tmp_path / "hosts.toml")


def test_without_a_file_there_are_no_hosts(tmp_path: Path) -> None:
    assert read_hosts(tmp_path / "hosts.toml") == ()


def test_a_name_alone_is_reached_by_ssh_and_its_loss_noticed(tmp_path: Path) -> None:
    (host,) = hosts_in(tmp_path, '[gpu2]\npython = "/opt/exo/bin/python"\n')
    words = host.command("exo.worker.runner_cuda", label="a:b")
    assert words[:2] == ("ssh", "-T")
    assert {"-oBatchMode=yes", "-oServerAliveInterval=1", "-oServerAliveCountMax=2"} <= {*words}
    command = ("/opt/exo/bin/python", *GUARDED, "--label", "a:b", "exo.worker.runner_cuda")
    assert words[-len(command) - 1 :] == ("gpu2", *command)


def test_options_of_the_user_are_kept(tmp_path: Path) -> None:
    (host,) = hosts_in(tmp_path, '[gpu2]\nrun = ["ssh", "-oServerAliveInterval=9", "-p", "2222", "me@gpu2"]\n')
    words = host.command("exo")
    assert [each for each in words if "ServerAliveInterval" in each] == ["-oServerAliveInterval=9"]
    assert words[words.index("-p") : words.index("-p") + 3] == ("-p", "2222", "me@gpu2")


def test_a_shell_at_the_other_end_gets_whole_words() -> None:
    host = RemoteHost("gpu2", ("/usr/bin/ssh", "gpu2"), "/opt/my exo/python")
    assert "'/opt/my exo/python'" in host.command("exo")


def test_another_prefix_stays_as_it_is(tmp_path: Path) -> None:
    (host,) = hosts_in(tmp_path, '[n1]\nrun = ["srun", "-w", "n1"]\npython = "/a b/python"\n')
    assert host.command("exo", "node") == ("srun", "-w", "n1", "/a b/python", *GUARDED, "exo", "node")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[gpu2", "not TOML"),
        ('[gpu2]\nrun = "ssh gpu2"', "gpu2.run"),
        ('[gpu2]\nuser = "me"', "gpu2.user"),
        ("[local]", "[local]"),
        ('["a/b"]', "[a/b]"),
        ("gpu2 = 1", "gpu2"),
    ],
)
def test_a_broken_file_is_refused_with_key_and_reason(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(HostsError) as error:
        hosts_in(tmp_path, text)
    assert str(tmp_path / "hosts.toml") in str(error.value)
    assert reason in str(error.value)


def test_an_account_names_its_host() -> None:
    assert account("", "CUDA0") == "CUDA0"
    assert account("gpu2", "CUDA0") == "gpu2/CUDA0"
    assert host_of("CUDA0") == ""
    assert host_of("gpu2/CUDA0") == "gpu2"
