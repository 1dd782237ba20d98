"""Which cores a process may use, and how runners share them."""

from pathlib import Path

import pytest

from exo.worker.protocol.cores import cpu_quota, physical_cores, shares, usable_cpus


@pytest.mark.parametrize(
    ("n_cores", "runners", "expected"),
    [
        (2, ["a"], {"a": 2}),
        (2, ["a", "b"], {"a": 1, "b": 1}),
        (2, ["a", "b", "c"], {"a": 1, "b": 1, "c": 1}),
        (8, ["a", "b", "c"], {"a": 3, "b": 3, "c": 2}),
        (8, [], {}),
    ],
)
def test_runners_that_compute_share_the_cores(n_cores: int, runners: list[str], expected: dict[str, int]) -> None:
    assert shares(n_cores, runners) == expected


def test_a_process_may_use_at_least_one_core_and_no_more_than_its_affinity_has() -> None:
    assert 1 <= physical_cores() <= len(usable_cpus())


def group(root: Path, path: str, cpu_max: str) -> None:
    (root / path).mkdir(parents=True, exist_ok=True)
    (root / path / "cpu.max").write_text(cpu_max + "\n")


def membership(tmp_path: Path, line: str) -> Path:
    file = tmp_path / "membership"
    file.write_text(line + "\n")
    return file


def test_the_smallest_quota_on_the_way_to_the_root_counts(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, "slice/service", "max 100000")
    group(root, "slice", "150000 100000")
    assert cpu_quota(root, membership(tmp_path, "0::/slice/service")) == 1.5


def test_without_a_limit_there_is_no_quota(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, "", "max 100000")
    assert cpu_quota(root, membership(tmp_path, "0::/")) is None
    assert cpu_quota(tmp_path / "absent", tmp_path / "absent too") is None


def test_a_container_with_version_1_sees_its_quota_at_the_root(tmp_path: Path) -> None:
    folder = tmp_path / "cgroup" / "cpu"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path / "cgroup", membership(tmp_path, "4:cpu:/docker/abc")) == 2.0
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(tmp_path / "cgroup", membership(tmp_path, "4:cpu:/docker/abc")) is None
