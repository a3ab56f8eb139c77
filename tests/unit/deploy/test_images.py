"""The Dockerfiles: clean under hadolint, and what an operator may rely on."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

DOCKERFILES = ("server.Dockerfile", "bundle.Dockerfile")


@pytest.fixture(scope="session")
def docker(repository: Path) -> Path:
    return repository / "deploy" / "docker"


def stages(dockerfile: Path) -> dict[str, list[str]]:
    """Instructions of each stage, continued lines joined and comments left out; the last stage is what ships."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    found: dict[str, list[str]] = {"": []}
    for line in filter(None, map(str.strip, re.sub(r"\\\n\s*", "", text).splitlines())):
        if line.startswith("FROM "):
            found[line.partition(" AS ")[2] or "runtime"] = []
        found[list(found)[-1]].append(line)
    return found


@pytest.fixture(scope="session")
def runtime(docker: Path) -> list[str]:
    return stages(docker / "server.Dockerfile")["runtime"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(hadolint: str, docker: Path, name: str) -> None:
    command = [hadolint, "--no-color", "--failure-threshold", "warning", str(docker / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_hadolint_would_find_something(hadolint: str, tmp_path: Path) -> None:
    """Guards the test above."""
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd /tmp && sudo true\n")
    done = subprocess.run([hadolint, "--failure-threshold", "warning", bad], capture_output=True, check=False)
    assert done.returncode == 1


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_do_not_run_as_root(docker: Path, name: str) -> None:
    *_, last = [line for line in stages(docker / name)["runtime"] if line.startswith("USER ")]
    assert last == "USER 65532:65532"


def test_the_server_is_process_1_and_gets_sigterm(runtime: list[str]) -> None:
    assert 'ENTRYPOINT ["beamline", "serve"]' in runtime
    assert 'CMD ["/models/bundle"]' in runtime
    assert "STOPSIGNAL SIGTERM" in runtime


def test_nothing_in_the_image_phones_home(runtime: list[str]) -> None:
    (environment,) = [line for line in runtime if line.startswith("ENV ")]
    assert "ORT_DISABLE_TELEMETRY=1" in environment.split()


def test_the_image_exposes_the_ports_of_the_settings(runtime: list[str], repository: Path) -> None:
    settings = tomllib.loads((repository / "deploy/k8s/base/server.toml").read_text())
    assert f"EXPOSE {settings['grpc_port']} {settings['metrics_port']}" in runtime


def test_nothing_is_installed_or_fetched_in_the_shipped_stage(runtime: list[str]) -> None:
    assert [line for line in runtime if line.startswith(("COPY", "ADD"))] == [
        "COPY --from=installed /opt/beamline /opt/beamline"
    ]
    runs = " ".join(line for line in runtime if line.startswith("RUN "))
    assert not re.search(r"\b(pip|apt|apt-get|apk|curl|wget|gcc)\b", runs)


def test_the_build_fails_when_the_export_side_slips_in(runtime: list[str]) -> None:
    [check] = [line for line in runtime if "find_spec" in line]
    assert "('torch', 'transformers', 'onnx')" in check


def test_the_image_has_the_machine_code_and_its_user_finds_it(docker: Path, runtime: list[str]) -> None:
    """A container with a read-only root would compile at every start."""
    installed = stages(docker / "server.Dockerfile")["installed"]
    [compiled] = [i for i, line in enumerate(installed) if line.startswith("RUN /opt/beamline/bin/beamline compile")]
    assert "NUMBA_CPU_NAME=generic" in installed[compiled]
    assert any("pip" in line for line in installed[:compiled])
    [check] = [i for i, line in enumerate(runtime) if "beamline compile --check" in line]
    assert check > runtime.index("USER 65532:65532")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_base_is_named_by_digest_alone(docker: Path, name: str) -> None:
    """Whatever is given as BASE_IMAGE; a tag without a digest is no name that a build would take."""
    lines = [line for stage in stages(docker / name).values() for line in stage]
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert set(bases) == {"${BASE_IMAGE}@${BASE_DIGEST}"}
    assert any("image.base.digest=" in line for line in lines)


def test_whatever_a_build_installs_has_hashes_or_is_the_wheel_that_it_built(docker: Path) -> None:
    lines = [line for stage in stages(docker / "server.Dockerfile").values() for line in stage]
    commands = [part for line in lines if line.startswith("RUN ") for part in line.split("&&")]
    fetching = [part for part in commands if re.search(r"\bpip\b.* (install|download|wheel) ", part)]
    locked = [part for part in fetching if "--require-hashes" in part]
    assert {name for part in locked for name in re.findall(r"requirements(?:-([\w${}]+))?\.txt", part)} == {
        "${VARIANT}",  # fetched
        "build",
        "",  # installed, from what was fetched
    }
    own = [part for part in fetching if part not in locked]
    assert all("--no-index" in part and "--no-deps" in part for part in own)
    assert [re.findall(r"(/wheels/beamline_serving-\S+| \.$)", part.rstrip()) for part in own] == [
        [" ."],
        ["/wheels/beamline_serving-*.whl"],
    ]
    assert "--no-build-isolation" in own[0]


def test_every_variant_has_a_lock(docker: Path) -> None:
    text = (docker / "server.Dockerfile").read_text()
    [described] = re.findall(r"^# (\w+) or (\w+)\.\nARG VARIANT=", text, re.MULTILINE)
    assert {path.stem for path in docker.glob("requirements-*.txt")} == {
        f"requirements-{name}" for name in (*described, "build")
    }


def test_the_build_context_holds_what_the_wheel_is_made_of(docker: Path, repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    sources = {Path(package).parts[0] for package in wheel["packages"]} | set(wheel["force-include"])
    sources |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    sources |= {"deploy/docker/requirements-*.txt"}
    ignore = (docker / "server.Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == sources
    copied = {
        path
        for line in stages(docker / "server.Dockerfile")["wheels"]
        if line.startswith("COPY ")
        for path in line.split()[1:-1]
    }
    assert copied == sources


def test_the_version_of_the_image_is_that_of_the_package(runtime: list[str], repository: Path) -> None:
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG VERSION={version}" in runtime
