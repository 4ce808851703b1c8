"""`linocut doctor`: what this machine has, what linocut chose and why, and whether every kernel computes rightly."""

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from linocut.cli.diagnosis import Facts


@click.command(short_help="Check this machine, its libraries and every kernel.")
@click.option("--brief", is_flag=True, help="Machine, versions and models only: no torch, no checks, a blink.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def command(context: click.Context, brief: bool, as_json: bool) -> None:
    """Check this machine, its libraries and every kernel.

    Each automatic choice is shown with its reason. Kernels are compared with the reference at the size of a real
    model; exit code 1 if one of them fails, or a library or model file is missing or damaged. A missing C++ module is
    reported, and is no failure: pictures are the same, only slower.
    """
    from rich.console import Console

    from linocut.cli import diagnosis
    from linocut.pipeline import machine

    console = Console(highlight=False, quiet=as_json, soft_wrap=True)
    report: Facts = {"version": _version(), "machine": machine.facts(), "native": diagnosis.native_module(),
                     "libraries": diagnosis.libraries()}
    _show_machine(console, report)
    _show_libraries(console, report)
    if not brief:
        report |= {"device": diagnosis.device(), "mlx": diagnosis.mlx(), "gpu": diagnosis.gpu()}
        report |= {"torch": diagnosis.torch_build(), "threads": diagnosis.threads(), "decoder": diagnosis.decoder(),
                   "kernels": diagnosis.kernel_choices(), "fused": diagnosis.fused_models()}
        _show_choices(console, report)
        console.print("\n[bold]kernels against the reference[/bold]")
        report["checks"] = diagnosis.kernel_checks(lambda facts: _show_check(console, facts))
    report["models"] = diagnosis.models(verify=not brief)
    report["prompt_cache"] = diagnosis.prompt_cache()
    _show_models(console, report)
    problems = _problems(report)
    report |= {"problems": problems, "ok": not problems}
    if as_json:
        click.echo(json.dumps(report, indent=2))
    for line in problems:
        console.print(f"[bold red]FAIL[/bold red] {_plain(line)}")
    if not problems:
        console.print("\n[bold green]ok[/bold green]" + (" (brief: kernels were not checked)" if brief else ""))
    context.exit(1 if problems else 0)


def _version() -> str:
    from linocut import __version__

    return __version__


def _plain(text: object) -> str:
    """Text in which rich sees no markup: paths and errors may hold square brackets."""
    from rich.markup import escape

    return escape(str(text))


def _gigabytes(count: int | None) -> str:
    return "none" if count is None else f"{count / 1e9:.1f} GB"


def _line(console: "Console", key: str, value: object) -> None:
    console.print(f"  {key:<16} {_plain(value)}")


def _show_machine(console: "Console", report: "Facts") -> None:
    facts, native = report["machine"], report["native"]
    console.print(f"[bold]linocut {report['version']}[/bold] on {_plain(facts['system'])}")
    _line(console, "python", f"{facts['python']} ({facts['executable']})")
    cores = f"{facts['usable_cores']} of {facts['logical_cores']} cores usable"
    _line(console, "processor", f"{facts['processor']}, {cores}")
    _line(console, "features", " ".join(facts["cpu_features"]) or "unknown")
    limit = facts["memory_limit_bytes"]
    _line(console, "memory", f"{_gigabytes(facts['memory_bytes'])}, {_gigabytes(facts['memory_available_bytes'])} free"
          + (f", limited to {_gigabytes(limit)} by the container" if limit and limit < facts["memory_bytes"] else ""))
    _line(console, "C++ module", ("built with " if native["available"] else "MISSING: ") + native["detail"])
    for each in native.get("decoders", []):
        reason = each["why_not"] or "works; a better one is there"
        if each["chosen"]:
            reason = "chosen: the best that this CPU can run"
        _line(console, "  decoder", f"{each['name']:<11} {reason}")
    for each in native.get("products", []):
        _line(console, "  int8 product", f"{each['name']:<11} {each['reason']}")
    for each in native.get("attention", []):
        _line(console, "  attention", f"{each['name']:<11} {each['reason']}")


def _show_libraries(console: "Console", report: "Facts") -> None:
    console.print("\n[bold]libraries[/bold]")
    for each in report["libraries"]:
        _line(console, each["name"], f"{each['version'] or 'MISSING'}  (needs {each['required'] or 'any version'})")


def _show_choices(console: "Console", report: "Facts") -> None:
    torch, threads, device, mlx = report["torch"], report["threads"], report["device"], report["mlx"]
    console.print("\n[bold]choices[/bold]")
    _line(console, "device", f"{device['device'] or 'none'}: {device['reason']}")
    one_bit = "in one bit" if mlx["why_not_one_bit"] is None else f"in two bits, since {mlx['why_not_one_bit']}"
    _line(console, "mlx", mlx["why_not"] or f"{mlx['version']} on {mlx['computes_on']}, binary weights {one_bit}")
    gpu = report["gpu"]
    if gpu["measured"] is None:
        _line(console, "Triton", f"{gpu['triton'] or 'missing'}: {gpu['why_not'] or 'interpreted, for tests'}")
    else:
        products = f"products on tensor cores, accuracy {gpu['accuracy']}, weights {gpu['weights']}"
        _line(console, "Triton", f"{gpu['triton']}, compute capability {gpu['capability']}: "
              + (gpu["why_no_products"] or products))
        _line(console, "GPTQ", "loops in Triton" if gpu["why_no_columns"] is None else
              f"loops in torch, since {gpu['why_no_columns']}")
        _line(console, "measured", f"{gpu['measured']['shapes']} shapes in {gpu['measured']['file']}; quickest:")
        for shape, best in gpu["measured"]["quickest"].items():
            _line(console, f"  {shape}", f"{best['route']}, {1e3 * best['seconds']:.3f} ms")
    for each in torch["devices"]:
        _line(console, "GPU", f"{each['name']}, {_gigabytes(each['memory_bytes'])}")
    _line(console, "torch", f"{torch['version']}, CPU kernels for {torch['cpu_capability']}, "
          f"oneDNN {'on' if torch['mkldnn'] else 'off'}, BLAS {torch['blas']}; {torch['reason']}")
    _line(console, "threads", f"{threads['count']}: {threads['reason']}")
    _line(console, "dtype", "float32: the default; attention and the decoder take bfloat16 where the CPU multiplies it")
    _line(console, "decoder", f"{report['decoder']['dtype']}: {report['decoder']['reason']}")
    shown = set()
    for choice in report["kernels"]:
        # One paragraph for all encodings that are decided alike.
        key = (choice["device"], choice["dtype"], choice["chosen"])
        if key in shown:
            continue
        shown.add(key)
        alike = ", ".join(each["encoding"] for each in report["kernels"]
                          if (each["device"], each["dtype"], each["chosen"]) == key)
        _line(console, "kernel", f"{choice['chosen']} for {alike} in {choice['dtype']} on {choice['device']}: "
              f"{choice['reason']}")
    for candidate in report["kernels"][0]["candidates"]:
        _line(console, f"  {candidate['name']}", candidate["why_not"] or "can run float32 on the CPU")
    for where, reason in dict.fromkeys((each["device"], each["why_not"]) for each in report["fused"]):
        alike = ", ".join(f"{each['model']} {each['component']}" for each in report["fused"]
                          if (each["device"], each["why_not"]) == (where, reason))
        how = f"layer by layer, since {reason}" if reason else "fused in C++" if where == "cpu" else "fused on the GPU"
        _line(console, "blocks", f"{alike} on {where}: {how}")


def _show_check(console: "Console", facts: "Facts") -> None:
    state = "[green]ok[/green]  " if facts["ok"] else "[bold red]FAIL[/bold red]"
    console.print(f"  {state} {facts['kernel']:<9} {facts['encoding']:<8} {facts['dtype']:<8} {facts['device']:<4} "
                  f"M={facts['m']:<4} N={facts['n']:<5} O={facts['o']:<5} error {facts['error']:.1e} "
                  f"(at most {facts['tolerance']:.0e})  {facts['seconds'] * 1e3:.0f} ms  {_plain(facts['weight'])}")


def _show_models(console: "Console", report: "Facts") -> None:
    console.print("\n[bold]models in the package[/bold]")
    for each in report["models"]:
        size = f"{each['bytes'] / 1e6:.1f} MB, weights {each['hash']}: " if each["ok"] else ""
        _line(console, each["name"], size + each["detail"])
    console.print("\n[bold]prompt cache[/bold]")
    cache = report["prompt_cache"]
    _line(console, "place", cache["folder"] or "none")
    _line(console, "prompts", f"{cache['entries']}, {cache['bytes'] / 1e6:.1f} MB of at most "
          f"{cache['limit_bytes'] / 1e6:.0f} MB" if not cache["why_not"] else f"off: {cache['why_not']}")


def _problems(report: "Facts") -> list[str]:
    """One line for each thing that is wrong."""
    found: list[str] = []
    found += [f"{each['name']} is not installed: pip install '{each['name']}{each['required']}'"
              for each in report["libraries"] if each["version"] is None]
    for each in report.get("checks", []):
        if not each["ok"]:
            way_out = "--device cpu" if each["kernel"] == "mlx" else "LINOCUT_KERNEL=reference"
            found.append(f"kernel {each['kernel']} is wrong on {each['encoding']} {each['dtype']} on {each['device']} "
                         f"(expected an error of at most {each['tolerance']:.0e}, found {each['error']:.1e}); "
                         f"draw with {way_out} and report this")
    if report.get("device", {}).get("device", "") is None:
        found.append(report["device"]["reason"])
    found += [f"model {each['name']}: {each['detail']}" for each in report["models"] if not each["ok"]]
    return found
