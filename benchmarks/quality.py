"""Quality against bits: grinqh beside the known methods, on the same models, layers, calibration and texts.

    python benchmarks/quality.py --models SmolLM2-135M-Instruct --json quality.json    # --device cuda for a GPU
    python benchmarks/quality.py --report quality.json    # docs/quality.md and its picture; takes several files

Every method quantizes every linear layer but the head, with the first half of Python's help topics as calibration
text. Perplexity, KL divergence (nats per token) and top-1 agreement are against the model at full precision. grinqh and
the activation-sparse rival grade every token on its own, as in decoding. "static mixed precision" is grinqh without the
choice per token: each channel keeps the bits that calibration gives it, and all that is stored is read.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import stamp, write_json
from quality_models import MODELS, LabModel, converted, linears, reference, texts
from quality_report import write_report
from quality_rivals import METHODS, SCALE_BITS, Inputs
from torch import Tensor, nn
from tqdm import tqdm

import grinqh
from grinqh.evaluate import Score, evaluate, token_windows

READ_BITS = (4.0, 3.0, 2.5, 2.0)
RIVAL_BITS = (4, 3, 2)
STORED_BITS = (6.0, 5.0, 4.0)
STORED_READ_BITS = 3.0
EVERYTHING = (8.0,)
HALF = 16  # bits of an unquantized weight

Scores = dict[tuple[str, int], list[Score]]  # by text and tokens of a window


def observe(lab: LabModel, ids: list[Tensor]) -> dict[str, Inputs]:
    """What the layers' inputs look like over the calibration sequences."""
    seen: dict[str, Inputs] = {}
    rows = 0
    with _hooked(lab.model, lambda name, x: _add(seen, name, x)):
        for sequence in ids:
            lab.model(input_ids=sequence[None].to(lab.model.device))
            rows += len(sequence)
    return {name: Inputs(sums.hessian / rows, sums.mean_magnitude / rows) for name, sums in seen.items()}


def _add(seen: dict[str, Inputs], name: str, x: Tensor) -> None:
    sums = seen.setdefault(name, Inputs(x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1])))
    sums.hessian += x.T @ x
    sums.mean_magnitude += x.abs().sum(0)


@contextmanager
def _hooked(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def watch(name: str) -> Callable[..., None]:
        return lambda _, arguments: see(name, arguments[0].reshape(-1, arguments[0].shape[-1]))

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in linears(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Lab:
    """One model with its texts, and the rows measured on it."""

    def __init__(
        self,
        name: str,
        lengths: dict[int, int],
        calibration_tokens: int,
        device: str | None,
        recorded: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        """`lengths`: how many windows of each text, by their tokens; `recorded` is told of new rows."""
        self.recorded = recorded
        self.lab = LabModel.load(name, device=device)
        calibration, evaluation = texts()
        tokenizer = self.lab.tokenizer
        cut = token_windows(tokenizer, calibration, 512, max(1, calibration_tokens // 512))
        self.calibration = list(cut.ids)
        self.windows = {
            (text, length): token_windows(tokenizer, parts, length, count)
            for length, count in lengths.items()
            for text, parts in evaluation.items()
        }
        self.reference = reference(name, copy.deepcopy(self.lab.model))
        self.inputs = observe(self.lab, self.calibration)
        self.weights = {n: m.weight.data.clone() for n, m in linears(self.lab.model).items()}

    def record(self, method: str, scores: Scores, **about: Any) -> None:
        """A row for each text, length and setting."""
        rows = []
        for (text, window), of_text in scores.items():
            for score in of_text:
                place = {"model": self.lab.name, "text": text, "window": window, "method": method}
                row = place | score.as_dict() | about
                rows.append(row)
                print(json.dumps({k: row[k] for k in (*place, "read_bits", "log_ratio", "kl")}), flush=True)
        self.recorded(rows)

    def dense_scores(self) -> Scores:
        """The model as its weights stand."""
        return {
            place: evaluate(self.lab.model, windows, reference=self.reference, grade_rows=False, progress=False)
            for place, windows in self.windows.items()
        }

    def run_rivals(self, groups: list[int]) -> None:
        """Each static method at each number of bits."""
        settings = [(m, bits, group) for m in METHODS for bits in RIVAL_BITS for group in groups]
        for method, bits, group in tqdm(settings, desc=f"{self.lab.name}: rivals", file=sys.stderr, disable=None):
            for names in self._alike() if method == "GPTQ" else [[name] for name in self.weights]:
                self._quantize(names, method, bits, group)
            self.record(
                f"{method}, groups of {group}", self.dense_scores(), read_bits=float(bits), stored_bits=float(bits),
                scale_bits=SCALE_BITS / group,
            )  # fmt: skip
        self.restore()

    def _alike(self) -> list[list[str]]:
        """The layers in groups of one shape."""
        groups: dict[torch.Size, list[str]] = {}
        for name, weight in self.weights.items():
            groups.setdefault(weight.shape, []).append(name)
        return list(groups.values())

    def _quantize(self, names: list[str], method: str, bits: int, group: int) -> None:
        if len(names) == 1:
            rounded = [METHODS[method](self.weights[names[0]], self.inputs[names[0]], bits, group)]
        else:
            hessians, magnitudes = zip(
                *((self.inputs[n].hessian, self.inputs[n].mean_magnitude) for n in names), strict=True
            )
            inputs = Inputs(torch.stack(hessians), torch.stack(magnitudes))
            weights = torch.stack([self.weights[name] for name in names])
            rounded = list(METHODS[method](weights, inputs, bits, group))
        for name, weight in zip(names, rounded, strict=True):
            self.lab.model.get_submodule(name).weight.data = weight

    def restore(self) -> None:
        """The weights at full precision."""
        for name, linear in linears(self.lab.model).items():
            linear.weight.data = self.weights[name].clone()

    def run_sparse(self) -> None:
        """Activation sparsity: inputs below a layer's threshold are left out, weights stay in 16 bits."""
        for bits in READ_BITS:
            kept = bits / HALF
            thresholds = {name: self._threshold(name, 1 - kept) for name in self.weights}
            with _sparse(self.lab.model, thresholds):
                scores = self.dense_scores()
            self.record("activation sparsity", scores, read_bits=bits, stored_bits=float(HALF), scale_bits=0.0)

    def _threshold(self, name: str, part: float) -> float:
        return float(torch.quantile(self.samples[name], part))

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """Magnitudes of inputs of the calibration text, some for each layer."""
        samples: dict[str, Tensor] = {}
        with _hooked(self.lab.model, lambda name, x: samples.update({name: x.abs().flatten()[::7].clone()})):
            self.lab.model(input_ids=self.calibration[0][None].to(self.lab.model.device))
        return samples

    def run_grinqh(self, config: grinqh.GrinqhConfig, settings: tuple[float, ...], about: str = "grinqh") -> None:
        """The default recipe, or a changed one."""
        model = converted(self.lab.model, self.calibration, config)
        stored = grinqh.stored_bits(model)
        block = 16 / config.block
        scores = {
            place: evaluate(model, windows, settings, reference=self.reference, progress=False)
            for place, windows in self.windows.items()
        }
        # What reads all that it stores has no dial: its setting is the bits that it was given.
        of_setting = {"target": None, "read_bits": config.stored_bits} if settings == EVERYTHING else {}
        self.record(about, scores, stored_bits=stored, scale_bits=block, **of_setting)


@contextmanager
def _sparse(model: nn.Module, thresholds: dict[str, float]) -> Iterator[None]:
    def skip(threshold: float) -> Callable[..., tuple[Tensor]]:
        return lambda _, arguments: (arguments[0] * (arguments[0].abs() >= threshold),)

    handles = [m.register_forward_pre_hook(skip(thresholds[name])) for name, m in linears(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--report", type=Path, nargs="+", help="write docs/quality.md from these results, measure nothing"
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--groups", type=int, nargs="*", default=[64, 128], help="of the rivals (default: %(default)s)")
    parser.add_argument("--window", type=int, nargs="*", default=[512], help="tokens of a window (default: 512)")
    parser.add_argument("--tokens", type=int, default=1024, help="of each text, in windows (default: %(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the CPU)")
    options = parser.parse_args()
    if options.report:
        write_report([json.loads(path.read_text(encoding="utf-8")) for path in options.report])
        return

    lengths = {window: max(1, options.tokens // window) for window in options.window}
    result = stamp(options.device) | {
        "windows": lengths,
        "calibration_tokens": options.calibration_tokens,
        "rows": [],
    }

    def keep(rows: list[dict[str, Any]]) -> None:
        result["rows"] += rows
        if options.json:  # after every method: a run that is cut short leaves what it has
            write_json(options.json, result)

    for name in options.models:
        with torch.no_grad():
            lab = Lab(name, lengths, options.calibration_tokens, options.device, keep)
        with torch.enable_grad():
            lab.run_grinqh(grinqh.GrinqhConfig(), (8.0, *READ_BITS))
            for stored in STORED_BITS:
                lab.run_grinqh(grinqh.GrinqhConfig(stored_bits=stored), (STORED_READ_BITS,), "grinqh, fewer stored")
            for bits in READ_BITS:
                lab.run_grinqh(grinqh.GrinqhConfig(stored_bits=bits), EVERYTHING, "static mixed precision")
        with torch.no_grad():
            lab.run_sparse()
            lab.run_rivals(options.groups)


if __name__ == "__main__":
    main()
