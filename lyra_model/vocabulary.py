"""The projector of nano: speech tokens as mixtures of the language model's own embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from .config import LyraConfig

CHUNK = 512  # speech tokens read at once: bounds the memory of logits over the vocabulary
MIXED = 8  # vocabulary rows in the mixture of a speech token
STATE_SCALE = 0.25  # the decoder's states are some ten times larger than the encoder's frames
BLANK_LOGIT = 17.0  # the median of the likeliest token's logit with z = 0: half of the speech tokens begin as blanks


class VocabularyProjector(nn.Module):
    """Reads every speech token with one step of Whisper's decoder and gives what was read to the language model.

    For speech token t, of the encoder frames x_5t .. x_5t+4::

        h_t      = decoder state behind ``config.reader_prompt``, attending to ``config.reader_frames`` around t alone
        z_t, b_t = linear_2(relu(linear_1([x_5t; ..; x_5t+4; h_t])))
        p_t      = softmax([(h_t + z_t) W^T, b_t])         over Whisper's text vocabulary W and a blank
        s_t      = sum_v p_tv rows_v                       over the ``MIXED`` likeliest

    where rows_v is the language model's embedding of the text of Whisper's token v, the blank's that of a space. There
    is no decoding: a speech token does not depend on what was read for another, and there are ten of them per second
    whatever was said. Only ``linear_1`` and ``linear_2`` learn, and they begin at z = 0. A projector that has to find
    the embeddings by itself hears the words of its own training alone; Whisper's decoder knows all of them.
    """

    def __init__(self, config: LyraConfig):
        super().__init__()
        speech = config.speech_config
        self.frames_per_token = config.frames_per_token
        self.frames_before, self.frames_after = config.reader_frames
        self.decoder = WhisperDecoder._from_config(speech).requires_grad_(False)
        self.prompt = list(config.reader_prompt)
        self.rows = nn.Embedding(config.reader_vocabulary + 1, config.text_config.hidden_size).requires_grad_(False)
        self.linear_1 = nn.Linear(speech.d_model * (config.frames_per_token + 1), config.projector_hidden_size)
        self.linear_2 = nn.Linear(config.projector_hidden_size, speech.d_model + 1)
        self.dropout = nn.Dropout(0.0)

    @torch.no_grad()
    def begin(self, embedding: Tensor, texts: list[list[int]]) -> None:
        """Sets the rows: to the mean of the embeddings (V, LLM width) of each token's text.

        Args:
            texts: for each of Whisper's text tokens, and last for the blank, the language model's ids of its text.
        """
        ids = torch.tensor([token for text in texts for token in text])
        starts = torch.tensor([0, *(len(text) for text in texts[:-1])]).cumsum(0)
        self.rows.weight.copy_(nn.functional.embedding_bag(ids, embedding, starts, mode="mean"))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Where training begins: z = 0."""
        self.linear_1.reset_parameters()
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)
        self.linear_2.bias[-1] = BLANK_LOGIT

    @property
    def blank(self) -> int:
        """Index of the blank, behind Whisper's text tokens."""
        return self.rows.num_embeddings - 1

    @torch.no_grad()
    def stack(self, windows: list[Tensor]) -> Tensor:
        """Encoder frames (F_w, d) of windows -> (sum of F_w / frames_per_token, width): what :meth:`forward` takes."""
        per_token = self.frames_per_token
        span = self.frames_before + per_token + self.frames_after
        prompt = torch.tensor([self.prompt], device=windows[0].device)
        stacked, states = [], []
        for frames in windows:
            tokens = len(frames) // per_token
            stacked.append(frames.reshape(tokens, -1))
            # At the ends of a window of audio the frames around a token are its first or last ones.
            first = torch.arange(tokens, device=frames.device) * per_token - self.frames_before
            first = first.clamp(max=len(frames) - span).clamp(min=0)
            around = (first[:, None] + torch.arange(span, device=frames.device)).clamp(max=len(frames) - 1)
            for chunk in around.split(CHUNK):
                read = self.decoder(
                    input_ids=prompt.expand(len(chunk), -1), encoder_hidden_states=frames[chunk], use_cache=False
                )
                states.append(STATE_SCALE * read.last_hidden_state[:, -1])
        return torch.cat([torch.cat(stacked), torch.cat(states)], dim=-1)

    def read(self, stacked: Tensor) -> tuple[Tensor, Tensor]:
        """(..., width) -> h + z (..., d), in the space of Whisper's embeddings, and the logit of the blank (..., 1)."""
        state = stacked[..., -self.decoder.config.d_model :] / STATE_SCALE
        correction, blank = self.linear_2(torch.relu(self.linear_1(self.dropout(stacked)))).tensor_split((-1,), dim=-1)
        return state + correction, blank

    def log_probs(self, stacked: Tensor, classes: Tensor) -> Tensor:
        """(..., width) -> (..., 1 + C) log-probabilities of the blank and the C ``classes``, among these alone."""
        state, blank = self.read(stacked)
        logits = nn.functional.linear(state, self.decoder.embed_tokens.weight[classes])
        return torch.cat([blank, logits], dim=-1).float().log_softmax(-1)

    def forward(self, stacked: Tensor) -> Tensor:
        """(..., width) -> (..., LLM width) speech tokens."""
        state, blank = self.read(stacked)
        chunks = zip(state.reshape(-1, state.shape[-1]).split(CHUNK), blank.reshape(-1, 1).split(CHUNK))
        return torch.cat([self._mix(*chunk) for chunk in chunks]).reshape(*stacked.shape[:-1], -1)

    def _mix(self, state: Tensor, blank: Tensor) -> Tensor:
        likeliest = self.likeliest(state, blank, MIXED)
        # The logits of these alone once more, so that no gradient of the size of the vocabulary is ever held; and as
        # sums, which autocast leaves in float32: in bfloat16 a logit of 20 has but two digits.
        weight = self.decoder.embed_tokens.weight[likeliest.clamp(max=self.blank - 1)]
        logits = torch.where(likeliest == self.blank, blank, (weight * state[:, None]).sum(-1))
        mixture = logits.float().softmax(-1).to(self.rows.weight.dtype)
        return (mixture[..., None] * self.rows(likeliest)).sum(1)

    @torch.no_grad()
    def likeliest(self, state: Tensor, blank: Tensor, count: int) -> Tensor:
        """The ``count`` likeliest tokens (..., count), by falling probability."""
        text = nn.functional.linear(state, self.decoder.embed_tokens.weight[: self.blank])
        return torch.cat([text, blank], dim=-1).topk(min(count, self.blank + 1)).indices

    def greedy(self, stacked: Tensor) -> list[int]:
        """Reads one clip (N, width) without the language model: likeliest tokens, repeats merged, blanks dropped."""
        best = self.likeliest(*self.read(stacked), count=1)[:, 0]
        return [token for token in torch.unique_consecutive(best).tolist() if token != self.blank]
