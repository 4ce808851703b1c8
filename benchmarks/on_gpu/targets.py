"""What the measurements have to show, and whether they do: the table at the end of `gpu.py`."""

from typing import Any

STEP_512, STEP_1024, PICTURE, GEMLITE = 1.0, 1.2, 1.15, 2.9
MEMORY = {"binary": 1.5e9, "ternary": 2.0e9}
FIRST_SECONDS, AGAIN_SECONDS = 60.0, 15.0


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """{what, wanted, found, by, met} of each target that was measured; `by` names the arm, whose accuracy counts."""
    steps, dense = _entries(results, "step"), _entries(results, "compiled")
    found = []
    for encoding in dict.fromkeys(each["what"].split()[1] for each in steps):
        for side, least in ((512, STEP_512), (1024, STEP_1024)):
            other = _of(dense, "dense bf16 compiled", side)
            for each in steps:
                if each["side"] == side and each["what"].split()[1] == encoding and other is not None:
                    found.append(_row(f"step at {side} px, times dense compiled", least,
                                      other["seconds"] / each["seconds"], each["what"]))
            gemlite = [entry["seconds"] for entry in _entries(results, "gemlite") if entry.get("side") == side]
            for each in steps:
                if each["side"] == side and each["what"].split()[1] == encoding and gemlite:
                    found.append(_row(f"step at {side} px, times the quicker gemlite", GEMLITE,
                                      min(gemlite) / each["seconds"], each["what"]))
        most = [each for each in steps if each["side"] == 1024 and each["what"].split()[1] == encoding]
        found += [_row("step at 1024 px, GB of GPU memory", MEMORY[encoding] / 1e9, each["peak_memory"] / 1e9,
                       each["what"], most=True) for each in most]
    pictures = _entries(results, "picture")
    other = _of(pictures, "dense bf16 compiled", 1024)
    found += [_row("picture at 1024 px, warm, times dense compiled", PICTURE, other["seconds"] / each["seconds"],
                   each["what"]) for each in pictures if other is not None and each["what"].startswith("linocut")]
    for each in _entries(results, "cold"):
        for name, limit in (("first", FIRST_SECONDS), ("again", AGAIN_SECONDS)):
            what = "with empty caches" if name == "first" else "with caches there"
            found.append(_row(f"process to PNG at 1024 px {what}, seconds", limit, each[name]["seconds"],
                              each["what"], most=True))
    return found


def table(results: dict[str, Any]) -> str:
    """The targets as lines of text, unless it was a rehearsal, and what failed."""
    lines = []
    for row in [] if results.get("toy") else targets(results):
        sign = "at most" if row["most"] else "at least"
        lines.append(f"{'yes' if row['met'] else 'NO ':<4}{row['what']}: {row['found']:.2f} "
                     f"({sign} {row['wanted']:g}), {row['by']}")
    for name, value in results.items():
        if isinstance(value, dict) and "failed" in value:
            lines.append(f"NO  section {name}: {value['failed']}")
    failed = [each for each in _entries(results, "parity") if not each["ok"]]
    if failed:
        lines.append(f"NO  parity: {len(failed)} checks failed, the first is {failed[0]}")
    return "\n".join(lines)


def _row(what: str, wanted: float, found: float, by: str, most: bool = False) -> dict[str, Any]:
    return {"what": what, "wanted": wanted, "found": found, "by": by, "most": most,
            "met": found <= wanted if most else found >= wanted}


def _of(found: list[dict[str, Any]], what: str, side: int) -> dict[str, Any] | None:
    return next((each for each in found if each["what"] == what and each["side"] == side), None)


def _entries(results: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """A section's list, or nothing where it failed or did not run."""
    value = results.get(section)
    return value if isinstance(value, list) else []
