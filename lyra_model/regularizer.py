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
    speech: Tensor,
    embedding: Tensor,
    blank: Tensor,
    transcript_ids: list[Tensor],
    speech_lengths: Tensor,
    *,
    method: str = "ctc",
    temperature: float = 0.06,
    negatives: int = 6000,
    norm_weight: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Aligns log p(token | s) = log_softmax of cos(s - mu, t - mu) / temperature, mu the mean embedding.

    A cheap pre-alignment, before the language model is ever run: speech tokens become vocabulary rows. Plain products
    s . t fix the order of the classes but not the direction of s; the cosine pulls s towards the row itself, which the
    language model can read. The squared relative distance of ||s - mu|| from the rows' mean, times ``norm_weight``, is
    added: the cosine leaves the norm free. The classes are the batch's own tokens, ``negatives`` random rows and the
    blank.

    Args:
        speech: (B, N, d); embedding: (V, d), frozen; blank: (d,) row that says nothing.
        transcript_ids: B tensors of token ids.
        speech_lengths: (B,). Samples with fewer speech tokens than CTC needs add nothing (``zero_infinity``).
        method: "ctc"; "soft_dtw", which gives every speech token to a token of the transcript; or "drop_dtw", which
            may give it to the blank (both with gamma 1, in nats).

    Returns:
        The loss per transcript token, mean over the batch, plus the norm's share.
    """
    check_option("method", method, ALIGNMENTS)
    targets = torch.cat(transcript_ids)
    sampled = torch.randint(len(embedding), (negatives,), generator=generator)
    vocabulary, positions = torch.cat([targets, sampled]).unique(return_inverse=True)
    mean, norm = center(embedding)
    rows = torch.cat([blank[None], embedding[vocabulary]]).float() - mean
    centered = speech.float() - mean
    log_probs = (cosines(centered, rows) / temperature).float().log_softmax(-1)
    classes = positions[: len(targets)] + 1
    lengths = torch.tensor([len(ids) for ids in transcript_ids])
    if method == "ctc":
        loss = nn.functional.ctc_loss(
            log_probs.transpose(0, 1), classes, speech_lengths, lengths, blank=0, zero_infinity=True
        )
    else:
        said = pad_sequence(classes.split(lengths.tolist()), batch_first=True)
        cost = -log_probs.gather(2, said[:, None].expand(-1, log_probs.shape[1], -1))
        drop_cost = -log_probs[..., 0] if method == "drop_dtw" else None
        values = lyra_ops.soft_dtw_from_cost(cost, speech_lengths, lengths, gamma=1.0, drop_cost=drop_cost)
        loss = (values / lengths).mean()
    return loss + norm_weight * (centered.norm(dim=-1) / norm - 1).square().mean()


@torch.no_grad()
def nearest_tokens(clips: list[Tensor], embedding: Tensor, blank: Tensor) -> list[list[int]]:
    """Greedy CTC reading of the speech tokens (N, d) of each clip: repeats merged, blanks dropped."""
    mean, _ = center(embedding)
    rows = nn.functional.normalize(torch.cat([blank[None], embedding]).float() - mean, dim=-1).T
    read = []
    for speech in clips:  # the norm of a speech token does not change its nearest row
        best = ((speech.float() - mean) @ rows).argmax(-1)
        read.append([int(i) - 1 for i in torch.unique_consecutive(best) if i])
    return read


def center(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """The mean row of an embedding table, and the mean norm of its rows around it."""
    mean = embedding.float().mean(0)
    return mean, (embedding.float() - mean).norm(dim=-1).mean()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.linear(nn.functional.normalize(a, dim=-1), nn.functional.normalize(b, dim=-1))
