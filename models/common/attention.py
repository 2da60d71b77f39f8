# SPDX-License-Identifier: Apache-2.0
"""Attention cores: the part of a layer between the projections.

Layers run in the [s, b, n, d] format even when a row is packed; what tells the samples apart is a :class:`Segments`
object in `packed_seq_params`. So rotary angles stay one per position (megatron-core's own packed path walks over the
samples, with a device synchronisation for each), and the core alone knows about packing.

    torch   SDPA; packed: `varlen_attn` on CUDA in half precision, elsewhere equal lengths batched into one SDPA
    te      TransformerEngine's fused or flash kernels, packed as `thd`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from models.common.context_parallel import global_order
from models.common.transfer import to_device

KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Torch's own order, but for cuDNN first."""
MIN_BATCHED_LENGTH = 256
"""Segments of one length, at least this long, go to cuDNN as a batch; others to the kernel for varying lengths."""


@dataclass
class Segments(PackedSeqParams):
    """Samples (or windows, or frames) that lie one after the other in a row and do not see each other."""

    lengths: tuple[int, ...] = ()
    groups: tuple[tuple[int, Tensor | None], ...] = ()
    """For every distinct length: rows of its segments, [num * length] int64; None when there is one length only."""
    restore: Tensor | None = None
    """Puts the groups' rows back in order, [t] int64."""


def make_segments(lengths: Sequence[int] | np.ndarray, device: torch.device) -> Segments:
    """Describe consecutive segments of these lengths.

    Args:
        lengths: Length of every segment, none of them zero.
        device: Where attention runs.

    Returns: The segments, in the `sbhd` format; :meth:`TorchCoreAttention.forward` and the TE core read them.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    cu_seqlens = to_device(bounds.astype(np.int32), device)
    distinct = np.unique(sizes)
    groups: list[tuple[int, Tensor | None]] = [(int(sizes[0]), None)]
    restore = None
    if len(distinct) > 1:
        rows = [(bounds[:-1][sizes == length, None] + np.arange(length)).ravel() for length in distinct]
        groups = [(int(length), to_device(row, device)) for length, row in zip(distinct, rows, strict=True)]
        restore = to_device(np.argsort(np.concatenate(rows)), device)
    return Segments(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=int(sizes.max()),
        max_seqlen_kv=int(sizes.max()),
        lengths=tuple(sizes.tolist()),
        groups=tuple(groups),
        restore=restore,
    )


class TorchCoreAttention(MegatronModule):
    """Attention through torch's own kernels. Knows causal and full masks, packing and context parallelism.

    Padding needs no mask: batches are padded on the right, and a causal row never looks there.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.is_causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.softmax_scale = softmax_scale
        self.cp_group = (
            pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, d]; under context parallelism the local slice, as key and value.
            key: [s, b, g, d].
            value: [s, b, g, d].
            attention_mask: Always None.
            attn_mask_type: Ignored: the layer's spec decides.
            attention_bias: Always None.
            packed_seq_params: A :class:`Segments`, or None for an unpacked batch.

        Returns: [s, b, n * d].
        """
        assert attention_mask is None, "masks are causal or full, never explicit"
        assert attention_bias is None, "no family has an attention bias"
        assert packed_seq_params is None or isinstance(packed_seq_params, Segments)
        if self.cp_group is not None:
            out = self._context_parallel(query, key, value, packed_seq_params)
        elif packed_seq_params is None:
            rows = (t.transpose(0, 1) for t in (query, key, value))
            out = sdpa(*rows, scale=self.softmax_scale, is_causal=self.is_causal).transpose(0, 1)
        else:
            query, key, value = (t.squeeze(1) for t in (query, key, value))  # [t, n, d]
            out = packed_attention(
                query, key, value, packed_seq_params, is_causal=self.is_causal, scale=self.softmax_scale
            ).unsqueeze(1)
        return out.reshape(*out.shape[:2], -1)

    def _context_parallel(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments | None
    ) -> Tensor:
        """Gather keys and values, attend with the local queries: two chunks of every sample."""
        assert self.is_causal
        assert self.cp_group is not None
        size, rank = self.cp_group.size(), self.cp_group.rank()
        lengths = segments.lengths if segments is not None else (query.shape[0] * size,)
        order = to_device(global_order(lengths, size), query.device)
        key, value = (
            gather_from_sequence_parallel_region(t.contiguous(), group=self.cp_group)[order].transpose(0, 1)
            for t in (key, value)
        )  # [b, s, g, d], the whole sequence
        query, outs, start = query.transpose(0, 1), [], 0
        for length in lengths:
            chunk = length // (2 * size)
            for half, number in enumerate((rank, 2 * size - 1 - rank)):
                first = start // size + half * chunk
                seen = slice(start, start + (number + 1) * chunk)
                mask = causal_lower_right(chunk, (number + 1) * chunk)
                rows = (query[:, first : first + chunk], key[:, seen], value[:, seen])
                outs.append(sdpa(*rows, scale=self.softmax_scale, attn_mask=mask))
            start += length
        return torch.cat(outs, dim=1).transpose(0, 1)


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, **mask: Any) -> Tensor:
    """Torch's attention with the sequence before the heads.

    Args:
        query: [b, s, n, d].
        key: [b, s, g, d].
        value: [b, s, g, d].
        scale: Of the logits; None takes 1 / sqrt(d).
        mask: `is_causal` or `attn_mask`.

    Returns: [b, s, n, d].
    """
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [b, n, s, d]
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and query.device.type == "cpu":  # the fast CPU kernel wants as many keys as queries
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    is_grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=is_grouped, **mask)
    return out.transpose(1, 2)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    is_causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Attention within segments.

    Args:
        query: [t, n, d].
        key: [t, g, d].
        value: [t, g, d].
        segments: Which rows belong together.
        is_causal: Whether a row sees only those before it in its segment.
        scale: Of the logits; None takes 1 / sqrt(d).

    Returns: [t, n, d].
    """
    has_varlen_kernel = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    is_one_batch = segments.restore is None and segments.max_seqlen_q >= MIN_BATCHED_LENGTH
    if has_varlen_kernel and not is_one_batch:
        return _varlen(query, key, value, segments, is_causal=is_causal, scale=scale)
    outs = []
    for length, rows in segments.groups:
        picked = (query, key, value) if rows is None else (t[rows] for t in (query, key, value))
        batched = (t.reshape(-1, length, *t.shape[1:]) for t in picked)  # [segments, length, n, d]
        with sdpa_kernel(KERNELS, set_priority=True):
            outs.append(sdpa(*batched, scale=scale, is_causal=is_causal).flatten(0, 1))
    return outs[0] if segments.restore is None else torch.cat(outs)[segments.restore]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, is_causal: bool, scale: float | None
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    bounds, longest, d = segments.cu_seqlens_q, segments.max_seqlen_q, query.shape[-1]
    window = (-1, 0) if is_causal else (-1, -1)
    scale = d**-0.5 if scale is None else scale
    if d % 8:  # the kernel takes multiples of 8; zeros change neither the scores nor the part that is kept
        query, key, value = (F.pad(t, (0, -d % 8)) for t in (query, key, value))
    out = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window)
    assert isinstance(out, Tensor)
    return out[..., :d]


def te_core_attention() -> type[torch.nn.Module]:
    """TransformerEngine's core attention, taught to read :class:`Segments`."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class TECoreAttention(TEDotProductAttention):
        """Hands packed rows to TransformerEngine as `thd` ([t, n, d])."""

        def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - splits are for inference
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: AttnMaskType,
            attention_bias: Tensor | None = None,
            packed_seq_params: PackedSeqParams | None = None,
        ) -> Tensor:
            """[s, b, n, d] -> [s, b, n * d]; see :meth:`TorchCoreAttention.forward`."""
            if packed_seq_params is None:
                return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
            thd = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=packed_seq_params.cu_seqlens_q,
                cu_seqlens_kv=packed_seq_params.cu_seqlens_kv,
                max_seqlen_q=packed_seq_params.max_seqlen_q,
                max_seqlen_kv=packed_seq_params.max_seqlen_kv,
            )
            query, key, value = (t.squeeze(1) for t in (query, key, value))  # [t, n, d]
            out = super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, thd)
            return out.reshape(out.shape[0], 1, -1)

    return TECoreAttention
