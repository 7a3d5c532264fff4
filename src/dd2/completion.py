"""dd2 completion: commands, flags and packaged configurations for a shell to complete."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin

import tyro

from dd2.config import packaged, positional
from dd2.fields import field_types
from dd2.processes import say

Shell = Literal["bash", "zsh", "fish"]

FAMILIES = ("bench", "convert")
"""First words of commands of two words."""


@dataclass(frozen=True)
class CompletionConfig:
    """Print what makes a shell complete dd2's commands and flags. In ~/.bashrc: source <(dd2 completion bash)."""

    shell: Annotated[Shell, tyro.conf.Positional] = "bash"
    """bash: source <(dd2 completion bash). zsh: the same, in ~/.zshrc. fish: dd2 completion fish | source."""


def completion(config: CompletionConfig) -> str:
    """Print and return the script."""
    from dd2.cli import COMMANDS  # the table of all commands, this one too

    flags = {name: flags_of(command.load()[0]) for name, command in COMMANDS.items()}
    script = _fish(flags) if config.shell == "fish" else _bash(flags, zsh=config.shell == "zsh")
    say(script)
    return script


def flags_of(config_class: type) -> dict[str, tuple[str, ...]]:
    """The flags of a command, and the words that each takes where it takes few."""
    bare = positional(config_class)
    found: dict[str, tuple[str, ...]] = {"--help": ()}
    for name, kind in field_types(config_class):
        if name in bare:
            continue
        flag = f"--{name.replace('_', '-')}"
        kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        found[flag] = tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()
        if kind is bool:
            section, _, last = flag.removeprefix("--").rpartition(".")
            found[f"--{section}{'.' if section else ''}no-{last}"] = ()
    return found


def _configurations() -> str:
    """The packaged configurations as a command takes them."""
    return " ".join(f"configs/{name}.yaml" for name in packaged())


def _bash(flags: Mapping[str, Mapping[str, tuple[str, ...]]], *, zsh: bool) -> str:
    second = {family: [name.split()[1] for name in flags if name.startswith(f"{family} ")] for family in FAMILIES}
    firsts = dict.fromkeys(name.split()[0] for name in flags)
    words = "\n".join(f'        "{name}") words="{" ".join(of)}";;' for name, of in flags.items())
    chosen = "\n".join(
        f'        "{name} {flag}") words="{" ".join(choices)}";;'
        for name, of in flags.items()
        for flag, choices in of.items()
        if choices
    )
    families = "\n".join(f'        {family}) words="{" ".join(names)}";;' for family, names in second.items())
    return f"""{"autoload -U +X bashcompinit && bashcompinit" + chr(10) if zsh else ""}_dd2() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words="" name="${{COMP_WORDS[1]}}"
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{" ".join(firsts)} --help --version" -- "$current"))
        return
    fi
    if [ "$COMP_CWORD" -eq 2 ]; then
        case "$name" in
{families}
        esac
        if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$current")); return; fi
    fi
    case "$name" in {"|".join(FAMILIES)}) name="$name ${{COMP_WORDS[2]}}";; esac
    case "$name $before" in
{chosen}
    esac
    if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$current")); return; fi
    case "$current" in
    -*)
        case "$name" in
{words}
        esac
        COMPREPLY=($(compgen -W "$words" -- "$current"));;
    configs/*) COMPREPLY=($(compgen -W "{_configurations()}" -- "$current"));;
    *) COMPREPLY=($(compgen -f -- "$current"));;
    esac
}}
complete -o bashdefault -F _dd2 dd2"""


def _fish(flags: Mapping[str, Mapping[str, tuple[str, ...]]]) -> str:
    from dd2.cli import COMMANDS

    lines = ["complete -c dd2 -n __fish_use_subcommand -l version", "complete -c dd2 -n __fish_use_subcommand -l help"]
    for name, command in COMMANDS.items():
        first, *rest = name.split()
        summary = command.summary.replace("'", "\\'")
        if rest:
            lines.append(f"complete -c dd2 -n '__fish_seen_subcommand_from {first}' -a {rest[0]} -d '{summary}'")
        else:
            lines.append(f"complete -c dd2 -n __fish_use_subcommand -a {first} -d '{summary}'")
        seen = f"__fish_seen_subcommand_from {rest[0] if rest else first}"
        for flag, choices in flags[name].items():
            takes = f" -x -a '{' '.join(choices)}'" if choices else ""
            lines.append(f"complete -c dd2 -n '{seen}' -l {flag.removeprefix('--')}{takes}")
    lines += [f"complete -c dd2 -n __fish_use_subcommand -a {family}" for family in FAMILIES]
    return "\n".join(lines)
