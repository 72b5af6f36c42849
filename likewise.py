"""The `likewise` command: reads flags, environment and file into one settings model, and runs it.

It only dispatches. Each command is a frozen pydantic model in its room with a method `cli_cmd`; the fields' docstrings
are the help. Precedence: flags, then `LIKEWISE_*` (`__` for nesting), then the YAML file that `LIKEWISE_CONFIG_FILE` names.

Exit codes: 0 done, 1 refused with one sentence, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from typing import Any

import yaml
from pydantic import ValidationError

VERSION = "0.1.0.dev0"

# command → (module, settings class, the extras it needs, one line of help)
COMMANDS: dict[tuple[str, ...], tuple[str, str, str, str]] = {
    ("train",): ("training.config", "Train", "cpu,train", "pretrain an encoder on a folder of pictures (SOP)"),
    ("evaluate",): (
        "training.evaluate.config",
        "Evaluate",
        "cpu,train",
        "measure an encoder: kNN, retrieval, copies, …",
    ),
    ("report",): ("training.config", "Report", "cpu,train", "write a run's report.html again"),
    ("export",): ("export.config", "Export", "cpu,export", "turn an encoder into an ONNX bundle with proven parity"),
    ("bundle", "list"): ("export.bundle_command", "List", "cpu", "list the encoders that come with likewise"),
    ("bundle", "show"): ("export.bundle_command", "Show", "cpu", "say what a bundle is"),
    ("bundle", "verify"): ("export.bundle_command", "Verify", "cpu", "check a bundle on this machine"),
    ("bundle", "diff"): ("export.bundle_command", "Diff", "cpu", "say how two bundles differ"),
    ("index", "build"): (
        "service.build",
        "IndexBuild",
        "cpu,serve",
        "embed pictures and build a collection; again to update it",
    ),
    ("index", "sync"): (
        "service.config",
        "IndexSync",
        "cpu,serve",
        "make a collection follow a folder, deletions included",
    ),
    ("index", "info"): ("service.index_command", "IndexInfo", "cpu,serve", "say what a collection holds"),
    ("index", "compact"): (
        "service.index_command",
        "IndexCompact",
        "cpu,serve",
        "merge a collection's segments into one",
    ),
    ("index", "verify"): (
        "service.index_command",
        "IndexVerify",
        "cpu,serve",
        "compare a collection with its checksums",
    ),
    ("index", "upgrade"): (
        "service.index_command",
        "IndexUpgrade",
        "cpu,serve",
        "write an old collection in today's format",
    ),
    ("index", "snapshot"): ("service.index_command", "IndexSnapshot", "cpu,serve", "copy a collection, in use or not"),
    ("index", "restore"): ("service.index_command", "IndexRestore", "cpu,serve", "make a collection of a snapshot"),
    ("index", "add"): ("service.transfer", "IndexAdd", "cpu,serve", "add embeddings that were computed elsewhere"),
    ("index", "merge"): ("service.merge", "IndexMerge", "cpu,serve", "make one collection of several"),
    ("index", "reembed"): (
        "service.reembed",
        "IndexReembed",
        "cpu,serve",
        "embed a collection, in use or not, with another bundle",
    ),
    ("index", "export"): ("service.transfer", "IndexExport", "cpu,serve", "write a collection as npy and Parquet"),
    ("index", "evaluate"): (
        "service.evaluate",
        "IndexEvaluate",
        "cpu,serve",
        "measure it: recall, hubs, duplicates, mAP",
    ),
    ("duplicates",): ("service.duplicates_command", "Duplicates", "cpu,serve", "find near duplicates, group by group"),
    ("index", "plan"): ("service.plan", "IndexPlan", "cpu,serve", "say what a build will take, before it"),
    ("serve",): ("service.config", "Serve", "cpu,serve", "serve a bundle and its collections over gRPC"),
    ("keys", "new"): ("service.security", "KeysNew", "cpu,serve", "make an API key for `serve --keys`"),
    ("config", "print"): (
        "service.doctor",
        "ConfigPrint",
        "cpu,serve",
        "say what `serve` would run with, and where each setting comes from",
    ),
    ("doctor",): ("service.doctor", "Doctor", "cpu,serve", "say what is wrong with this machine and its packages"),
    ("upsert",): ("service.upsert", "Upsert", "cpu,serve", "send pictures to a server, which stores them"),
    ("query",): ("service.query", "Query", "cpu,serve", "ask a server for the neighbours of a picture"),
    ("release", "status"): (
        "service.release_command",
        "ReleaseStatus",
        "cpu,serve",
        "say which release a collection is served from",
    ),
    ("release", "prepare"): (
        "service.release_command",
        "ReleasePrepare",
        "cpu,serve",
        "load a bundle and its collection beside the served ones",
    ),
    ("release", "switch"): ("service.release_command", "ReleaseSwitch", "cpu,serve", "serve them from now on"),
    ("release", "rollback"): (
        "service.release_command",
        "ReleaseRollback",
        "cpu,serve",
        "serve what was served before, with the writes since",
    ),
    ("release", "finish"): (
        "service.release_command",
        "ReleaseFinish",
        "cpu,serve",
        "unload what is not served any more",
    ),
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
        print("\nlikewise: interrupted; run the same command again to continue (train: with --resume)", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


def _run(words: tuple[str, ...], arguments: list[str]) -> int:
    module_name, class_name, extras, _ = COMMANDS[words]
    program = f"likewise {' '.join(words)}"
    from export.bundle import RefusalError, printable

    try:
        command = getattr(importlib.import_module(module_name), class_name)
        settings = _parse(command, program, arguments)
        if settings is None:
            return 2
        result: int | None = settings.cli_cmd()
        return result or 0
    except RefusalError as e:
        print(f"likewise: {printable(str(e))}", file=sys.stderr)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] in ("training", "export", "service"):
            raise
        print(f"{program} needs the package {e.name!r}: pip install 'likewise[{extras}]'", file=sys.stderr)
    except OSError as e:
        if e.errno is None:
            raise
        where = printable(os.fsdecode(e.filename)) if isinstance(e.filename, (str, bytes)) else "the disk"
        said = e.strerror or type(e).__name__
        print(f"likewise: {where}: {said}; check the path, its permissions and the free space", file=sys.stderr)
    except Exception as e:
        if not getattr(e, "is_refusal", False):  # what the API refuses is one sentence, too
            raise
        print(f"likewise: {printable(str(e))}", file=sys.stderr)
    return 1


def _parse(command: Any, program: str, arguments: list[str]) -> Any:
    """The settings model filled from flags over environment over YAML, or None after printing what is wrong."""
    from pydantic_settings import (
        BaseSettings,
        CliSettingsSource,
        PydanticBaseSettingsSource,
        SettingsConfigDict,
        SettingsError,
        YamlConfigSettingsSource,
    )

    unknown = _unknown_variable()
    if unknown:
        print(f"{program}: {unknown}", file=sys.stderr)
        return None
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
            flags: CliSettingsSource[BaseSettings] = CliSettingsSource(settings_cls, cli_parse_args=arguments)
            sources.update(
                {"flag": flags, "environment": env_settings, f"{file}": YamlConfigSettingsSource(settings_cls)}
            )
            return tuple(sources.values())

    sources: dict[str, PydanticBaseSettingsSource] = {}
    try:
        settings = Settings()
        if hasattr(settings, "from_sources"):
            given = {name: said for said, source in reversed(sources.items()) for name in _dotted(source())}
            settings.from_sources(given)
        return settings
    except SettingsError as e:
        print(f"{program}: {e}", file=sys.stderr)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as e:
        if isinstance(e, ValidationError):
            _explain(e, program)
        elif file:
            reason = " ".join(str(e).split())
            print(f"{program}: {file} is not a YAML file of `name: value` lines ({reason})", file=sys.stderr)
        else:
            raise
    return None


def _dotted(given: dict[str, Any], prefix: str = "") -> list[str]:
    """The names in nested settings."""
    names = []
    for name, value in given.items():
        names += _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return names


def _explain(invalid: ValidationError, program: str) -> None:
    for error in invalid.errors():
        where = ".".join(str(part) for part in error["loc"]) or "settings"
        given = f" (got {error['input']!r})" if error["type"] not in ("missing", "extra_forbidden") else ""
        print(f"{program}: {where.replace('_', '-')}: {error['msg']}{given}", file=sys.stderr)
    print(f"See {program} --help.", file=sys.stderr)


def _unknown_variable() -> str | None:
    """A sentence about a LIKEWISE_* variable that no command knows, as a typing error would be."""
    given = sorted(name for name in os.environ if name.startswith("LIKEWISE_"))
    if not given:  # the usual start imports no other command's settings
        return None
    known = {"LIKEWISE_CONFIG_FILE"}
    for module_name, class_name, _, _ in COMMANDS.values():
        fields = getattr(importlib.import_module(module_name), class_name).model_fields
        known |= {f"LIKEWISE_{name.upper()}" for name in fields}
    for name in given:
        if name.split("__")[0].upper() not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; closest: {close[0]}" if close else ""
            return f"the environment variable {name} is no setting of any command{hint}: correct or unset it"
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
