"""The benchmark: its arithmetic from fake clocks, its counts, memory in processes of its own, and what it writes."""

import csv
import json
import signal
from contextlib import nullcontext
from dataclasses import dataclass, fields
from importlib.util import find_spec

import pytest
import torch

import linvision
from linvision.bench import command, machine, models
from linvision.bench.activations import count_activations
from linvision.bench.command import bench, measure_setting
from linvision.bench.contenders import Lineup, Setting, TrafficCounter, count_flops
from linvision.bench.measure import alternate, crossover, growth_exponent, is_out_of_memory, ratios, spread
from linvision.bench.models import ModelContender, model_lineup, yardstick
from linvision.bench.ops import OPS, OpContender, op_lineup
from linvision.bench.options import BenchOptions
from linvision.bench.plan import make_plan
from linvision.bench.probe import CPUProbes, Probe, available_memory, interpret_end
from linvision.bench.report import Ratio, Report, Row, as_csv, as_json, crossovers, growth
from linvision.bench.tables import grids
from linvision.errors import BackendError, RunError, UsageError
from linvision.ops import dispatch

MINI = "vil2_mini_patch4_32"
OUT_OF_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


class FakeTime:
    """A clock that only the steps move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def step(self, label: str, durations):
        durations = iter(durations)

        def run() -> None:
            self.order.append(label)
            duration = next(durations)
            if isinstance(duration, Exception):
                raise duration
            self.now += duration

        return run

    def alternate(self, steps, *, rounds=3, seconds=1e9):
        return alternate(steps, rounds=rounds, seconds=seconds, synchronize=lambda: None, clock=lambda: self.now)


def test_contenders_take_turns_and_every_second_round_runs_backwards():
    time = FakeTime()
    times = time.alternate({"a": time.step("a", [3, 3, 4, 5]), "b": time.step("b", [9, 6, 8, 25])})
    assert times == {"a": [3, 4, 5], "b": [6, 8, 25]}
    assert "".join(time.order) == "ab" + "ab" + "ba" + "ab"


def test_short_calls_are_repeated_within_a_sample():
    time = FakeTime()
    times = time.alternate({"a": time.step("a", [0.02] * 100)})
    assert times["a"] == pytest.approx([0.02] * 3)
    assert len(time.order) == 3 + 3 * 3


def test_no_round_is_begun_after_the_time_but_there_are_three():
    time = FakeTime()
    assert len(time.alternate({"a": time.step("a", [5] * 50)}, rounds=40, seconds=1)["a"]) == 3
    assert len(time.alternate({"a": time.step("a", [5] * 50)}, rounds=40, seconds=31)["a"]) == 7


@pytest.mark.parametrize("durations", [[OUT_OF_MEMORY], [3, 3, MemoryError()]], ids=["at once", "later"])
def test_a_contender_that_runs_out_of_memory_leaves_the_others(durations):
    time = FakeTime()
    times = time.alternate({"a": time.step("a", durations), "b": time.step("b", [3] * 9)})
    assert times == {"a": [], "b": [3, 3, 3]}


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    time = FakeTime()
    with pytest.raises(RuntimeError, match="shapes"):
        time.alternate({"a": time.step("a", [RuntimeError("shapes disagree")])})
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))


def test_ratios_are_taken_within_rounds():
    # The second round met a busy machine: both were slow, and their ratio stayed.
    assert ratios([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == spread([2.0, 2.0, 3.0])
    summary = spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (summary.low, summary.median, summary.high) == (2, 3, 4)
    assert spread([7.0]).high == 7


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_growth_exponent_of_a_power(exponent):
    amounts = [196, 1024, 6084]
    assert growth_exponent(amounts, [3e-4 * a**exponent for a in amounts]) == pytest.approx(exponent)


def test_growth_needs_two_amounts():
    assert growth_exponent([196], [1.0]) is None
    assert growth_exponent([], []) is None


def test_crossover():
    sizes = [100, 200, 400, 800]
    linear, quadratic = [3.0 * s for s in sizes], [s**2 / 100 for s in sizes]
    assert crossover(sizes, linear, quadratic) == pytest.approx(300)
    assert crossover(sizes, quadratic, linear) is None, "slower in the end"
    assert crossover(sizes[2:], linear[2:], quadratic[2:]) is None, "faster from the start"
    assert crossover(sizes, [2, 0.5, 2, 0.5], [1, 1, 1, 1]) == pytest.approx(800 / 2**0.5), "the last one counts"
    assert crossover([], [], []) is None


@dataclass(frozen=True)
class Fake:
    """A contender that does nothing."""

    label: str
    token_by_token: bool = False

    def prepare(self, setting: Setting):
        return lambda: None

    def countable(self) -> "Fake":
        return self


def fake_rows(setting: Setting, probes: dict[str, Probe], times: dict[str, list[float]]) -> dict[str, Row]:
    timed = []
    rows = measure_setting(
        Lineup((Fake("ours"), Fake("deit")), {"ours": {"fused": "deit"}, "deit": {}}),
        setting,
        probe=lambda contender, _: probes[contender.label],
        take_times=lambda steps: timed.extend(steps) or {label: times[label] for label in steps},
        flops={"ours": 10, "deit": 40},
    )
    assert timed == [label for label, probe in probes.items() if probe.status == "ok"]
    return {row.contender: row for row in rows}


def test_rows_hold_medians_and_ratios():
    probes = {"ours": Probe("ok", 300, 7), "deit": Probe("ok", 1000, 9)}
    rows = fake_rows(Setting(32, 2), probes, {"ours": [2.0, 4.0, 9.0], "deit": [1.0, 2.0, 3.0]})
    assert rows["ours"].seconds == spread([2.0, 4.0, 9.0])
    assert rows["ours"].ratios == {"fused": Ratio("deit", spread([2.0, 2.0, 3.0]), 0.3)}
    assert (rows["deit"].ratios, rows["deit"].rounds, rows["deit"].flops, rows["deit"].traffic) == ({}, 3, 40, 9)


def test_out_of_memory_is_a_row():
    probes = {"ours": Probe("ok", 300), "deit": Probe("out of memory", note="more than 1.0 GiB needed")}
    rows = fake_rows(Setting(32, 1), probes, {"ours": [1.0]})
    assert (rows["deit"].status, rows["deit"].note, rows["deit"].seconds) == (
        "out of memory",
        "more than 1.0 GiB needed",
        None,
    )
    assert rows["ours"].ratios == {"fused": Ratio("deit", None, None)}
    late = fake_rows(Setting(32, 1), {"ours": Probe("ok", 1), "deit": Probe("ok", 1)}, {"ours": [1.0], "deit": []})
    assert late["deit"].status == "out of memory"


def fake_report(unit: str = "image") -> Report:
    """Return a report of a linear model and a DeiT that is quadratic in the pixels and does not fit at 1024."""
    rows = []
    for side in (128, 256, 512, 1024):
        pixels = float(side**2)
        fits = side < 1024
        times = {"ours": [pixels * factor * 1e-6 for factor in (3, 4, 5)]}
        times["deit"] = [(pixels * 1e-4) ** 2 * factor * 1e-3 for factor in (3, 4, 5)] if fits else []
        probes = {
            "ours": Probe("ok", int(pixels), int(pixels)),
            "deit": Probe("ok", int(pixels**2)) if fits else Probe("out of memory", note="killed by the system"),
        }
        rows += fake_rows(Setting(side, 2), probes, times).values()
    peaks = {"flops_per_second": {"float32": 1e4}, "bytes_per_second": 1e7}
    made_on = {"cpu": "a processor", "gpu": None, "threads": 2}
    return Report(tuple(rows), made_on, "linvision bench", {"seed": 0}, peaks, unit)


def test_records_are_derived_from_medians():
    record = as_json(fake_report())["rows"][0]
    seconds = 4e-6 * 128**2
    assert record["ms_per_image"] == pytest.approx(1e3 * seconds / 2)
    assert record["ms_per_image_high"] == pytest.approx(1e3 * seconds / 2 * 4.5 / 4)
    assert record["images_per_second"] == pytest.approx(2 / seconds)
    assert record["flops_per_second"] == pytest.approx(10 / seconds)
    assert record["flops_share_of_peak"] == pytest.approx(10 / seconds / 1e4)
    assert record["bytes_per_second"] == pytest.approx(4**-1 * 1e6)
    assert record["bytes_share_of_peak"] == pytest.approx(0.025)
    assert record["time_over_fused"] == pytest.approx(4e-6 * 128**2 / (4e-3 * 1.6384**2))


def test_growth_and_crossover_of_a_report():
    fits = {fit["contender"]: fit for fit in growth(fake_report())}
    assert fits["ours"]["time"] == pytest.approx(1)
    assert fits["ours"]["memory"] == pytest.approx(1)
    assert fits["deit"]["time"] == pytest.approx(2)
    assert fits["deit"]["sizes"] == [128, 256, 512]
    (cross,) = crossovers(fake_report())
    assert (cross["contender"], cross["peer"]) == ("ours", "deit")
    assert cross["time"] == pytest.approx(1e5**0.5)  # 4e-6 p = 4e-3 (1e-4 p)^2
    assert cross["memory"] is None, "less from the smallest size on"


def test_csv_and_json_agree():
    report = fake_report()
    records = as_json(report)["rows"]
    lines = list(csv.DictReader(as_csv(report).splitlines()))
    assert len(lines) == len(records) == 8
    for line, record in zip(lines, records, strict=True):
        assert {key: value for key, value in line.items() if value} == {
            key: str(value) for key, value in record.items() if value not in (None, "")
        }
    assert lines[-1]["status"] == "out of memory"
    assert lines[-1]["ms_per_image"] == ""


def test_tables():
    figures, fits, crossed = grids(fake_report())
    text = figures.markdown()
    assert "| ours | 128 | 32.77 (28.67–36.86) | 30.5 |" in text
    assert "| deit | 1024 | out of memory |" in text
    assert figures.rich().row_count == 8
    assert fits.rows[0][-2:] == ("1", "1")
    assert crossed.rows == (("ours", "deit", "inference, float32, batch 2", "316", ""),)
    assert "tokens" in grids(fake_report("sequence"))[0].header


def test_traffic_counts_what_operators_read_and_write():
    x, y = torch.ones(8, 4), torch.ones(4)

    def count(step) -> int:
        with TrafficCounter() as counter:
            step()
        return counter.bytes

    assert count(lambda: x + y) == 4 * (32 + 4 + 32)
    assert count(lambda: x.add_(y)) == 4 * (32 + 4 + 32)
    assert count(lambda: x + y[:1].expand(8, 4)) == 4 * (32 + 4 + 32)
    assert count(lambda: x.view(4, 8).transpose(0, 1)[1:]) == 0
    assert count(lambda: torch.empty(100)) == 0


def test_flops_count_scans_attention_and_batches():
    deit = [ModelContender("deit_tiny_patch16_224", peer) for peer in ("fused", "explicit")]
    fused, explicit = (count_flops(contender, Setting(224, 1)) for contender in deit)
    assert fused == explicit
    assert fused / 2 == pytest.approx(1.26e9, rel=0.01)
    assert count_flops(deit[0], Setting(224, 8, mode="training")) == 24 * fused
    linear, parallel, loop = (
        [count_flops(OpContender("mlstm", peer, 64), Setting(size, 1)) for size in (1024, 4096)]
        for peer in ("", "parallel", "sequential")
    )
    assert linear[1] / linear[0] == pytest.approx(4, rel=0.2)
    assert parallel[1] == 16 * parallel[0]
    assert loop == linear


def test_backends_are_chosen_for_what_is_measured(monkeypatch):
    used = []
    monkeypatch.setattr(models, "use_backend", lambda name: used.append(name) or nullcontext())
    for contender in (ModelContender(MINI), ModelContender(MINI, "plain")):
        contender.prepare(Setting(32, 1, backend="auto"))()
    ModelContender(MINI).prepare(Setting(32, 1, backend="cpp"))()
    assert used == ["auto", "plain", "cpp"]
    assert make_plan(BenchOptions(backend="plain")).settings[0].backend == "plain"
    with pytest.raises(BackendError, match="cannot run"):
        OpContender("mlstm", "", 16).prepare(Setting(8, 1, dtype="float64", backend="cpp"))()


def test_a_size_that_a_model_refuses_is_a_usage_error():
    with pytest.raises(UsageError, match=f"{MINI} does not take size 30: .*multiple"):
        count_flops(ModelContender(MINI), Setting(30, 1))


def test_each_model_meets_the_deit_of_its_width():
    lineup = model_lineup(["vil2-tiny", "vil2_small_patch16_224", MINI], ["fused", "parallel"])
    assert [contender.label for contender in lineup.contenders] == [
        "vil2_tiny_patch16_224",
        "vil2_tiny_patch16_224 (parallel)",
        "deit_tiny_patch16_224 (fused)",
        "vil2_small_patch16_224",
        "vil2_small_patch16_224 (parallel)",
        "deit_small_patch16_224 (fused)",
        MINI,
        f"{MINI} (parallel)",
        "deit_tiny_patch16_224 (fused, patch 4)",
    ]
    assert lineup.references[MINI] == {
        "fused": "deit_tiny_patch16_224 (fused, patch 4)",
        "parallel": f"{MINI} (parallel)",
    }
    assert lineup.references["deit_small_patch16_224 (fused)"] == {}
    deit = model_lineup(["deit_tiny_patch16_224"], ["fused", "explicit"])
    assert deit.references["deit_tiny_patch16_224 (explicit)"] == {"fused": "deit_tiny_patch16_224 (fused)"}
    assert len(deit.contenders) == 2
    plain = model_lineup([MINI, "deit_tiny_patch16_224"], ["plain"])
    assert plain.references[MINI] == {"plain": f"{MINI} (plain)"}
    assert plain.references["deit_tiny_patch16_224"] == {}
    assert yardstick("resnet", torch.nn.Identity()) == ("deit_tiny_patch16_224", None)


def test_explicit_attention_computes_the_same():
    outputs = []
    for peer in ("fused", "explicit"):
        model, image = ModelContender("deit_tiny_patch16_224", peer, 4).build(Setting(16, 2))
        assert {layer.fused_attn for layer in model.modules() if hasattr(layer, "fused_attn")} == {peer == "fused"}
        outputs.append(model(image))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_the_kernels_of_a_device_are_named(monkeypatch):
    assert "C++" in machine.kernels_on("cpu")
    monkeypatch.setattr(machine, "unusable", lambda x: None if x.device.type == "meta" else "not here")
    if find_spec("triton") is not None:
        assert machine.kernels_on("meta").startswith("Triton kernels (")
    monkeypatch.setattr(machine, "unusable", lambda x: "an old GPU")
    assert machine.kernels_on("meta") == "no Triton kernels: an old GPU"


def test_a_model_runs_with_its_op_in_another_form(monkeypatch):
    torch.manual_seed(0)
    model, calls = linvision.create_model(MINI).eval(), []
    image = torch.randn(1, 3, 32, 32)

    parallel = dispatch.OPS["mlstm"].forms["parallel"]

    def counted(*tensors, **options):
        calls.append(1)
        return parallel(*tensors, **options)

    monkeypatch.setitem(dispatch.OPS["mlstm"].forms, "parallel", counted)
    with torch.no_grad(), dispatch.use_backend("parallel"):
        other = model(image)
    assert len(calls) == 4, "the model has four mLSTM layers"
    with torch.no_grad():
        torch.testing.assert_close(model(image), other)
    assert len(calls) == 4


@pytest.mark.parametrize(("op", "peer"), [(op, peer) for op in OPS for peer in OPS[op]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_form_of_every_op_runs(op, peer, dtype, mode):
    lineup = op_lineup(op, [peer], 16)
    step = lineup.contenders[-1].prepare(Setting(9, 2, dtype=dtype, mode=mode))
    with TrafficCounter() as counter:
        step()
    assert counter.bytes > 9 * 2 * 16


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step_changes_the_weights(autocast):
    contender, built = ModelContender(MINI), []
    setting = Setting(16, 2, dtype="bfloat16", mode="training", autocast=autocast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ModelContender, "build", lambda *args, build=ModelContender.build: built.append(build(*args)) or built[0]
        )
        step = contender.prepare(setting)
    ((model, image),) = built
    before = model.head.bias.detach().clone()
    assert image.dtype == (torch.float32 if autocast else torch.bfloat16)
    step()
    assert not torch.equal(model.head.bias, before)


@pytest.mark.parametrize("name", [MINI, "deit_tiny_patch16_224"])
def test_contenders_checkpoint_as_the_setting_says(name):
    kept = []
    for checkpointing in ("none", "selective", "full"):
        setting = Setting(32, 2, mode="training", checkpointing=checkpointing)
        kept.append(count_activations(*ModelContender(name, "fused").build(setting)))
    assert kept[0].total > kept[1].total > kept[2].total
    assert all(one.peak >= one.total for one in kept)
    assert sum(kept[0].by_block().values()) == kept[0].total == sum(k.bytes * n for k, n in kept[0].by_kind())


@pytest.fixture(scope="module")
def probes():
    with CPUProbes(max_memory=300 * 2**20, threads=1) as server:
        yield server


def test_memory_is_measured_in_a_process_of_its_own(probes):
    parallel, linear = (probes(OpContender("mlstm", peer, 16), Setting(1024, 1)) for peer in ("parallel", ""))
    matrix = 4 * 1024**2 * 8  # one float64 matrix for each of four heads
    assert matrix < parallel.peak < 6 * matrix
    assert parallel.traffic > 2 * matrix
    assert 0 <= linear.peak < matrix / 4


def test_training_takes_more_memory_than_inference(probes):
    peaks = [probes(ModelContender(MINI), Setting(32, 1, mode=mode)).peak for mode in ("inference", "training")]
    weights = 4 * sum(p.numel() for p in linvision.create_model(MINI).parameters())
    assert peaks[0] < weights, "the weights themselves are not counted"
    assert peaks[1] > peaks[0] + 3 * weights, "gradients and AdamW's two moments are"


def test_memory_that_runs_out_in_a_process_is_an_answer_and_not_its_end(probes):
    probe = probes(OpContender("mlstm", "parallel", 16), Setting(8192, 1))
    assert (probe.status, probe.peak) == ("out of memory", None)
    assert "0.3 GiB" in probe.note
    assert probes(OpContender("mlstm", "", 16), Setting(64, 1)).status == "ok"


def test_other_failures_in_a_process_are_reported(probes):
    with pytest.raises(RunError, match="nonsense"):
        probes(OpContender("mlstm", "nonsense", 16), Setting(8, 1))
    assert probes(OpContender("mlstm", "", 16), Setting(64, 1)).status == "ok"


def test_a_process_that_is_killed_is_out_of_memory():
    assert interpret_end(signal.SIGKILL).status == "out of memory"
    assert interpret_end(signal.SIGABRT).status == "out of memory"
    assert interpret_end(signal.SIGSEGV) == Probe("crashed", note="ended with signal SIGSEGV")
    assert interpret_end(256 * 3) == Probe("crashed", note="ended with exit code 3")
    assert available_memory() is None or available_memory() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": "bfloat"}, "--dtypes does not know bfloat; did you mean bfloat16"),
        ({"modes": "train"}, "--modes does not know train; did you mean training"),
        ({"peers": "resnet"}, "--peers does not know resnet; it takes fused, explicit"),
        ({"op": "selective_scan", "peers": "parallel"}, "--peers does not know parallel"),
        ({"models": "vil2-tinny"}, "vil2-tiny"),
        ({"models": ","}, "--models names nothing"),
        ({"sizes": "224x224"}, "--sizes takes whole numbers above 0"),
        ({"batch_sizes": "0"}, "--batch-sizes takes whole numbers above 0"),
        ({"rounds": 2}, "--rounds 2 is out of range: it must be at least 3"),
        ({"max_memory": 0.0}, "--max-memory 0.0 is out of range"),
        ({"op": "mlstm", "width": 30}, "multiple of 4"),
        ({"op": "mlstm", "compile": True}, "--compile is for models"),
        ({"op": "mlstm", "autocast": True}, "--autocast is for models"),
        ({"checkpointing": "full"}, "give --modes training"),
        ({"compile": True, "peers": "sequential"}, "leave out --compile"),
        ({"json": True, "markdown": True}, "exclude each other"),
        ({"dtypes": "float16", "device": "cpu"}, "needs a GPU"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(BenchOptions(**options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must not be there")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="--device cuda: torch sees no GPU"):
        make_plan(BenchOptions(device="cuda"))


def test_plan_crosses_everything():
    plan = make_plan(
        BenchOptions(
            models=MINI, sizes="64,32", batch_sizes="1,2", modes="inference,training", device="cpu", peers="none"
        )
    )
    assert len(plan.settings) == len(set(plan.settings)) == 8
    assert [setting.size for setting in plan.settings[:2]] == [32, 64]
    assert [contender.label for contender in plan.lineup.contenders] == [MINI]


def test_the_command_can_be_given_again():
    options = BenchOptions(models="vil2*,a b", sizes="32", tf32=True, out="somewhere", markdown=True)
    assert options.command() == "linvision bench --models 'vil2*,a b' --sizes 32 --tf32"


def test_every_option_is_explained():
    for field in fields(BenchOptions):
        assert f"\n        {field.name}: " in (BenchOptions.__doc__ or ""), field.name


@pytest.fixture
def quick(monkeypatch):
    """Measure the machine's peaks on next to nothing."""
    monkeypatch.setitem(machine.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(machine.COPIED_BYTES, "cpu", 2**20)


def test_threads_and_tf32_are_set_and_put_back():
    with command._torch_settings(BenchOptions(threads=3, tf32=True)):
        assert torch.get_num_threads() == 3
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.get_num_threads() == 1
    assert not torch.backends.cuda.matmul.allow_tf32


def test_models_from_options_to_files(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "CPUProbes", FakeProbes)
    options = {"models": MINI, "sizes": "16,32", "peers": "fused", "rounds": 3, "seconds": 0.0, "threads": 1}
    folder = tmp_path / "a" / "b"
    assert bench(BenchOptions(**options, device="cpu", out=str(folder), json=True)) == 0
    content = json.loads((folder / "bench.json").read_text())
    assert json.loads(capsys.readouterr().out) == content
    assert [(row["contender"], row["size"], row["status"]) for row in content["rows"]] == [
        (label, size, "ok") for size in (16, 32) for label in (MINI, "deit_tiny_patch16_224 (fused, patch 4)")
    ]
    for row in content["rows"]:
        assert row["rounds"] == 3
        assert row["ms_per_image_low"] <= row["ms_per_image"] <= row["ms_per_image_high"]
        assert row["flops"] > 0
        assert row["traffic_bytes"] > 0
    assert content["rows"][0]["time_over_fused"] > 0
    assert (content["machine"]["threads"], content["options"]["threads"]) == (1, 1)
    assert {"cpu", "torch", "timm", "instructions", "kernels", "load"} <= set(content["machine"])
    assert content["command"].startswith(f"linvision bench --models {MINI} --sizes 16,32")
    assert len((folder / "bench.csv").read_text().splitlines()) == 5
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="--overwrite"):
        bench(BenchOptions(**options, device="cpu", out=str(folder)))


def test_op_that_does_not_fit_is_a_row_of_the_table(quick, capsys):
    options = BenchOptions(
        op="mlstm", sizes="64,4096", width=16, rounds=3, seconds=0.0, threads=1, max_memory=0.2, device="cpu"
    )
    assert bench(options) == 0
    shown = capsys.readouterr()
    assert "mlstm (parallel), size 4096, inference: out of memory, more than 0.2 GiB needed" in shown.out
    assert "5/6 inference, size 4096: memory of mlstm (parallel)" in shown.err


def test_markdown(quick, capsys, monkeypatch):
    monkeypatch.setattr(command, "CPUProbes", FakeProbes)
    options = BenchOptions(op="selective_scan", sizes="8", width=8, rounds=3, seconds=0.0, device="cpu", markdown=True)
    assert bench(options) == 0
    shown = capsys.readouterr().out
    assert "**forward, float32, batch 1**\n\n| contender | tokens | ms/sequence |" in shown
    assert "| selective_scan (sequential) | 8 |" in shown
    assert "`linvision bench --op selective_scan --sizes 8 --width 8 --rounds 3 --seconds 0.0 --device cpu`" in shown


class FakeProbes:
    """Answers without a process."""

    def __init__(self, *, max_memory: int, threads: int) -> None:
        assert max_memory > 0
        assert threads == torch.get_num_threads()

    def __enter__(self):
        return lambda contender, setting: Probe("ok", 1000, 1000)

    def __exit__(self, *error) -> None:
        pass
