"""A transformers model as two parts: a trunk over sequences of any lengths, and a head on chosen rows.

Training, scoring and sampling all go through here, so that they agree on attention, precision and
the head, and so that full `[T, vocab]` logits never exist.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel

from errors import ModelError
from models import attention
from models.attention import Layout, Packed
from models.sources import context_length

logger = logging.getLogger(__name__)
# Largest KL, in nats, between our paths and the plain forward that is rounding and not a bug. Not a difference
# of logprobs: rounding moves those of unlikely tokens a lot, and nothing depends on them.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def largest_kl(ours: Float[Tensor, "n v"], theirs: Float[Tensor, "n v"]) -> float:
    """Over n positions, of two sets of log-probabilities."""
    return (theirs.exp() * (theirs - ours)).sum(-1).abs().max().item()


class CausalLM:
    """`hidden` gives final hidden states of whole sequences, `logits` puts the head on some of them.

    `packed` models take sequences end to end without padding. Others (state-space or linear
    attention, soft-capped attention) take them padded on the right: slower, same numbers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype = torch.float32,
        adapters: tuple[str, ...] | None = None,
    ) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.adapters = adapters  # PEFT's names of those that it reads with; None: the ones that are active anyway
        self.packed = model.config._attn_implementation == attention.NAME
        self.head_scale = 1.0
        self.head_softcap: float | None = None

    @classmethod
    def verified(cls, model: PreTrainedModel, *, compute_dtype: torch.dtype = torch.float32) -> CausalLM:
        """A `CausalLM` whose two parts were compared with the model's own forward on this model's weights.

        Falls back from packed to padded sequences where packing changes the numbers. Raises `ModelError`
        if even then trunk and head do not make up the model.
        """
        lm = cls(model, compute_dtype=compute_dtype)
        config = model.config.get_text_config()
        lm.head_softcap = getattr(config, "final_logit_softcapping", None)
        if getattr(config, "logits_scaling", None):  # Granite divides
            lm.head_scale = 1.0 / config.logits_scaling
        elif getattr(config, "logit_scale", None):  # Cohere multiplies
            lm.head_scale = config.logit_scale
        difference = lm._difference_from_plain_forward()
        # Asked as `not <=`, so that NaN counts as different.
        if lm.packed and not difference <= TOLERANCE[compute_dtype]:
            lm.packed = False
            try:
                lm._difference_from_plain_forward()
                exact = "sdpa" if model._supports_sdpa else "eager"
            except ModelError:  # soft caps and sinks: sdpa would leave them out without a word
                exact = "eager"
            model.set_attn_implementation(exact)
            logger.warning(
                "%s cannot be packed: it runs on padded batches (%s), which is slower", model.config.model_type, exact
            )
            difference = lm._difference_from_plain_forward()
        if not difference <= TOLERANCE[compute_dtype]:
            raise ModelError(
                f"{model.config.name_or_path or type(model).__name__}: the head is not a plain linear layer "
                f"on the final hidden states (KL {difference:.3g} from the model's own forward); "
                "this architecture is not supported"
            )
        return lm

    def with_adapter(self, name: str | None) -> CausalLM:
        """The same weights read with that adapter, or with none: a teacher that shares its student's base for free.

        Make it when all adapters are attached. Switching touches neither weights nor `requires_grad`.
        """
        return self._like(self.model, () if name is None else (name,))

    def frozen_copy(self) -> CausalLM:
        """The same model with weights of its own, that nothing trains."""
        model = copy.deepcopy(self.model).eval()
        model.requires_grad_(False)
        return self._like(model, self.adapters)

    def _like(self, model: PreTrainedModel, adapters: tuple[str, ...] | None) -> CausalLM:
        lm = CausalLM(model, compute_dtype=self.compute_dtype, adapters=adapters)
        lm.packed, lm.head_scale, lm.head_softcap = self.packed, self.head_scale, self.head_softcap
        return lm

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr]

    @property
    def context_length(self) -> int | None:
        """Tokens of the longest sequence that it was made to read; None: its config names no such number."""
        return context_length(self.model.config)

    @property
    def trunk(self) -> torch.nn.Module:
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]
        trunk = inner.base_model  # type: ignore[union-attr]
        return trunk if trunk is not inner else inner.model  # type: ignore[union-attr,return-value,operator]

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Compute dtype and adapter switch that every use of the weights shares."""
        cast = (
            nullcontext()
            if self.compute_dtype == torch.float32
            else torch.autocast(self.device.type, dtype=self.compute_dtype)
        )
        with cast, self.reading_with_its_adapters():
            yield

    @cached_property
    def _switches(self) -> list[Any]:
        return [m for m in self.model.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]

    @contextmanager
    def reading_with_its_adapters(self) -> Iterator[None]:
        """Those adapters are active meanwhile."""
        if self.adapters is None:
            yield
            return
        # why: PEFT's own switches also turn `requires_grad` on and off, and the student's flags are not ours to touch
        before = [layer._active_adapter for layer in self._switches]
        for layer in self._switches:
            there = layer.modules_to_save if isinstance(layer, ModulesToSaveWrapper) else self.adapters
            layer._active_adapter = [name for name in self.adapters if name in there]
        try:
            yield
        finally:
            for layer, active in zip(self._switches, before, strict=True):
                layer._active_adapter = active

    def hidden(self, sequences: Sequence[Tensor]) -> Float[Tensor, "T h"]:
        """Final hidden states of the sequences (int64 [length] each), end to end. Differentiable."""
        lengths = tuple(len(s) for s in sequences)
        if not self.packed:
            return self._hidden_padded(sequences, lengths)
        ids = torch.cat(list(sequences)).to(self.device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        return self.flat(ids, positions, Packed(lengths))

    def flat(self, ids: Tensor, positions: Tensor, layout: Layout) -> Float[Tensor, "T h"]:
        """One flat row of tokens through the trunk under a layout."""
        with self.precision(), attention.no_mask() as windows:
            out = self.trunk(input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=layout)
        windows.check()
        return out.last_hidden_state[0]

    def _hidden_padded(self, sequences: Sequence[Tensor], lengths: tuple[int, ...]) -> Float[Tensor, "T h"]:
        # Right padding needs no mask in a causal model: a sequence never sees what comes after it.
        ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).to(self.device)  # [B, L]
        mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
        with self.precision():
            out = self.trunk(input_ids=ids, attention_mask=mask.long().to(self.device), use_cache=False)
        return out.last_hidden_state[mask.to(self.device)]

    def logits(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        """float32 logits, as the model itself would give."""
        with self.precision():
            logits = self.model.get_output_embeddings()(hidden).float()  # type: ignore[misc]
        if self.head_scale != 1.0:
            logits = logits * self.head_scale
        if self.head_softcap is not None:
            logits = torch.tanh(logits / self.head_softcap) * self.head_softcap
        return logits

    @torch.no_grad()
    def _difference_from_plain_forward(self) -> float:
        """Largest KL on two short probes, packed together against one by one."""
        generator = torch.Generator().manual_seed(0)
        probes = [torch.randint(0, self.vocab_size, (n,), generator=generator) for n in (9, 6)]
        try:
            ours = self.logits(self.hidden(probes)).log_softmax(-1)
        except (TypeError, AttributeError, ModelError):  # the architecture does not pass a layout down
            if not self.packed:
                raise
            return float("inf")
        plain = []
        with self.precision():
            for probe in probes:
                out: Any = self.model(input_ids=probe[None].to(self.device), use_cache=False)
                plain.append(out.logits[0].float().log_softmax(-1))
        return largest_kl(ours, torch.cat(plain))
