"""The page that `sparsity_table.py` writes, from the tables of several models."""

from __future__ import annotations

from typing import Any

_QUALITY = ("method", "level", "bytes", "kept by site", "perplexity", "increase", "KL", "KL p99", "top-1", "tokens/s")


def markdown(tables: list[dict[str, Any]]) -> str:
    """tables: what `Table.save` wrote."""
    out = [
        "# Sparsity, measured",
        "",
        "Written by `tests/bench/sparsity_table.py`.",
        "",
        "- Level: the share of the inputs (of the neurons, for methods that skip neurons) that is skipped. Presets are searched",
        "  on held-out text of the calibration's kind, and measured on the other text like all rows.",
        "- Bytes: what decoding reads of the layers' matrices. Kept by site: of what could be skipped there.",
        "- +-: one standard error, of an increase from the differences token by token, of an accuracy from its questions.",
        "- KL: divergence of the sparse distribution from the dense one, mean and 99th percentile, in nats a token; top-1: tokens",
        "  of which both make the same first choice.",
        "- tokens/s: decoding; the ratio is against dense in turns in one process, with the lowest and highest turn.",
    ]
    for table in tables:
        out += ["", *_model(table)]
    return "\n".join(out) + "\n"


def _model(table: dict[str, Any]) -> list[str]:
    s, dense = table["settings"], table["dense"]
    rate = dense.get("tokens_per_s", dense.get("tokens_per_s_neurons"))
    out = [
        f"## {table['model']}, {table['quantisation']}",
        "",
        *_wrapped(table["command"]),
        "",
        f"{table['cpu']}, {table['date']}, commit {', '.join(table['commits'])}. Calibrated on {s['tokens']} tokens, half of",
        f"{s['calibrated_on']} and half the model's own; figures from the first {s['chunks']} chunks of 512 tokens of {s['text']}",
        f"({table['rows'][0]['tokens_scored']} tokens scored). Dense: perplexity {dense['perplexity']:.3f}, "
        f"{dense['bytes_per_token'] / 1e6:.1f} MB a token" + (f", {rate:.0f} tokens/s." if rate else "."),
        "",
        *_header(_QUALITY),
    ]
    rows = sorted(table["rows"], key=lambda r: (r["budget"] is not None, r["asked_level"] or r["budget"] or 0))
    out += [_line(row) for row in rows]
    for part in (_presets(rows), _against(rows), _tasks(table, rows)):
        out += ["", *part] if part else []
    return out


def _presets(rows: list[dict[str, Any]]) -> list[str]:
    found = [row for row in rows if row["budget"] is not None]
    if not found:
        return []
    out = ["Presets: what the search found, on held-out text.", ""]
    out += _header(("preset", "level found", "increase on held-out text", "on the other text", "MB a token"))
    for row in found:
        held = f"{row['held_out_increase']:+.2%} +- {row['held_out_stderr']:.2%}" if "held_out_stderr" in row else "none"
        other = f"{row['increase']:+.2%} +- {row['increase_stderr']:.2%}"
        cells = (_name(row), f"{row['level']:.1%}", held, other, f"{row['bytes_per_token'] / 1e6:.1f}")
        out.append("| " + " | ".join(cells) + " |")
    return out


def _against(rows: list[dict[str, Any]]) -> list[str]:
    """Allocations and scores against each other, token by token."""
    found = [(row, base, pair) for row in rows for base, pair in row.get("against", {}).items()]
    wanted = [
        (row, base, pair)
        for row, base, pair in found
        if row["score"] == "wina"
        and base == row["allocation"]
        or row["score"] == "abs"
        and (row["allocation"], base) in (("greedy", "uniform"), ("global", "greedy"), ("global", "uniform"))
    ]
    if not wanted:
        return []
    out = ["TEAL's variants against each other: perplexity over the other's on the same tokens, less one.", ""]
    out += _header(("level", "variant", "against", "difference"))
    for row, base, (change, error) in wanted:
        out.append(f"| {row['asked_level']:.0%} | {_name(row)} | {base} | {change:+.2%} +- {error:.2%} |")
    return out


def _tasks(table: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    base = table["dense"].get("tasks", {})
    found = [row for row in rows if row.get("tasks")]
    if not base or not found:
        return []
    names = list(base)
    out = ["Accuracy by likelihood per byte; in brackets the difference from dense on the same questions.", ""]
    out += _header(("", *(f"{name} ({base[name]['questions']})" for name in names)))
    out.append("| dense | " + " | ".join(f"{base[n]['accuracy']:.1%} +- {base[n]['stderr']:.1%}" for n in names) + " |")
    for row in found:
        cells = []
        for name in names:
            t = row["tasks"].get(name)
            fewer = f" of {t['questions']}" if t and t["questions"] != base[name]["questions"] else ""
            difference = f"[{t['difference']:+.1%} +- {t['difference_stderr']:.1%}]" if t else ""
            cells.append(f"{t['accuracy']:.1%}{fewer} {difference}" if t else "")
        out.append(f"| {_name(row)} | " + " | ".join(cells) + " |")
    return out


def _name(row: dict[str, Any]) -> str:
    name = row["method"] if row["allocation"] == row["method"] else f"{row['method']} {row['allocation']}"
    name += " wina" if row["score"] == "wina" else ""
    return f"**{name}, preset {row['budget']:.1%}**" if row["budget"] is not None else name


def _line(row: dict[str, Any]) -> str:
    d = row["density"]
    rate = ""
    if "tokens_per_s" in row:
        low, high = row["speed_range"]
        rate = f"{row['tokens_per_s']:.0f} ({row['speed_ratio']:.2f}x, {low:.2f} to {high:.2f})"
    cells = (
        _name(row),
        f"{row['level']:.1%}" if row["budget"] is not None else f"{row['level']:.0%}",
        f"{d.get('body', 1.0):.1%}",
        " ".join(f"{site} {share:.0%}" for site, share in d.items() if site != "body"),
        f"{row['perplexity']:.3f}",
        f"{row['increase']:+.1%} +- {row['increase_stderr']:.1%}",
        f"{row['kl_mean']:.4f}",
        f"{row['kl_p99']:.2f}",
        f"{row['top1_agreement']:.1%}",
        rate,
    )
    return "| " + " | ".join(cells) + " |"


def _header(columns: tuple[str, ...]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def _wrapped(command: str) -> list[str]:
    lines = ["   "]
    for word in command.split():
        if len(lines[-1]) + len(word) > 110:
            lines[-1] += " \\"
            lines.append("       ")
        lines[-1] += " " + word
    return lines
