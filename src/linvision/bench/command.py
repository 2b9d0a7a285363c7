"""The command itself: count, probe memory, let the contenders take turns, write the results."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from linvision.bench.contenders import Contender, Lineup, Setting, Step, count_flops
from linvision.bench.machine import describe_machine, measure_peaks, synchronize
from linvision.bench.measure import alternate, ratios, spread
from linvision.bench.options import BenchOptions
from linvision.bench.picture import draw
from linvision.bench.plan import Plan, make_plan
from linvision.bench.probe import CPUProbes, Probe, available_memory, gpu_probe
from linvision.bench.report import Ratio, Report, Row, as_csv, as_json
from linvision.bench.tables import grids
from linvision.console import notes, output, write_json
from linvision.errors import UsageError
from linvision.files import write_json as write_json_file
from linvision.files import write_text
from linvision.ops import keep_freed_memory

FILES = ("bench.json", "bench.csv", "bench.png")
SHARE_OF_FREE_MEMORY = 0.8
BUSY = 0.3  # load per core at the start, from which other programs are to be suspected
FORMS_OF_OUTPUT = ("out", "overwrite", "json", "markdown")
Times = dict[str, list[float]]
ProbeFunction = Callable[[Contender, Setting], Probe]


def bench(options: BenchOptions) -> int:
    """Run ``linvision bench``."""
    plan = make_plan(options)
    keep_freed_memory()  # for all contenders alike, whether they run kernels of ours or not
    folder = None if options.out is None else Path(options.out)
    if folder is not None:
        _check_folder(folder, options.overwrite)
        folder.mkdir(parents=True, exist_ok=True)
    with _torch_settings(options):
        report = _measure(options, plan, folder)
    if folder is not None:
        draw(folder / "bench.png", report)
    _show(options, report)
    return 0


def measure_setting(
    lineup: Lineup,
    setting: Setting,
    *,
    probe: ProbeFunction,
    take_times: Callable[[dict[str, Step]], Times],
    flops: Mapping[str, int],
) -> list[Row]:
    """Measure every contender in one setting.

    Args:
        lineup: who meets whom.
        setting: the circumstances.
        probe: runs one contender and returns its memory; those that fail there are not timed.
        take_times: times prepared contenders in turns; of one that runs out of memory it returns no time.
        flops: operations of a call, by label.
    """
    probes = {contender.label: probe(contender, setting) for contender in lineup.contenders}
    fitting = [contender for contender in lineup.contenders if probes[contender.label].status == "ok"]
    times = take_times({contender.label: contender.prepare(setting) for contender in fitting})
    rows = []
    for contender in lineup.contenders:
        label = contender.label
        result, own = probes[label], times.get(label, [])
        if result.status == "ok" and not own:
            result = replace(result, status="out of memory", note="once the others were loaded too")
        rows.append(
            Row(
                contender=label,
                setting=setting,
                status=result.status,
                note=result.note,
                seconds=spread(own) if own else None,
                rounds=len(own),
                peak_memory=result.peak,
                flops=flops[label],
                traffic=result.traffic,
                ratios={kind: _ratio(label, peer, probes, times) for kind, peer in lineup.references[label].items()},
            )
        )
    return rows


def _ratio(label: str, peer: str, probes: dict[str, Probe], times: Times) -> Ratio:
    own, other = times.get(label), times.get(peer)
    memory, peer_memory = probes[label].peak, probes[peer].peak
    return Ratio(
        peer,
        time=ratios(own, other) if own and other else None,
        memory=memory / peer_memory if memory is not None and peer_memory else None,
    )


def _measure(options: BenchOptions, plan: Plan, folder: Path | None) -> Report:
    device, lineup = plan.settings[0].device, plan.lineup
    machine = describe_machine(device)
    if device == "cpu" and machine["load"] > BUSY * machine["cores"]:
        notes().print(f"other programs are running (load {machine['load']}): times will be off")
    flops = {
        setting: {contender.label: count_flops(contender, setting) for contender in lineup.contenders}
        for setting in plan.settings
    }
    peaks = measure_peaks(device, list(dict.fromkeys(setting.dtype for setting in plan.settings)))
    recorded = {name: value for name, value in asdict(options).items() if name not in FORMS_OF_OUTPUT}
    report = Report((), machine, options.command(), recorded, peaks, plan.unit)
    with _progress(len(plan.settings) * (len(lineup.contenders) + 1)) as announce, _probing(options, device) as probe:

        def probe_next(contender: Contender, setting: Setting) -> Probe:
            announce(f"{setting.mode}, size {setting.size}: memory of {contender.label}")
            return probe(contender, setting)

        def take_times(steps: dict[str, Step]) -> Times:
            announce(f"times of these {len(steps)} in turns")
            return alternate(
                steps, rounds=options.rounds, seconds=options.seconds, synchronize=lambda: synchronize(device)
            )

        for setting in plan.settings:
            rows = measure_setting(lineup, setting, probe=probe_next, take_times=take_times, flops=flops[setting])
            report = replace(report, rows=(*report.rows, *rows))
            gc.collect()
            if folder is not None:  # after every setting, so that a run that is stopped leaves what it has
                write_json_file(folder / "bench.json", as_json(report))
                write_text(folder / "bench.csv", as_csv(report))
    return report


def _probing(options: BenchOptions, device: str) -> AbstractContextManager[ProbeFunction]:
    if device == "cuda":
        return nullcontext(gpu_probe)
    free = available_memory()
    if options.max_memory is not None:
        allowed = options.max_memory * 2**30
    else:
        allowed = SHARE_OF_FREE_MEMORY * free if free is not None else 2**62
    return CPUProbes(max_memory=int(allowed), threads=torch.get_num_threads())


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Give a function that announces the next step: on a bar on a terminal, else as a line."""
    console = notes()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, start=True)
        begun = 0

        def announce(text: str) -> None:
            nonlocal begun
            bar.update(task, description=text, completed=begun)
            begun += 1
            if not console.is_terminal:
                console.print(f"{begun}/{total} {text}", markup=False)

        yield announce


@contextmanager
def _torch_settings(options: BenchOptions) -> Iterator[None]:
    """Set threads and TF32 as asked for, and put them back."""
    threads = torch.get_num_threads()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.set_num_threads(options.threads or threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse to replace results.

    Raises:
        UsageError: the folder holds some, or is a file.
    """
    if folder.is_file():
        raise UsageError(f"--out {folder} is a file: give a folder")
    present = [name for name in FILES if (folder / name).exists()]
    if present and not overwrite:
        raise UsageError(f"--out {folder} holds {present[0]} already: give another folder, or --overwrite")


def _show(options: BenchOptions, report: Report) -> None:
    if options.json:
        write_json(as_json(report))
        return
    if options.markdown:
        parts = [*(grid.markdown() for grid in grids(report)), f"`{report.command}`", *_remarks(report)]
        sys.stdout.write("\n\n".join(parts) + "\n")
        return
    console = output()
    for grid in grids(report):
        console.print(grid.rich())
    for line in _remarks(report):
        console.print(line, markup=False)


def _remarks(report: Report) -> list[str]:
    machine, peaks = report.machine, report.peaks
    products = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in peaks["flops_per_second"].items())
    flags: list[Any] = [name for name in ("autocast", "compile", "tf32") if report.options.get(name)]
    flags += [f"{report.options['checkpointing']} checkpointing"] if report.options["checkpointing"] != "none" else []
    flags += [f"backend {report.options['backend']}"] if report.options["backend"] != "auto" else []
    lines = [
        f"{row.contender}, size {row.setting.size}, {row.setting.mode}: {row.status}, {row.note}"
        for row in report.rows
        if row.status != "ok"
    ]
    return [
        *lines,
        f"{machine['gpu'] or machine['cpu']}, CPU threads: {machine['threads']}, {machine['instructions']}; torch "
        f"{machine['torch']}, timm {machine['timm']}, linvision {machine['linvision']}, {machine['kernels']}; "
        f"{', '.join(flags) or 'no autocast, compile or TF32'}; load {machine['load']} before.",
        f"Peaks measured here: matrix product {products}; copy {peaks['bytes_per_second'] / 1e9:.1f} GB/s.",
        "Times: medians (quartiles) of alternating runs; ratios are medians of those within a round. Peak MB: above "
        f"the loaded {'model' if report.unit == 'image' else 'inputs'}. A multiply-add counts as 2 FLOP, a backward "
        "pass as 2 forward ones; GB/s counts what operators read and write, as if none of it stayed in cache.",
    ]
