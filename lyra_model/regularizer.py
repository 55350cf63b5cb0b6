"""Losses that align speech tokens with the transcript's embeddings, without a pass through the language model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import lyra_ops
from lyra_ops._checks import check_option

ALIGNMENTS = ("ctc", "soft_dtw", "drop_dtw")


def cross_modality_loss(
    speech: Tensor,
    transcript: Tensor,
    speech_lengths: Tensor,
    transcript_lengths: Tensor,
    *,
    temperature: float = 0.06,
    gamma: float = 0.1,
    drop_cost: float = math.inf,
    backend: str | None = None,
) -> Tensor:
    """The latent cross-modality regularizer (Lyra, arXiv 2412.09501, equations 1 and 2), mean over the batch.

    D_ij = -log softmax_j(s_i . t_j / temperature) over the sample's own transcript tokens, aligned by soft-DTW with
    smoothing ``gamma``, divided by the number of speech tokens. One batched call; padding is never aligned.

    Args:
        speech: (B, N, d) speech tokens; transcript: (B, M, d) embeddings of the transcript's tokens.
        speech_lengths, transcript_lengths: (B,) true lengths.
        drop_cost: price of leaving a speech token out, so that silence need not be aligned to text; inf, as published,
            aligns every one.
        backend: of `lyra_ops.soft_dtw`; None chooses.
    """
    loss = lyra_ops.SoftDTWLoss(
        cost="contrastive",
        temperature=temperature,
        gamma=gamma,
        drop_cost=None if drop_cost == math.inf else drop_cost,
        normalize="x",
        backend=backend,
    )
    return loss(speech.float(), transcript.float(), speech_lengths, transcript_lengths)


def alignment_loss(
    log_probs: Tensor, transcripts: list[Tensor], speech_lengths: Tensor, *, method: str = "ctc"
) -> Tensor:
    """-log p(transcript | speech) of speech tokens that each say a token of a vocabulary or, the blank, nothing.

    A cheap pre-alignment, before the language model is ever run.

    Args:
        log_probs: (B, N, 1 + C), the blank first.
        transcripts: B tensors of classes, 1 to C.
        speech_lengths: (B,). Samples with fewer speech tokens than CTC needs add nothing (``zero_infinity``).
        method: "ctc"; "soft_dtw", which gives every speech token to a token of the transcript; or "drop_dtw", which
            may give it to the blank (both with gamma 1, in nats).

    Returns:
        The loss per transcript token, mean over the batch.
    """
    check_option("method", method, ALIGNMENTS)
    lengths = torch.tensor([len(ids) for ids in transcripts])
    if method == "ctc":
        return nn.functional.ctc_loss(
            log_probs.transpose(0, 1), torch.cat(transcripts), speech_lengths, lengths, blank=0, zero_infinity=True
        )
    said = pad_sequence(transcripts, batch_first=True)
    cost = -log_probs.gather(2, said[:, None].expand(-1, log_probs.shape[1], -1))
    drop_cost = -log_probs[..., 0] if method == "drop_dtw" else None
    values = lyra_ops.soft_dtw_from_cost(cost, speech_lengths, lengths, gamma=1.0, drop_cost=drop_cost)
    return (values / lengths).mean()
