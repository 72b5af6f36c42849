"""The `likewise` command: reads flags, environment and file into one settings model, and runs it.

It only dispatches. Each command is a frozen pydantic model in its room with a method `cli_cmd`; the fields' docstrings
are the help. Precedence: flags, then `LIKEWISE_*` (`__` for nesting), then the YAML file that `LIKEWISE_CONFIG_FILE` names.

Exit codes: 0 done, 1 refused with one sentence, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

VERSION = "0.1.0.dev0"

# command → (module, settings class, the extras it needs, one line of help)
COMMANDS: dict[tuple[str, ...], tuple[str, str, str, str]] = {
    ("train",): ("training.config", "Train", "cpu,train", "pretrain an encoder on a folder of pictures (SOP)"),
    ("export",): ("export.command", "Export", "cpu,export", "turn a run into an ONNX bundle with proven parity"),
    ("index", "build"): (
        "service.build",
        "IndexBuild",
        "cpu,serve",
        "embed a folder and build a collection; again to update it",
    ),
    ("serve",): ("service.config", "Serve", "cpu,serve", "serve a bundle and its collections over gRPC"),
    ("query",): ("service.query", "Query", "cpu,serve", "ask a server for the neighbours of a picture"),
    ("healthcheck",): (
        "service.healthcheck",
        "HealthCheck",
        "cpu,serve",
        "ask a server whether it is ready (for containers)",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        print(f"likewise {VERSION}")
        return 0
    words = next((words for words in COMMANDS if tuple(arguments[: len(words)]) == words), None)
    if words is None:
        print(f"likewise: there is no command {' '.join(arguments[:2])!r}\n\n{_help()}", file=sys.stderr)
        return 2
    # Pillow warns of damaged metadata and of its own size limit; what matters is in our refusals.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        return _run(words, arguments[len(words) :])
    except KeyboardInterrupt:
        print("\nlikewise: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


def _run(words: tuple[str, ...], arguments: list[str]) -> int:
    module_name, class_name, extras, _ = COMMANDS[words]
    try:
        command = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] in ("training", "export", "service"):
            raise
        print(
            f"likewise {' '.join(words)} needs the package {e.name!r}: pip install 'likewise[{extras}]'",
            file=sys.stderr,
        )
        return 1
    from export.bundle import RefusalError

    try:
        settings = _parse(command, f"likewise {' '.join(words)}", arguments)
        if settings is None:
            return 2
        result: int | None = settings.cli_cmd()
    except RefusalError as e:
        print(f"likewise: {e}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] in ("training", "export", "service"):
            raise
        print(
            f"likewise {' '.join(words)} needs the package {e.name!r}: pip install 'likewise[{extras}]'",
            file=sys.stderr,
        )
        return 1
    return result or 0


def _parse(command: Any, program: str, arguments: list[str]) -> Any:
    """The settings model filled from flags over environment over YAML, or None after printing what is wrong."""
    from pydantic import ValidationError
    from pydantic_settings import (
        BaseSettings,
        CliSettingsSource,
        PydanticBaseSettingsSource,
        SettingsConfigDict,
        SettingsError,
        YamlConfigSettingsSource,
    )

    file = os.environ.get("LIKEWISE_CONFIG_FILE")
    if file and not os.path.isfile(file):  # noqa: PTH113
        print(f"{program}: LIKEWISE_CONFIG_FILE names {file}, which is not a file", file=sys.stderr)
        return None

    class Settings(BaseSettings, command):  # type: ignore[misc]
        __doc__ = command.__doc__
        model_config = SettingsConfigDict(
            frozen=True,
            extra="forbid",
            env_prefix="LIKEWISE_",
            env_nested_delimiter="__",
            yaml_file=file,
            cli_prog_name=program,
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_enforce_required=False,
            use_attribute_docstrings=True,
            nested_model_default_partial_update=True,
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            flags = CliSettingsSource(settings_cls, cli_parse_args=arguments)
            return flags, env_settings, YamlConfigSettingsSource(settings_cls)

    try:
        return Settings()
    except SettingsError as e:
        print(f"{program}: {e}", file=sys.stderr)
    except ValidationError as e:
        for error in e.errors():
            where = ".".join(str(part) for part in error["loc"]) or "settings"
            given = f" (got {error['input']!r})" if error["type"] not in ("missing", "extra_forbidden") else ""
            print(f"{program}: {where.replace('_', '-')}: {error['msg']}{given}", file=sys.stderr)
        print(f"See {program} --help.", file=sys.stderr)
    return None


def _help() -> str:
    width = max(len(" ".join(words)) for words in COMMANDS) + 2
    lines = [f"  {' '.join(words):<{width}}{entry[3]}" for words, entry in COMMANDS.items()]
    return "\n".join(
        [
            "usage: likewise COMMAND ...        find similar images",
            "",
            *lines,
            "",
            "likewise COMMAND --help tells more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
