"""Losses that align speech tokens with the transcript's embeddings, without a pass through the language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lyra_ops


def cross_modality_loss(
    speech: Tensor,
    transcript: Tensor,
    speech_lengths: Tensor,
    transcript_lengths: Tensor,
    *,
    temperature: float = 0.06,
    gamma: float = 0.1,
) -> Tensor:
    """The latent cross-modality regularizer (Lyra, arXiv 2412.09501, equations 1 and 2), mean over the batch.

    D_ij = -log softmax_j(s_i . t_j / temperature) over the sample's own transcript tokens, aligned by soft-DTW with
    smoothing ``gamma``, divided by the number of speech tokens. One batched call; padding is never aligned.

    Args:
        speech: (B, N, d) speech tokens; transcript: (B, M, d) embeddings of the transcript's tokens.
        speech_lengths, transcript_lengths: (B,) true lengths.
    """
    loss = lyra_ops.soft_dtw(
        speech.float(),
        transcript.float(),
        speech_lengths,
        transcript_lengths,
        cost="contrastive",
        temperature=temperature,
        gamma=gamma,
    )
    return (loss / speech_lengths).mean()


def ctc_alignment_loss(
    speech: Tensor,
    embedding: Tensor,
    blank: Tensor,
    transcript_ids: list[Tensor],
    speech_lengths: Tensor,
    *,
    temperature: float = 0.06,
    negatives: int = 6000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """CTC over the logits s . t / temperature of the batch's own tokens, ``negatives`` random vocabulary rows and a learned blank.

    A cheap pre-alignment: what the vocabulary row nearest to each speech token says becomes the transcript, before the
    language model is ever run. Sampling keeps the product far smaller than the whole vocabulary.

    Args:
        speech: (B, N, d); embedding: (V, d), frozen; blank: (d,), learned; transcript_ids: B tensors of token ids.
        speech_lengths: (B,). Samples with fewer speech tokens than CTC needs add nothing (``zero_infinity``).

    Returns:
        The negative log-likelihood per transcript token, mean over the batch.
    """
    targets = torch.cat(transcript_ids)
    sampled = torch.randint(len(embedding), (negatives,), generator=generator)
    vocabulary, positions = torch.cat([targets, sampled]).unique(return_inverse=True)
    rows = torch.cat([blank[None], embedding[vocabulary].to(blank.dtype)])
    log_probs = nn.functional.linear(speech / temperature, rows).float().log_softmax(-1)
    lengths = torch.tensor([len(ids) for ids in transcript_ids])
    return nn.functional.ctc_loss(
        log_probs.transpose(0, 1), positions[: len(targets)] + 1, speech_lengths, lengths, blank=0, zero_infinity=True
    )


@torch.no_grad()
def nearest_tokens(speech: Tensor, embedding: Tensor, blank: Tensor) -> list[int]:
    """Greedy CTC reading of the speech tokens (N, d) of one clip: repeats merged, blanks dropped."""
    rows = torch.cat([blank[None].to(embedding.dtype), embedding])
    best = nn.functional.linear(speech.to(embedding.dtype), rows).argmax(-1)
    return [int(i) - 1 for i in torch.unique_consecutive(best) if i]
