"""Progress a person can watch: a bar on a terminal, a plain line now and then elsewhere."""

import shutil
import sys
import time
from typing import Any

import jax

from vlm_jax.machines import hardware

_PLAIN_EVERY_S = 10.0


class Progress:
    """Speed and progress of a training run; shown by process 0 on stderr.

    Args:
      start, total: updates already made, and in all.
      units: (what, how many of it in one update over all devices), such as ("tokens", 65536.0).
      flops_per_step: of one update over all devices; 0 when unknown.
      peak_flops: per second over all devices; None when unknown (no MFU then).
      stream: where to write; None is stderr.
    """

    def __init__(
        self,
        start: int,
        total: int,
        units: tuple[str, float] = ("rows", 0.0),
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
        stream=None,
    ):
        self._start, self._total = start, total
        self._unit, self._units_per_step = units
        self._flops_per_step = flops_per_step
        self._peak_flops = peak_flops
        self._stream = sys.stderr if stream is None else stream
        self._shows = jax.process_index() == 0
        self._terminal = self._stream.isatty()
        self._drawn = False
        self._last_plain_s = float("-inf")
        self._mark = (start, time.monotonic())  # where what `speed` measures begins
        self._paused_at_s: float | None = None

    def speed(self, step: int) -> dict[str, float]:
        """Speed since the previous call or `restart`; empty if no step was made since."""
        self.resume()
        now = time.monotonic()
        steps, seconds = step - self._mark[0], now - self._mark[1]
        self._mark = (step, now)
        if steps <= 0 or seconds <= 0:
            return {}
        rate = steps / seconds
        speed = {"speed/steps_per_s": rate}
        if self._units_per_step:
            speed[f"speed/{self._unit}_per_s"] = rate * self._units_per_step
        if self._flops_per_step and self._peak_flops:
            speed["speed/mfu"] = rate * self._flops_per_step / self._peak_flops
        return speed

    def begin(self, step: int, loss: float) -> None:
        """Shows the first updates at once: how long they took, and how long the rest will."""
        self.resume()
        steps, seconds = step - self._mark[0], time.monotonic() - self._mark[1]
        text = f"step {step}/{self._total}  loss {loss:.4g}  "
        if step == self._start + 1:
            text += f"first update in {seconds:.3g} s, most of it compiling"
            self.restart(step)
        else:
            left_s = (self._total - step) * seconds / steps
            text += f"{seconds / steps:.3g} s per update  ETA {_clock(left_s)}"
        if self._shows:
            print(text, file=self._stream, flush=True)

    def restart(self, step: int) -> None:
        """Forgets the time until now: the first step is mostly compilation."""
        self._mark = (step, time.monotonic())

    def update(self, step: int, loss: float, speed: dict[str, float]) -> None:
        """Shows a step that `speed` has just measured."""
        if not self._shows:
            return
        line = self._line(step, loss, speed)
        if self._terminal:
            done = int(20 * step / max(self._total, 1))
            bar = f"[{'#' * done}{'.' * (20 - done)}] {line}"
            columns = shutil.get_terminal_size().columns
            self._stream.write("\r\x1b[K" + bar[: columns - 1])
            self._stream.flush()
            self._drawn = True
            return
        now = time.monotonic()
        if now - self._last_plain_s >= _PLAIN_EVERY_S or step >= self._total:
            self._last_plain_s = now
            print(line, file=self._stream, flush=True)

    def pause(self) -> None:
        """Clears the line and stops the clock, for evaluations; `resume` or `speed` starts it."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False
        if self._paused_at_s is None:
            self._paused_at_s = time.monotonic()

    def resume(self) -> None:
        """Starts the clock again after `pause`."""
        if self._paused_at_s is not None:
            step, since_s = self._mark
            self._mark = (step, since_s + time.monotonic() - self._paused_at_s)
            self._paused_at_s = None

    def close(self) -> None:
        """Leaves the last state of the bar on its own line. May be called twice."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False

    def _line(self, step: int, loss: float, speed: dict[str, float]) -> str:
        parts = [f"step {step}/{self._total}", f"loss {loss:.4g}"]
        rate = speed.get("speed/steps_per_s")
        if rate:
            parts.append(f"{rate:.3g} steps/s")
            if self._units_per_step:
                parts.append(f"{_short(rate * self._units_per_step)} {self._unit}/s")
            if "speed/mfu" in speed:
                parts.append(f"MFU {100 * speed['speed/mfu']:.1f}%")
            parts.append(f"ETA {_clock((self._total - step) / rate)}")
        return "  ".join(parts)


def of_run(task: Any, batch: Any, start: int, config: Any, mesh: Any) -> Progress:
    """The progress of a run of `train.TrainConfig`, in what the task counts, with its FLOPs."""
    shapes = {
        key: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
        for key, x in batch.arrays.items()
    }
    units = getattr(task, "units_per_step", lambda b: ("rows", float(config.batch_size)))(shapes)
    flops = getattr(task, "flops_per_step", lambda b: 0.0)(shapes)
    peak = hardware.peak_flops(jax.devices()[0])
    return Progress(
        start=start,
        total=config.steps,
        units=units,
        flops_per_step=flops,
        peak_flops=peak * mesh.size if peak else None,
    )


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours or days else f"{minutes}:{seconds:02d}"
    return f"{days}d {clock}" if days else clock
