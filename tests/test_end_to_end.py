"""One picture through all of it, by the commands that a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.bundle import Bundle
from likewise import COMMANDS, main
from service.client import Client
from tests.conftest import TINY
from tests.service.test_server import start
from tests.shapes import write_shapes


def test_from_a_folder_to_an_answer(tmp_path: Path) -> None:
    pictures = write_shapes(tmp_path / "my pictures", 48)
    run, bundle, collections = tmp_path / "run", tmp_path / "bundle", tmp_path / "collections"
    assert main(["train", str(pictures), "--out", str(run), "--steps", "2", *TINY]) == 0
    assert main(["export", str(run), "--out", str(bundle)]) == 0
    build = ["index", "build", "--bundle", str(bundle), "--images", str(pictures), "--out", str(collections / "shapes")]
    assert main(build) == 0
    process, address = start("--bundle", bundle, "--collections", collections, "--port", 0, "--metrics-port", 0)
    try:
        picture = pictures / "cross" / "00012.png"
        with Client(address) as client:
            assert client.search("shapes", image=picture.read_bytes())[0].key == "cross/00012.png"
            # One lineage: the answer's space is the bundle's, the bundle's provenance the run's.
            assert client.encoder().space_id == Bundle.open(bundle).space_id
        assert main(["query", str(picture), "--server", address, "--out", str(tmp_path / "sheet.png")]) == 0
        assert (tmp_path / "sheet.png").stat().st_size > 1000
    finally:
        process.terminate()
        assert process.wait(20) == 0
        assert process.stderr is not None
        process.stderr.close()
    provenance = Bundle.open(bundle).manifest.provenance
    assert provenance["data"]["sha256"] == json.loads((run / "run.json").read_bytes())["data"]["sha256"]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", "likewise", *arguments], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("words", list(COMMANDS), ids=" ".join)
def test_every_command_explains_itself(words: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    said = capfd.readouterr().out
    assert end.value.code == 0 and f"likewise {' '.join(words)}" in said
    assert len(said.splitlines()) > 6


def test_usage_errors_name_the_flag_and_exit_2() -> None:
    assert "there is no command 'fly'" in command("fly").stderr and command("fly").returncode == 2
    assert command().returncode == 2 and command("--version").stdout.startswith("likewise 0.")
    done = command("serve", "--bundle", "b", "--port", "99999")
    assert done.returncode == 2 and "port: Input should be less than or equal to 65535 (got '99999')" in done.stderr
    done = command("export", "run")
    assert done.returncode == 2 and "out: Field required" in done.stderr
    assert "unrecognized arguments: --colour" in command("export", "run", "--out", "b", "--colour", "red").stderr


def test_flags_come_before_environment_before_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as here:
            for name, value in environment.items():
                here.setenv(name, value)
            try:
                code = main([*arguments])
            except SystemExit as e:
                code = int(str(e.code))
        return subprocess.CompletedProcess(arguments, code, "", capfd.readouterr().err)

    file = tmp_path / "likewise.yaml"
    file.write_text("bundle: from-file\nport: 1\nmax_batch: 65\n")
    env = {"LIKEWISE_CONFIG_FILE": str(file)}
    # The values show in what is refused: 65 is too many, and comes from the file unless something comes before it.
    assert "(got 65)" in command("serve", **env).stderr
    assert "(got '66')" in command("serve", **env, LIKEWISE_MAX_BATCH="66").stderr
    assert "(got '67')" in command("serve", "--max-batch", "67", **env, LIKEWISE_MAX_BATCH="66").stderr
    done = command("serve", "--max-batch", "8", **env, LIKEWISE_LIMITS__MIN_SIDE="9")
    assert done.returncode == 1 and "from-file is not a bundle" in done.stderr
    file.write_text("bundel: typo\n")
    done = command("serve", "--bundle", "b", **env)
    assert done.returncode == 2 and "bundel" in done.stderr
    for text in ("a: [1\n", "- a\n- b\n", "just text\n"):
        file.write_text(text)
        done = command("serve", "--bundle", "b", **env)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "is not a YAML file" in done.stderr, text
    done = command("serve", "--bundle", "b", LIKEWISE_MAX_BACTH="3")
    assert done.returncode == 2 and "LIKEWISE_MAX_BACTH is no setting" in done.stderr
    assert "closest: LIKEWISE_MAX_BATCH" in done.stderr
    assert "unset it" not in command("serve", "--bundle", "b", LIKEWISE_STEPS="3").stderr  # another command's
    done = command("serve", "--bundle", "b", LIKEWISE_CONFIG_FILE=str(tmp_path / "none.yaml"))
    assert done.returncode == 2 and "is not a file" in done.stderr


def test_a_missing_package_is_named_with_its_extra() -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; from likewise import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["serve", "--bundle", "b"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "likewise serve needs the package 'onnxruntime': pip install 'likewise[cpu,serve]'"
