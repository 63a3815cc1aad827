"""Quality of a model whose tokens are graded: perplexity, and nearness to full precision.

Perplexity is over tokens, in non-overlapping windows; KL divergence (nats, full precision first) and
top-1 agreement are over the same positions. Every row of a window is graded on its own, as in decoding.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from grinqh.config import ReadBits
from grinqh.dial import set_bits
from grinqh.errors import InputError
from grinqh.model import count_reads, graded, model_config, read_stats, reset_read_stats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_AT_ONCE = 256  # rows of logits that are compared at a time: bounds the memory that a large vocabulary takes


@dataclass(frozen=True)
class Windows:
    """Token windows of a text, none overlapping."""

    ids: torch.Tensor  # int64 [windows, window]
    bos: bool  # every window begins with the BOS token

    @property
    def predicted_tokens(self) -> int:
        """Tokens that are predicted from those before them in their window."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1)

    def describe(self) -> str:
        """Window length and BOS policy, in words."""
        count, window = self.ids.shape
        return f"{count} windows of {window} tokens, {'BOS at the start of each' if self.bos else 'no BOS'}"


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str], window: int = 2048, limit: int | None = None
) -> Windows:
    """Cuts a text into windows; of several texts, no window holds tokens of two.

    A rest shorter than a window is dropped, unless it is all there is. Windows begin with BOS where the
    tokenizer puts one at the start of a text by itself.
    """
    if window < 2:
        raise InputError(f"window is {window}: a window needs at least 2 tokens")
    if limit is not None and limit < 1:
        raise InputError(f"the number of windows is {limit}: at least 1 is needed")
    bos_id = tokenizer.bos_token_id
    bos = bos_id is not None and tokenizer("a").input_ids[:1] == [bos_id]
    body = window - 1 if bos else window
    rows: list[list[int]] = []
    rest: list[int] = []
    for part in [text] if isinstance(text, str) else text:
        ids = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        rows += [ids[start : start + body] for start in range(0, len(ids) - body + 1, body)]
        rest = max(rest, ids, key=len)
    rows = rows or [rest]
    if limit is not None:
        # Spread over the text, so that a limit does not favour its beginning.
        rows = [rows[i * len(rows) // limit] for i in range(limit)] if limit < len(rows) else rows
    if len(rows[0]) + bos < 2:
        raise InputError("the text is shorter than 2 tokens")
    return Windows(torch.tensor([[bos_id, *row] if bos else row for row in rows]), bos)


class Reference:
    """Log-probabilities of the full-precision model, window by window.

    With a cache folder they are computed once: `name` must tell models apart. They are kept as float16,
    which is finest near 0, where the likely tokens are.
    """

    def __init__(self, load_model: Callable[[], PreTrainedModel], cache: Path | None = None, name: str = "") -> None:
        self._load_model = load_model
        self._model: PreTrainedModel | None = None
        self._cache = cache
        self._name = name

    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """[window, vocabulary] for one window of token ids, on the model's device or, from the cache, on the CPU."""
        if self._cache is None:
            return self._compute(ids)
        key = hashlib.sha256(self._name.encode() + ids.numpy().tobytes()).hexdigest()[:24]
        path = self._cache / f"{key}.safetensors"
        if not path.exists():
            self._cache.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file({"log_probabilities": self._compute(ids).half().cpu()}, partial)
            partial.rename(path)
        return load_file(path)["log_probabilities"]

    def _compute(self, ids: torch.Tensor) -> torch.Tensor:
        if self._model is None:
            self._model = self._load_model()
        return window_logits(self._model, ids).float().log_softmax(-1)


@dataclass
class Score:
    """What a model does on a set of windows at one setting of the dial."""

    target: ReadBits | None  # the setting; None: as the dial stood
    read_bits: float | None  # realised; None for a model read in full
    perplexity: float
    reference_perplexity: float | None  # None without a reference, like the following
    log_ratio: float | None  # ln(perplexity / reference_perplexity)
    kl: float | None  # nats per token, of the model from the reference
    top1: float | None  # share of tokens where both hold the same next token likeliest
    tokens: int  # predicted tokens

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Sums:
    """Sums over the tokens seen so far."""

    tokens: int = 0
    read_bits: float = 0.0
    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    same_top1: int = 0

    def add(self, ids: torch.Tensor, logits: torch.Tensor, reference: torch.Tensor | None) -> None:
        """Counts one window, where its logits are: its ids, the model's logits, the reference's log-probabilities."""
        ids = ids.to(logits.device)
        reference = None if reference is None else reference.to(logits.device)
        for start in range(0, len(ids) - 1, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, len(ids) - 1))
            targets = ids[rows.start + 1 : rows.stop + 1]
            ours = logits[rows].float().log_softmax(-1)
            self.loss += float(functional.nll_loss(ours, targets, reduction="sum"))
            if reference is not None:
                theirs = reference[rows].float()
                self.reference_loss += float(functional.nll_loss(theirs, targets, reduction="sum"))
                self.kl += float(functional.kl_div(ours, theirs, reduction="sum", log_target=True))
                self.same_top1 += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.tokens += len(ids) - 1

    def score(self, target: ReadBits | None, windows: int, read: bool, compared: bool) -> Score:
        return Score(
            target=target,
            read_bits=self.read_bits / windows if read else None,
            perplexity=math.exp(self.loss / self.tokens),
            reference_perplexity=math.exp(self.reference_loss / self.tokens) if compared else None,
            log_ratio=(self.loss - self.reference_loss) / self.tokens if compared else None,
            kl=self.kl / self.tokens if compared else None,
            top1=self.same_top1 / self.tokens if compared else None,
            tokens=self.tokens,
        )


def evaluate(
    model: PreTrainedModel,
    windows: Windows,
    read_bits: Sequence[ReadBits | None] = (None,),
    *,
    reference: Reference | None = None,
    grade_rows: bool = True,
    progress: bool = True,
) -> list[Score]:
    """Scores a converted model at several settings of the dial; the dial is left at the last.

    Args:
        model: a converted model; any causal language model where rows are not graded and the dial is left alone.
        windows: see `token_windows`.
        read_bits: settings as `grinqh.set_bits` takes them, with an exact budget if the model has one; None leaves the
            dial as it is.
        reference: full-precision log-probabilities to compare with.
        grade_rows: whether every token is graded on its own, as in decoding; else windows are read in full.
        progress: whether to show a progress bar on stderr (only if that is a terminal).
    """
    exact = any(setting is not None for setting in read_bits) and model_config(model).exact_budget
    sums = [_Sums() for _ in read_bits]
    steps = tqdm(
        total=len(windows.ids) * len(read_bits),
        desc="evaluate",
        unit="window",
        file=sys.stderr,
        disable=None if progress else True,
    )
    if grade_rows:
        count_reads(model)
    with steps, graded(model) if grade_rows else nullcontext():
        # Settings are the inner loop, so that only one window's reference is in memory.
        for ids in windows.ids:
            expected = reference.log_probabilities(ids) if reference is not None else None
            for setting, sum_ in zip(read_bits, sums, strict=True):
                if setting is not None:
                    set_bits(model, setting, exact_budget=exact)
                if grade_rows:
                    reset_read_stats(model)
                sum_.add(ids, window_logits(model, ids), expected)
                if grade_rows:
                    sum_.read_bits += read_stats(model).read_bits
                steps.update()
    if grade_rows:
        count_reads(model, False)
    return [
        sum_.score(setting, len(windows.ids), grade_rows, reference is not None)
        for setting, sum_ in zip(read_bits, sums, strict=True)
    ]


@torch.no_grad()
def window_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[window, vocabulary] of one window, on the model's device."""
    logits: torch.Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
    return logits
