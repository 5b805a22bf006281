"""docs/performance.md from a record: words and tables, nothing that the record does not hold."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from .figures import digits, duration, mebibytes, percent, table, times
from .results import Job, Results, Row, ratio
from .standing import Standing, ours_of, peers_of, standing, standings

TITLES = {
    "cross_attention": "Cross-attention",
    "topk_mask": "Choosing masks",
    "max_similarity": "Each patch's most similar word",
    "soft_contrastive": "Contrast against a teacher and a queue",
    "soft_cross_entropy": "Vocabulary cross-entropy against a teacher",
    "ema_update_": "The teacher's moving average",
    "semi_hard_order": "Semi-hard orders",
    "linear": "float32 matrix products",
}
WAYS = {"forward": "forward", "backward": "backward", "both": "forward + backward", "step": "step"}
MANY = 12  # rows of a table, beyond which it is split by what is asked for and dtype
SLOWER_SHOWN = 12
REST = "everything else"  # of a step's parts


def page(records: dict[str, Results], others: Mapping[str, Mapping[str, Results]] | None = None) -> str:
    """``records``: by device, "cpu" and, once somebody measured one, "cuda". ``others``: of other machines, by name."""
    names = ", ".join(f"[{name}.json](../benchmarks/results/{name}.json)" for name in records)
    lines = [
        "# How fast it is, against what one would use instead",
        "",
        f"`python benchmarks/performance.py` wrote this page from {names}; the CSV files beside hold every row.",
        "`make bench` (`make bench-gpu` on a GPU) measures anew, `make bench-compare` holds that against the record of",
        "the same machine, if there is one.",
        "",
        "**How it was measured.** Each implementation is first held to a float64 reference: one whose error is beyond",
        "twice that of plain PyTorch in the same dtype and a floor for rounding gets no time. Then all of a job take",
        "turns in one process: in every round each runs once, in an order drawn for the round. Times are medians over",
        "rounds with their quartiles; ratios are taken within rounds. **A ratio is the other's time in ours: above 1",
        "ours is faster**; in bold is an other that is the faster one. Shares are of the ceilings measured in the",
        "same run, for the bytes that no cache can save and the FLOPs of matrix products; above 100 % where a cache",
        "held the inputs. Memory is what a call allocates at most beyond its inputs, its results included.",
        "",
    ]
    if "cuda" not in records:
        lines += ["**Every figure here is a CPU's. No GPU was measured**; what one needs at least, is predicted in"]
        lines += ["[roofline.md](roofline.md).", ""]
    for device, results in records.items():
        lines += device_part(device, results, (others or {}).get(device) or {})
    return "\n".join(lines).rstrip() + "\n"


def device_part(device: str, results: Results, others: Mapping[str, Results]) -> list[str]:
    kind, suffix = ("GPU", "-cuda") if device == "cuda" else ("CPU", "")

    def picture(name: str, words: str) -> list[str]:
        return [f"![{words}](images/performance-{name}{suffix}.png)", ""]

    lines = [f"## {kind} figures: the machine", "", *machine(results), f"## In short, {kind}", "", *summary(results)]
    lines += picture("others", "The time of other implementations in ours, for every op but attention")
    lines += picture("roofline", "The ceilings of this run as roofs, and our ops under them")
    for op in dict.fromkeys(job.op for job in results.jobs):
        if op not in ("step", "scaling"):
            lines += [f"## {TITLES.get(op, op)}, {kind}", "", *([f"`{op}`", ""] if op in TITLES else [])]
            if op == "cross_attention":
                lines += picture("attention", "Cross-attention's time by shape, others' in ours")
            lines += op_tables(results, op)
    lines += predictions(results) + steps(results, kind, suffix) + scaling(results, kind)
    lines += elsewhere(device, results, others, kind)
    return [
        *lines,
        f"## What has no time, and what to know about what has, {kind}",
        "",
        *gaps(results),
        *notes(results),
    ]


def machine(results: Results) -> list[str]:
    found = results.machine
    versions = dict(found.get("versions") or {})
    python = versions.pop("python", None)
    told = [found.get("summary"), ", ".join(found.get("features") or ())]
    told += [plural(found["threads"], "thread")] if found.get("threads") else []
    told += [f"{found['memory_gb']} GB" if found.get("memory_gb") else None, found.get("system")]
    told += [f"Python {python}" if python else None]
    lines = [f"{', '.join(filter(None, told))}; {', '.join(f'{name} {value}' for name, value in versions.items())}."]
    commit, minutes = found.get("commit") or "unknown", found.get("minutes")
    changed = ", with files that differ from it" if commit.endswith("+") else ""
    lines[0] += f" Commit {commit.removesuffix('+')}{changed}{f'; the run took {minutes} minutes' if minutes else ''}."
    if results.ceilings is not None:
        c = results.ceilings
        cells = [f"{digits(c.copy / 1e9)} GB/s", f"{digits(c.update / 1e9)} GB/s"]
        cells += [f"{digits(rate / 1e9)} GFLOP/s" for rate in c.gemm.values()]
        head = ["ceiling of", "copying", "updating in place", *(f"matrix products, {name}" for name in c.gemm)]
        lines += ["", *table(head, [["this run", *cells]])]
    return [*lines, *([""] if lines[-1] else [])]


def fp32_products(results: Results) -> str:
    """The rate of large ones, which tells apart machines of one name; empty where it was not measured."""
    rate = results.ceilings.gemm.get("fp32") if results.ceilings is not None else None
    return f"{digits(rate / 1e9)} GFLOP/s" if rate else ""


def elsewhere(device: str, results: Results, others: Mapping[str, Results], kind: str) -> list[str]:
    """The same jobs on other machines, side by side."""
    if not others:
        return []
    whole = {device: results, **others}
    found = {name: groups(standings(each)) for name, each in whole.items()}
    lines = [f"## The same on another machine, {kind}", ""]
    lines += ["Ratios belong to a machine: libraries are better on some processors than on others. Best peer's time"]
    lines += ["in ours, median (range), and in how many of the jobs ours is faster:", ""]
    for name, each in others.items():
        lines += [f"[{name}.json](../benchmarks/results/{name}.json): {machine(each)[0]}", ""]
    body = [["fp32 products", *(fp32_products(each) or "–" for each in whole.values())]]
    for label in dict.fromkeys(label for each in found.values() for label in each):
        cells = (each.get(label) for each in found.values())
        body.append([label, *(f"{span(of)}; {counts(of)[1]} of {len(of)}" if of else "–" for of in cells)])
    return [*lines, *table(("", *whole), body)]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def summary(results: Results) -> list[str]:
    """Ours against the best peer of each job: how often faster, and all jobs in which it is not."""
    found = standings(results)
    lines = ["Against the fastest of those that give all that is asked, forward and both passes together:", ""]
    lines += table(
        ("", "jobs", "ours faster", "alike", "ours slower", "best peer's time in ours: median (range)"),
        ([label, *counts(group), span(group)] for label, group in groups(found).items()),
    )
    slower = sorted((each for each in found if each.place == "slower"), key=lambda each: each.times[0])
    if not slower:
        return [*lines, "In no job is ours slower than the best peer.", ""]
    many = len(slower) > SLOWER_SHOWN
    title = f"**Slower than the best peer** in {len(slower)} of {len(found)} jobs"
    lines += [f"<details><summary>{title.replace('**', '')}</summary>" if many else f"{title}:", ""]
    lines += table(
        ("", "best peer", "its time in ours"),
        ([title_of(each.job), each.peer.implementation, times(each.times)] for each in slower),
    )
    return [*lines, *(["</details>", ""] if many else [])]


def title_of(job: Job) -> str:
    """Its name with the pass in words."""
    way = WAYS[job.way] if job.way != "step" else ""
    return ", ".join(filter(None, (job.op, job.what, way, job.shape, job.dtype)))


def groups(found: Sequence[Standing], brief: bool = False) -> dict[str, list[Standing]]:
    """By op, what is asked and dtype; ``brief``: by op, and what is asked of attention alone."""
    by_name: dict[str, list[Standing]] = {}
    for each in found:
        of = f"a step of {each.job.shape}" if each.job.op == "step" else f"`{each.job.op}`"
        facets = (each.job.what * (not brief or each.job.op == "cross_attention"), each.job.dtype * (not brief))
        by_name.setdefault(", ".join(filter(None, (of, *facets))), []).append(each)
    return by_name


def counts(found: Sequence[Standing]) -> list[str]:
    by_place = Counter(each.place for each in found)
    return [str(len(found)), *(str(by_place[place]) for place in ("faster", "alike", "slower"))]


def span(found: Sequence[Standing]) -> str:
    ratios = [each.times[0] for each in found]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"


def shown(results: Results, op: str) -> list[Job]:
    """Forward, and both passes together; backward alone is in the CSV file."""
    return [job for job in results.jobs if job.op == op and job.way != "backward" and ours_of(results.of(job))]


def op_tables(results: Results, op: str) -> list[str]:
    jobs = shown(results, op)
    if not jobs:
        return ["No implementation of ours has a time here.", ""]
    split = len(jobs) > MANY
    parts: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        parts.setdefault((job.what, job.dtype) if split else (), []).append(job)
    lines = []
    for names, of in parts.items():
        if title := ", ".join(filter(None, names)):
            lines += [f"**{title[0].upper()}{title[1:]}**", ""]
        lines += job_table(results, of)
    sizes: dict[str, dict[str, str]] = {}
    for job in filter(lambda job: job.size, jobs):
        sizes.setdefault(job.shape, {}).setdefault(job.size, job.what)
    told = [
        f"{shape}{f', {what}' if what and len(found) > 1 else ''}: {size}"
        for shape, found in sizes.items()
        for size, what in found.items()
    ]
    return [*lines, f"Sizes: {'; '.join(told)}.", ""] if told else lines


def job_table(results: Results, jobs: Sequence[Job]) -> list[str]:
    facets = [name for name in ("shape", "what", "dtype", "way") if len({getattr(job, name) for job in jobs}) > 1]
    facets = facets or ["shape"]
    rows = {job: results.of(job) for job in jobs}
    ours = {job: row for job in jobs if (row := ours_of(rows[job])) is not None}
    others = dict.fromkeys(
        row.implementation for job in jobs for row in rows[job] if row is not ours[job] and ratio(row, ours[job])
    )
    footnote = False
    lines = []
    for job in jobs:
        mine = ours[job]
        line = [WAYS[getattr(job, name)] if name == "way" else getattr(job, name) for name in facets]
        low, high = mine.quartiles
        line.append(f"{duration(mine.median)} ({digits_like(mine.median, low)} – {digits_like(mine.median, high)})")
        by_name = {row.implementation: row for row in rows[job]}
        for name in others:
            told = ratio(by_name[name], mine) if name in by_name else None
            cell = "–" if told is None else times(told)
            if told is not None and told[2] < 1:
                cell = f"**{cell}**"
            if told is not None and by_name[name].missing:
                cell, footnote = f"{cell} †", True
            line.append(cell)
        memory, products = results.shares(mine)
        shares = [percent(share) for share in (memory, products) if share is not None]
        line += [", ".join(shares) or "–", mebibytes_beside(mine, peers_of(rows[job], mine))]
        lines.append(line)
    head = [{"what": "asked", "way": "pass"}.get(name, name) for name in facets]
    products = any(row.flops for row in ours.values())
    head += [
        "ours",
        *others,
        f"of the ceiling{'s: memory, products' if products else ' of memory'}",
        "MiB: ours; peers",
    ]
    told = table(head, lines)
    return [*told, "† gives less than was asked for.", ""] if footnote else told


def digits_like(middle: float, value: float) -> str:
    """A quartile in its median's unit, without it."""
    scale = 1.0 if middle >= 1 else 1e3 if middle >= 1e-3 else 1e6
    return digits(value * scale)


def mebibytes_beside(ours: Row, peers: Sequence[Row]) -> str:
    if ours.peak_bytes is None:
        return "–"
    theirs = [mebibytes(x) for x in sorted(row.peak_bytes for row in peers if row.peak_bytes is not None)]
    told = theirs[:1] if theirs[:1] == theirs[-1:] else [theirs[0], theirs[-1]]
    return "; ".join(filter(None, (mebibytes(ours.peak_bytes), " – ".join(told))))


def predictions(results: Results) -> list[str]:
    """Measured beside predicted, where the GPU is one whose data sheet we have."""
    rows = [row for row in results.rows if row.ours and row.seconds and row.predicted_us]
    found = [row for row in rows if row.job.way != "both"]
    if not found:
        return []
    lines = ["## Measured beside predicted", ""]
    lines += ["µs. What *at least* and *launch by launch* are, says [roofline.md](roofline.md).", ""]
    told = []
    for row in found:
        assert row.predicted_us is not None
        least, launches = row.predicted_us
        measured = 1e6 * row.median
        cells = (measured, least, launches)
        told.append([title_of(row.job), *map(digits, cells), f"{measured / least:.2f}", f"{measured / launches:.2f}"])
    head = ("", "measured", "predicted: at least", "launch by launch", "measured : at least", ": launch by launch")
    return [*lines, *table(head, told)]


def steps(results: Results, kind: str, suffix: str) -> list[str]:
    jobs = [job for job in results.jobs if job.op == "step"]
    if not jobs:
        return []
    lines = [f"## Whole training steps, {kind}", ""]
    lines += [
        "Those who do the same step take turns, too. Instead of to float64 they are held to each other's losses: here"
    ]
    lines += ["where the CSV file has an error for them, ALBEF-base by a test (`tests/test_bench_albef.py`)."]
    if kind == "CPU":
        lines += ["ALBEF-base in float32 takes too long here: `benchmarks/bench_albef_step.py` measures it."]
    lines += [""]
    told = []
    for job in jobs:
        rows = results.of(job)
        ours = ours_of(rows)
        for row in filter(lambda row: row.seconds, rows):
            found = ratio(row, ours) if ours is not None and row is not ours else None
            memory = f"{mebibytes(row.peak_bytes)}" if row.peak_bytes is not None else "–"
            cells = [job.shape, job.size, job.dtype, row.implementation, rate(row), memory]
            told.append([*cells, times(found) if found else ""])
    head = ("step", "of", "precision", "by", "samples/s (quartiles)", "peak memory, MiB", "its time in ours")
    lines += table(head, told)
    parted = [row for row in results.rows if row.job.op == "step" and row.parts]
    if parted:
        total: Counter[str] = Counter()
        for row in parted:
            total.update({name: x / sum(row.parts.values()) for name, x in row.parts.items()})
        names = sorted(total, key=lambda name: (name == REST, -total[name]))
        lines += ["Where its time goes, in a step under PyTorch's profiler:", ""]
        lines += [f"![Parts of a training step](images/performance-steps{suffix}.png)", ""]
        body = []
        for row in parted:
            whole = sum(row.parts.values())
            shares = [percent(row.parts[name] / whole) if name in row.parts else "–" for name in names]
            body.append([f"{row.job.shape}, {row.job.dtype}, {row.implementation}", *shares])
        lines += table(("", *names), body)
    return lines


def rate(row: Row) -> str:
    if not row.samples:
        return f"{duration(row.median)} a step"
    low, high = row.quartiles
    return f"{digits(row.samples / row.median)} ({digits(row.samples / high)} – {digits(row.samples / low)})"


def scaling(results: Results, kind: str) -> list[str]:
    rows = [row for row in results.rows if row.job.op == "scaling" and row.seconds]
    if not rows:
        return []
    alone = {row.job.size.partition(", ")[2]: row for row in rows if row.job.size.startswith("1 rank,")}
    told = []
    for row in rows:
        one = alone.get(row.job.size.partition(", ")[2])
        times_one = f"{one.median / row.median:.2f}" if one is not None and one is not row else ""
        memory = mebibytes(row.peak_bytes) if row.peak_bytes is not None else "–"
        told.append([row.job.shape, row.job.size, row.job.dtype, rate(row), times_one, memory])
    head = ("run", "of", "precision", "samples/s (quartiles)", "× one rank's", "peak memory of a rank, MiB")
    words = ["The batch is the same however many ranks share it."]
    words += ["Each rank has one core, so that two have twice the processor of one."] if kind == "CPU" else []
    return [f"## Several ranks, {kind}", "", " ".join(words), "", *table(head, told)]


def gaps(results: Results) -> list[str]:
    """Who has no time where, and why: a line for each reason."""
    found: dict[tuple[str, str, str], list[Job]] = {}
    for row in results.rows:
        if not row.seconds:
            found.setdefault((row.implementation, row.status, row.reason), []).append(row.job)
    if not found:
        return ["Every implementation has a time in every job.", ""]
    lines = ([*key, where(jobs)] for key, jobs in found.items())
    return table(("implementation", "", "why", "where"), lines)


def where(jobs: Sequence[Job]) -> str:
    if len(jobs) == 1:
        return title_of(jobs[0])
    by_op = Counter(job.op for job in jobs)
    return ", ".join(f"`{op}` ({plural(count, 'job')})" for op, count in by_op.items())


def notes(results: Results) -> list[str]:
    found: dict[tuple[str, str, str], None] = {}
    for row in results.rows:
        told = "; ".join(filter(None, (row.reason, row.missing and f"does not give {', '.join(row.missing)}")))
        if row.seconds and told:
            found[row.implementation, row.job.op, told] = None
    ops: dict[tuple[str, str], list[str]] = {}
    for name, op, told in found:
        ops.setdefault((name, told), []).append(f"`{op}`")
    lines = ([name, told, ", ".join(of)] for (name, told), of in ops.items())
    return table(("implementation", "to know", "where"), lines) if ops else []


def slowest(results: Results) -> Standing | None:
    return min((each for each in standings(results) if each.place == "slower"), key=lambda x: x.times[0], default=None)


def step_ratios(results: Results) -> Iterator[Standing]:
    for job in results.jobs:
        if job.op == "step" and (found := standing(results.of(job))) is not None:
            yield found
