"""Writers, progress and the clock of a run."""

import io
import json
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from octo_like.training import hardware, metrics
from octo_like.training.clock import Clock
from octo_like.training.progress import MARKS, Progress, format_seconds


class FakeTime:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tensorboard_events(workdir):
    """{tag: [(step, value)]} of what a TensorBoard would read."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    (file,) = (workdir / "tensorboard").glob("events.out.tfevents.*")
    content, events = file.read_bytes(), {}
    while content:
        length = int.from_bytes(content[:8], "little")
        body = content[12 : 12 + length]
        assert int.from_bytes(content[12 + length : 16 + length], "little") == masked_crc32c(body)
        event = event_pb2.Event.FromString(body)
        for value in event.summary.value:
            events.setdefault(value.tag, []).append((event.step, value))
        content = content[16 + length :]
    return events


class TestWriter:
    def test_scalars_go_everywhere(self, tmp_path):
        with metrics.MetricsWriter(tmp_path / "run") as writer, jax.transfer_guard("disallow"):
            pass
        x = jnp.float32(0.25)
        with metrics.MetricsWriter(tmp_path) as writer:
            with jax.transfer_guard("disallow"):
                writer.scalars(1, {"train/loss": x, "lr": np.float64(1e-3), "n": 3})
            writer.scalars(2, {"train/loss": float("nan")})
        first, second = metrics.read_metrics(tmp_path)
        assert {k: first[k] for k in ("step", "train/loss", "lr", "n")} == {
            "step": 1,
            "train/loss": 0.25,
            "lr": 1e-3,
            "n": 3.0,
        }
        assert np.isnan(second["train/loss"])
        events = tensorboard_events(tmp_path)
        assert [(step, v.simple_value) for step, v in events["train/loss"]][0] == (1, 0.25)
        assert set(events) == {"train/loss", "lr", "n"}

    def test_pictures_and_text(self, tmp_path):
        rng = np.random.default_rng(0)
        picture = rng.integers(0, 256, (5, 7, 3), np.uint8)
        frames = [np.full((6, 8, 3), value, np.uint8) for value in (0, 128, 255)]
        with metrics.MetricsWriter(tmp_path) as writer:
            writer.images(3, {"plots/arm": picture})
            writer.video(3, "rollouts/arm", frames, fps=5)
            writer.text(0, "config", "seed: 1")
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "media/plots/arm/3.png")), picture)
        gif = Image.open(tmp_path / "media/rollouts/arm/3.gif")
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (3, (8, 6), 200)
        assert (tmp_path / "media/config/0.txt").read_text() == "seed: 1"
        events = tensorboard_events(tmp_path)
        png = events["plots/arm"][0][1].image.encoded_image_string
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), picture)
        assert Image.open(io.BytesIO(events["rollouts/arm"][0][1].image.encoded_image_string)).n_frames == 3
        assert any(tag.startswith("config") for tag in events)

    def test_wrong_pictures(self, tmp_path):
        with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
            with pytest.raises(ValueError, match=r"p: expected \(h, w, 3\) uint8, got \(4, 4, 3\) float32"):
                writer.images(0, {"p": np.zeros((4, 4, 3), np.float32)})
            with pytest.raises(ValueError, match=r"v: expected \(t, h, w, 3\) uint8, got \(0,"):
                writer.video(0, "v", [])

    def test_other_processes_write_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with metrics.MetricsWriter(tmp_path / "run", wandb={"project": "p"}) as writer:
            writer.scalars(1, {"a": 1})
            writer.images(1, {"a": np.zeros((2, 2, 3), np.uint8)})
            writer.video(1, "a", np.zeros((1, 2, 2, 3), np.uint8))
            writer.text(1, "a", "b")
        assert list(tmp_path.iterdir()) == []

    def test_wandb_missing(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'octo_like\[wandb\]'"):
            metrics.MetricsWriter(tmp_path / "run", wandb={"project": "p"})
        assert list(tmp_path.iterdir()) == []

    def test_wandb_gets_the_same_and_keeps_its_id_over_restarts(self, tmp_path, monkeypatch):
        calls = []
        run = types.SimpleNamespace(
            log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
        )
        inits = []
        fake = types.SimpleNamespace(
            init=lambda **kwargs: inits.append(kwargs) or run,
            util=types.SimpleNamespace(generate_id=lambda: f"id{len(inits)}"),
            Image=lambda image: ("image", image.shape),
            Video=lambda path: ("video", path),
            Html=lambda text: ("html", text),
        )
        monkeypatch.setitem(sys.modules, "wandb", fake)
        for _ in range(2):
            with metrics.MetricsWriter(
                tmp_path, wandb={"project": "p"}, config={"seed": 1}, tensorboard=False
            ) as writer:
                writer.scalars(1, {"a": 1})
                writer.images(1, {"b": np.zeros((2, 2, 3), np.uint8)})
        assert [(k["id"], k["resume"], k["project"], k["config"]) for k in inits] == [
            ("id0", "allow", "p", {"seed": 1})
        ] * 2
        assert calls[:3] == [(1, {"a": 1.0}), (1, {"b": ("image", (2, 2, 3))}), "finish"]
        with pytest.raises(ValueError, match="needs a project name"):
            metrics.MetricsWriter(tmp_path, wandb={})

    def test_what_cannot_be_written_is_said_and_left_out(self, tmp_path, caplog):
        """Everything is in the way of everything."""
        (tmp_path / "metrics.jsonl").mkdir()
        (tmp_path / "media").write_text("a file")
        (tmp_path / "tensorboard").write_text("a file")
        with metrics.MetricsWriter(tmp_path) as writer:
            writer.scalars(1, {"a": 1})
            writer.images(1, {"b": np.zeros((2, 2, 3), np.uint8)})
            writer.video(1, "c", np.zeros((2, 2, 2, 3), np.uint8))
            writer.text(1, "d", "e")
        for what in ("metrics in", "TensorBoard's files", "image b of step 1", "video c of step 1", "text d"):
            assert f"{what}" in caplog.text and "could not be written" in caplog.text, what

    def test_a_full_disk_is_no_reason_to_stop(self, tmp_path, caplog):
        with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer._file.close()
            writer._file = open("/dev/full", "w")
            writer.scalars(1, {"a": 1})
            writer.scalars(2, {"a": 1})
        assert "metrics of step 1 could not be written" in caplog.text and "No space left" in caplog.text

    def test_wandb_that_does_not_answer_is_left_out(self, tmp_path, monkeypatch, caplog):
        def unreachable(**kwargs):
            raise ConnectionError("no route to host")

        fake = types.SimpleNamespace(init=unreachable, util=types.SimpleNamespace(generate_id=lambda: "id0"))
        monkeypatch.setitem(sys.modules, "wandb", fake)
        (tmp_path / "wandb_id.txt").write_bytes(b"\xff\x00")
        with metrics.MetricsWriter(tmp_path, wandb={"project": "p"}, tensorboard=False) as writer:
            writer.scalars(1, {"a": 1})
        assert "W&B could not be written: ConnectionError: no route to host" in caplog.text
        assert (tmp_path / "wandb_id.txt").read_text() == "id0" and metrics.read_metrics(tmp_path)[0]["a"] == 1

    def test_wandb_that_stops_answering(self, tmp_path, monkeypatch, caplog):
        def lost(*args, **kwargs):
            raise RuntimeError("connection lost")

        fake = types.SimpleNamespace(
            init=lambda **kwargs: types.SimpleNamespace(log=lost, finish=lost),
            util=types.SimpleNamespace(generate_id=lambda: "id0"),
        )
        monkeypatch.setitem(sys.modules, "wandb", fake)
        with metrics.MetricsWriter(tmp_path, wandb={"project": "p"}, tensorboard=False) as writer:
            writer.scalars(1, {"a": 1})
        assert caplog.text.count("connection lost") == 2 and len(metrics.read_metrics(tmp_path)) == 1


class TestReading:
    def test_a_resumed_run_replaces_what_the_killed_one_did_after_its_checkpoint(self, tmp_path):
        with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
            for step in (10, 20, 30, 40):
                writer.scalars(step, {"loss": step})
            writer.scalars(40, {"val": 1.0})
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 50, "lo')  # killed in the middle of a line
        with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.scalars(30, {"loss": 300})
            writer.scalars(60, {"loss": 600})
        rows = metrics.read_metrics(tmp_path)
        assert [(row["step"], row["loss"]) for row in rows] == [(10, 10), (20, 20), (30, 300), (60, 600)]

    def test_values_of_one_step_are_joined(self, tmp_path):
        with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.scalars(5, {"train/loss": 1})
            writer.scalars(5, {"val/loss": 2})
        (row,) = metrics.read_metrics(tmp_path)
        assert (row["train/loss"], row["val/loss"]) == (1, 2)

    def test_broken_bytes_cost_their_lines_and_nothing_else(self, tmp_path, caplog):
        good = b'{"step": 10, "time": 5.0, "loss": 1.5}\n'
        broken = [
            b"\xff\n",
            b'{"step": 11, "time": 6.0, "lo\xff\xfe"\n',
            b"[1, 2]\n",
            b'"step"\n',
            b"7\n",
            b"\x00\x00\n",
        ]
        broken += [
            b'{"time": 1}\n',
            b'{"step": "x", "time": 1}\n',
            b'{"step": NaN, "time": 1}\n',
            b"[" * 100_000 + b"\n",
        ]
        last = b'{"step": 20, "time": 9.0, "note\xff": 3}\n'  # a name that is broken; its numbers are not
        (tmp_path / "metrics.jsonl").write_bytes(good + b"".join(broken) + last)
        rows = metrics.read_metrics(tmp_path)
        assert [(row["step"], row["time"]) for row in rows] == [(10, 5.0), (20, 9.0)]
        assert caplog.text.count("was left out") == len(broken)
        assert metrics.last_seen(tmp_path) == 9.0
        with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.scalars(30, {"loss": 0})
        assert metrics.read_metrics(tmp_path)[-1]["step"] == 30

    def test_a_run_whose_logs_cannot_be_read_begins_its_clock_anew(self, tmp_path, caplog):
        assert metrics.last_seen(tmp_path) is None
        (tmp_path / "metrics.jsonl").mkdir()
        assert metrics.last_seen(tmp_path) is None and "cannot be read" in caplog.text

    def test_no_metrics(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            metrics.read_metrics(tmp_path)


class TestProgress:
    def test_lines_are_rare_and_tell_rate_and_eta(self):
        time, stream = FakeTime(), io.StringIO()
        with Progress(1000, initial=100, samples_per_step=32, stream=stream, clock=time) as progress:
            for step in range(101, 201):
                progress.update(step, {"loss": 1 / step} if step % 10 == 0 else None)
                time.now += 0.5
        lines = stream.getvalue().splitlines()
        # One when the first step is through, then one each 10 s: 50 s are 4 more.
        assert [line.split()[1] for line in lines] == ["101/1000", "121/1000", "141/1000", "161/1000", "181/1000"]
        assert "samples/s" not in lines[0]
        assert "ETA 7:20" in lines[1] and "64 samples/s" in lines[1] and "loss 0.008333" in lines[1]

    def test_the_last_step_is_always_told(self):
        time, stream = FakeTime(), io.StringIO()
        progress = Progress(3, stream=stream, clock=time)
        for step in (1, 2, 3):
            progress.update(step)
        assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/3", "3/3"]

    def test_a_terminal_gets_a_bar(self):
        time, stream = FakeTime(), Terminal()
        with Progress(10, samples_per_step=4, stream=stream, clock=time) as progress:
            for step in range(1, 11):
                time.now += 1
                progress.update(step, {"loss": 0.5})
            assert progress.samples_per_second() == pytest.approx(4.0)
        assert "10/10" in stream.getvalue() and "\r" in stream.getvalue()

    def test_rate_and_eta_are_those_of_the_last_minute(self):
        time = FakeTime()
        progress = Progress(10_000, samples_per_step=2, stream=io.StringIO(), clock=time)
        rates = []
        for step in range(1, 2001):
            time.now += 1.0 if step <= 1000 else 0.25
            progress.update(step)
            rates.append(progress.samples_per_second())
        assert rates[0] is None and rates[999] == pytest.approx(2.0)
        assert 2.0 < rates[1100] < 8.0 and rates[-1] == pytest.approx(8.0)
        assert len(progress._marks) <= 2 * MARKS + 2  # however many steps there are

    def test_evaluation_and_checkpoints_do_not_count(self):
        time, working, stream = FakeTime(), FakeTime(), io.StringIO()
        progress = Progress(100, stream=stream, clock=time, working=working)
        for step in range(1, 51):
            time.now, working.now = time.now + 1, working.now + 1
            if step % 10 == 0:
                time.now += 500  # an evaluation
            progress.update(step)
        assert progress.samples_per_second() == pytest.approx(1.0)
        assert "50/100 (50%)  ETA 0:50  1 samples/s" in stream.getvalue()

    def test_compiling_is_told_with_its_time(self):
        time, stream = FakeTime(), io.StringIO()
        progress = Progress(2, stream=stream, clock=time)
        with progress.compiling():
            time.now += 95
        progress.update(1)
        lines = stream.getvalue().splitlines()
        assert lines[:2] == ["compiling...", "compiled in 1:35"] and lines[2].startswith("step 1/2")

    @pytest.mark.parametrize("kind", [io.StringIO, Terminal])
    def test_a_long_compilation_goes_on_telling(self, kind):
        told = threading.Event()

        class Stream(kind):
            def write(self, text):
                if "compiling... 0:07" in text:
                    told.set()
                return super().write(text)

        time, stream = FakeTime(), Stream()
        with Progress(2, stream=stream, clock=time) as progress:
            with progress.compiling(every=0.001, line_every=0.001):
                time.now += 7
                assert told.wait(60)
            with pytest.raises(RuntimeError, match="does not compile"), progress.compiling():
                raise RuntimeError("does not compile")
        assert stream.getvalue().count("compiled in 0:07") == 1
        assert not [thread for thread in threading.enumerate() if thread.name == "octo_like-compiling"]

    def test_silent_when_disabled(self):
        stream = io.StringIO()
        progress = Progress(2, stream=stream, enabled=False)
        with progress.compiling():
            pass
        progress.update(1)
        progress.update(2)
        assert stream.getvalue() == ""

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0:00"), (75, "1:15"), (3700, "1:01:40"), (200_000, "2d 7:33:20"), (86_400, "1d 0:00:00")],
    )
    def test_format_seconds(self, seconds, text):
        assert format_seconds(seconds) == text


class TestClock:
    def test_sections_are_exclusive(self):
        time = FakeTime()
        clock = Clock(clock=time)
        time.now += 5
        clock.switch("train")
        time.now += 60
        with clock.section("eval"):
            time.now += 10
            with clock.section("checkpoint"):
                time.now += 20
            time.now += 1
        time.now += 4
        assert clock.summary() == {
            "clock/startup": 5,
            "clock/train": 64,
            "clock/eval": 11,
            "clock/checkpoint": 20,
            "clock/total": 100,
            "clock/goodput": 0.64,
        }

    def test_survives_a_restart_and_counts_lost_time(self):
        time = FakeTime()
        clock = Clock(clock=time)
        clock.switch("train")
        time.now += 80
        state = json.loads(json.dumps(clock.state()))
        again = Clock.resume(state, last_seen=state["saved_at"] + 15, clock=time)
        time.now += 5
        again.switch("train")
        summary = again.summary()
        assert summary["clock/train"] == 80 and summary["clock/restart"] == 5
        assert summary["clock/lost"] == pytest.approx(15)
        assert summary["clock/goodput"] == pytest.approx(0.8)
        assert Clock.resume(None, clock=time).summary()["clock/total"] == 0

    def test_time_before_the_clock_and_between_processes(self, monkeypatch):
        """A process counts from its beginning; the time in which none ran is told apart."""
        now = FakeTime()
        now.now = 1000.0
        monkeypatch.setattr(metrics.time, "time", lambda: now.now + 5e8)
        first = Clock.resume(None, started=now.now - 7, clock=now)
        assert first.seconds("startup") == 7
        state, saved_at = first.state(), now.now
        now.now += 100  # 30 s of work that is lost, then 50 s of nothing, then 20 s of start-up
        again = Clock.resume(state, last_seen=saved_at + 5e8 + 30, started=now.now - 20, clock=now)
        summary = again.summary()
        assert (summary["clock/lost"], summary["clock/down"], summary["clock/restart"]) == (30, 50, 20)
        assert summary["clock/total"] == 7 + 30 + 20 and summary["clock/goodput"] == 0

    def test_an_error_inside_a_section_ends_it(self):
        time = FakeTime()
        clock = Clock(clock=time)
        with pytest.raises(KeyError), clock.section("eval"):
            time.now += 3
            raise KeyError
        time.now += 1
        assert clock.summary()["clock/startup"] == 1


def test_mfu():
    def device(kind):
        return types.SimpleNamespace(device_kind=kind)

    assert hardware.peak_flops(device("TPU v5 lite")) == 197e12
    assert hardware.peak_flops(device("TPU v5")) == 459e12
    assert hardware.peak_flops(device("NVIDIA H100 80GB HBM3")) == 989e12
    assert hardware.peak_flops(device("cpu")) is None
    assert hardware.mfu(275e12, 2.0, [device("TPU v4")] * 2) == pytest.approx(0.25)
    assert hardware.mfu(1e12, 1.0, [device("cpu")]) is None


def test_importing_metrics_imports_no_tensorboard_and_no_wandb(repository):
    source = "import sys, octo_like.training.metrics; print([m for m in ('tensorboardX', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
