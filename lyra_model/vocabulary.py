"""The projector of nano: speech tokens as mixtures of the language model's own embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from .config import LyraConfig

CHUNK = 512  # speech tokens read at once: bounds the memory of logits over the vocabulary
WINDOWS = 16  # windows of audio read again at once
MIXED = 8  # vocabulary rows in the mixture of a speech token
# Of the logits in the mixture: between two embeddings the language model reads neither, and answers at random.
SHARPNESS = 2.0
STATE_SCALE = 0.25  # the decoder's states are some ten times larger than the encoder's frames
BLANK_SCALE = 0.1
BLANK_LOGIT = 17.0  # the median of the likeliest token's logit with z = 0: half of the speech tokens begin as blanks


class VocabularyProjector(nn.Module):
    """Reads every speech token with Whisper's decoder and gives what was read to the language model.

    For speech token t, of the encoder frames x_5t .. x_5t+4, first::

        h_t      = decoder state behind ``config.reader_prompt``, attending to ``config.reader_frames`` around t alone
        z_t, b_t = linear_2(relu(linear_1([x_5t; ..; x_5t+4; h_t])))
        p_t      = softmax([(h_t + z_t) W^T, b_t])         over Whisper's text vocabulary W and a blank

    then ``config.readings - 1`` times, every time with v_t = argmax p_t of the reading before::

        g_t      = decoder state behind the prompt and all text in v_1 .. v_t-1, attending to the whole window
        y_t, c_t = linear_4(relu(linear_3([h_t + z_t; g_t; b_t])))
        p_t      = softmax([((h_t + z_t + g_t) / 2 + y_t) W^T, b_t + c_t])

    and in the end::

        s_t      = sum_v q_tv rows_v                       over the ``MIXED`` likeliest

    where q is p with the logits ``SHARPNESS`` times as large, and rows_v the language model's embedding of the text of
    Whisper's token v, the blank's that of a space; what a window begins with is taken without its leading space, as a
    typed question begins. The text in v leaves out blanks and repeats; a repeat has the g of the token that it repeats.
    Speech tokens whose last reading is a blank or a repeat say nothing new: :meth:`forward` tells which ones do, and
    the language model sees those alone, as few as text has. There is no decoding: a reading runs over all speech tokens
    at once, ten of them per second whatever was said. The first reading hears a moment of sound, the others also know
    the sentence around it. Only the linear layers learn, and they begin at z = y = c = 0. A projector that has to find
    the embeddings by itself hears the words of its own training alone; Whisper's decoder knows all of them.
    """

    def __init__(self, config: LyraConfig):
        super().__init__()
        speech = config.speech_config
        self.frames_per_token = config.frames_per_token
        self.frames_before, self.frames_after = config.reader_frames
        self.decoder = WhisperDecoder._from_config(speech).requires_grad_(False)
        self.prompt = list(config.reader_prompt)
        self.count = config.readings
        self.rows = nn.Embedding(config.reader_vocabulary + 1, config.text_config.hidden_size).requires_grad_(False)
        self.register_buffer("unspaced", torch.arange(config.reader_vocabulary + 1))
        self.linear_1 = nn.Linear(speech.d_model * (config.frames_per_token + 1), config.projector_hidden_size)
        self.linear_2 = nn.Linear(config.projector_hidden_size, speech.d_model + 1)
        self.linear_3 = nn.Linear(speech.d_model * 2 + 1, config.projector_hidden_size // 2)
        self.linear_4 = nn.Linear(config.projector_hidden_size // 2, speech.d_model + 1)
        self.dropout = nn.Dropout(0.0)

    @torch.no_grad()
    def begin(self, embedding: Tensor, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """Sets the rows: to the mean of the embeddings (V, LLM width) of each token's text.

        Args:
            texts: of Whisper's text tokens; the blank's is a space, which says nothing.
            tokenizer: the language model's.
        """
        places: dict[str, int] = {}
        for place, text in enumerate(texts):
            places.setdefault(text, place)
        self.unspaced[: len(texts)] = torch.tensor(
            [places.get(t[1:], i) if t[:1] == " " else i for i, t in enumerate(texts)]
        )
        ids = tokenizer([*(text or " " for text in texts), " "], add_special_tokens=False)["input_ids"]
        starts = torch.tensor([0, *(len(own) for own in ids[:-1])]).cumsum(0)
        ids = torch.tensor([token for own in ids for token in own])
        self.rows.weight.copy_(nn.functional.embedding_bag(ids, embedding, starts, mode="mean"))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Where training begins: z = y = c = 0."""
        for hidden, last in ((self.linear_1, self.linear_2), (self.linear_3, self.linear_4)):
            hidden.reset_parameters()
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
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
        """(T, width) -> h + z (T, d), in the space of Whisper's embeddings, and the logit of the blank (T, 1)."""
        state = stacked[:, -self.decoder.config.d_model :] / STATE_SCALE
        correction, blank = self.linear_2(torch.relu(self.linear_1(self.dropout(stacked)))).tensor_split((-1,), dim=-1)
        return state + correction, blank

    def reread(
        self, stacked: Tensor, first: tuple[Tensor, Tensor], last: tuple[Tensor, Tensor], lengths: list[int]
    ) -> tuple[Tensor, Tensor]:
        """The next reading of windows of ``lengths`` speech tokens, after the ``first`` and the ``last`` one."""
        state, blank = first
        context = self.context(stacked, self.likeliest(*last, count=1)[:, 0], lengths)
        known = torch.cat([STATE_SCALE * state, STATE_SCALE * context, BLANK_SCALE * blank], dim=-1)
        correction, more = self.linear_4(torch.relu(self.linear_3(self.dropout(known)))).tensor_split((-1,), dim=-1)
        return (state + context) / 2 + correction, blank + more

    def readings(self, stacked: Tensor, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
        """All of them, as :meth:`read` gives one."""
        readings = [self.read(stacked)]
        while len(readings) < self.count:
            readings.append(self.reread(stacked, readings[0], readings[-1], lengths))
        return readings

    @torch.no_grad()
    def context(self, stacked: Tensor, read: Tensor, lengths: list[int]) -> Tensor:
        """The decoder's states g (T, d), given the token ``read`` (T,) for each speech token."""
        decoder, width = self.decoder, self.decoder.config.d_model
        states = []
        windows = list(zip(stacked[:, : self.frames_per_token * width].split(lengths), read.split(lengths)))
        for group in (windows[i : i + WINDOWS] for i in range(0, len(windows), WINDOWS)):
            frames = [own.reshape(-1, width) for own, _ in group]
            texts, places = zip(*(self._text(own) for _, own in group))
            ids = pad_sequence(texts, batch_first=True)
            hidden = decoder.embed_tokens(ids) + decoder.embed_positions.weight[: ids.shape[1]]
            lowest = torch.finfo(hidden.dtype).min
            causal = torch.full((ids.shape[1], ids.shape[1]), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)
            padded = pad_sequence([torch.zeros_like(own[:, 0]) for own in frames], True, padding_value=lowest)
            encoded = pad_sequence(frames, batch_first=True)
            for layer in decoder.layers:
                hidden = layer(
                    hidden, causal[None, None], encoded, encoder_attention_mask=padded[:, None, None], use_cache=False
                )
            hidden = decoder.layer_norm(hidden)
            states += [own[place] for own, place in zip(hidden, places)]
        return torch.cat(states)

    def _text(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt and what one window's tokens say, and for each token the place of the state that it is read by."""
        new = self.new(read, [len(read)])
        ids = torch.cat([torch.tensor(self.prompt, device=read.device), read[new]])
        return ids, new.cumsum(0) - (read != self.blank).long() + len(self.prompt) - 1

    def log_probs(self, state: Tensor, blank: Tensor, classes: Tensor) -> Tensor:
        """(T, 1 + C) log-probabilities of the blank and the C ``classes``, among these alone, in a reading."""
        logits = nn.functional.linear(state, self.decoder.embed_tokens.weight[classes])
        return torch.cat([blank, logits], dim=-1).float().log_softmax(-1)

    def forward(self, stacked: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """(T, width) of windows of ``lengths`` speech tokens, one after the other -> (T, LLM width) speech tokens, and
        which of them (T,) say something new."""
        return self.tokens(self.readings(stacked, lengths)[-1], lengths)

    def tokens(self, reading: tuple[Tensor, Tensor], lengths: list[int]) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` gives, of a reading."""
        likeliest = self.likeliest(*reading, count=MIXED)
        new = self.new(likeliest[:, 0], lengths)
        begins = torch.cat([own.cumsum(0) <= 1 for own in new.split(lengths)])
        rows = torch.where(begins[:, None], self.unspaced[likeliest], likeliest)
        chunks = zip(*(part.split(CHUNK) for part in (*reading, likeliest, rows)))
        return torch.cat([self._mixture(*chunk) for chunk in chunks]), new

    def new(self, read: Tensor, lengths: list[int]) -> Tensor:
        """Which of what was ``read`` (T,) is neither a blank nor a repeat within its window."""
        before = [torch.cat([own.new_full((1,), self.blank), own[:-1]]) for own in read.split(lengths)]
        return (read != self.blank) & (read != torch.cat(before))

    def _mixture(self, state: Tensor, blank: Tensor, likeliest: Tensor, rows: Tensor) -> Tensor:
        # The logits of these alone once more, so that no gradient of the size of the vocabulary is ever held; and as
        # sums, which autocast leaves in float32: in bfloat16 a logit of 20 has but two digits.
        weight = self.decoder.embed_tokens.weight[likeliest.clamp(max=self.blank - 1)]
        logits = torch.where(likeliest == self.blank, blank, (weight * state[:, None]).sum(-1))
        mixture = (SHARPNESS * logits.float()).softmax(-1).to(self.rows.weight.dtype)
        return (mixture[..., None] * self.rows(rows)).sum(1)

    @torch.no_grad()
    def likeliest(self, state: Tensor, blank: Tensor, count: int) -> Tensor:
        """The ``count`` likeliest tokens (T, count) of a reading, by falling probability."""
        words = self.decoder.embed_tokens.weight[: self.blank]
        chunks = zip(state.split(CHUNK), blank.split(CHUNK))
        logits = (torch.cat([nn.functional.linear(own, words), none], dim=-1) for own, none in chunks)
        return torch.cat([chunk.topk(min(count, self.blank + 1)).indices for chunk in logits])

    def greedy(self, stacked: Tensor, reading: int = -1) -> list[int]:
        """What a reading of one window (N, width) says: its likeliest tokens, without repeats and blanks."""
        best = self.likeliest(*self.readings(stacked, [len(stacked)])[reading], count=1)[:, 0]
        return [token for token in torch.unique_consecutive(best).tolist() if token != self.blank]
