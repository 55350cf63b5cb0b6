"""Whole models with three adapters, routed by modality; unpatched peft with one sample at a time is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lyra_models import tiny_lyra  # noqa: E402
from test_lyra_model import conversation, tone  # noqa: E402
from test_multi_lora_peft import LINEARS, RANKS, qwen2_vl  # noqa: E402

from lyra_model import nano  # noqa: E402
from lyra_model.modeling import SPEECH_FIELDS  # noqa: E402
from lyra_ops.integrations import apply_multi_lora, modality_adapters  # noqa: E402
from lyra_ops.integrations.multi_lora import RoutedLora  # noqa: E402

ADAPTERS = {frozenset(name.split("+")): name for name in RANKS} | {frozenset(): None}
CHOSEN = ["speech", None, "image+speech", "image"]


@dataclass
class Case:
    """A model with adapters, a batch of four for it, and the same four each by itself."""

    model: transformers.PreTrainedModel
    batch: dict[str, Tensor]
    samples: list[dict[str, Tensor]]
    present: dict[str, Tensor]

    def alone(self, run: Callable, sample: int) -> Tensor:
        """One sample by unpatched peft."""
        if CHOSEN[sample] is None:
            self.model.disable_adapters()
        else:
            self.model.enable_adapters()
            self.model.set_adapter(CHOSEN[sample])
        try:
            return run(self.samples[sample])
        finally:
            self.model.enable_adapters()

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Those of all tokens but padding."""
        mask = inputs["attention_mask"]
        if "mm_token_type_ids" not in inputs:
            # Counted without padding: rotations are float32, so a shifted sample is the same to seven digits only.
            inputs = inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        return self.model(**inputs).logits[mask.bool()]


def add_adapters(model: transformers.PreTrainedModel, targets: str | list[str]) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    for name, rank in RANKS.items():
        model.add_adapter(
            peft.LoraConfig(r=rank, lora_alpha=6, target_modules=targets, init_lora_weights=False), adapter_name=name
        )
    return model.double().eval()


def lyra(model: transformers.PreTrainedModel, processor) -> Case:
    """Spoken and written questions; which of them came with an image is told, since this model sees none itself."""
    asked = [
        conversation(tone(1.2, 1)),
        conversation(text="Which?"),
        conversation(tone(2.0, 2), "Where?"),
        conversation(text="What is this?"),
    ]

    def inputs(conversations: list) -> dict[str, Tensor]:
        fields = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
        return {name: t.double() if t.is_floating_point() else t for name, t in fields.items()}

    batch = inputs(asked)
    add_adapters(model, rf".*language_model.*\.({'|'.join(LINEARS)})")
    speech = batch["input_ids"] == model.config.speech_token_id
    return Case(
        model,
        batch,
        [inputs([one]) for one in asked],
        {"speech": speech, "image": torch.tensor([False, False, True, True])},
    )


@pytest.fixture
def lyra_tiny() -> Case:
    return lyra(*tiny_lyra("mlp"))


@pytest.fixture
def lyra_nano() -> Case:
    return lyra(*nano.build())


@pytest.fixture
def qwen() -> Case:
    model = add_adapters(qwen2_vl(), rf".*language_model.*\.({'|'.join(LINEARS)})")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (4, 9), generator=g)
    ids[2:, 1:7] = torch.tensor([56, 55, 55, 55, 55, 57])
    pixels = torch.randn(2, 16, 3 * 2 * 4 * 4, generator=g).double()

    def inputs(rows: slice) -> dict[str, Tensor]:
        own = ids[rows]
        fields = {
            "input_ids": own,
            "attention_mask": torch.ones_like(own),
            "mm_token_type_ids": (own == 55).int(),
        }
        seen = pixels[[row - 2 for row in range(4)[rows] if row >= 2]]
        if len(seen):
            fields |= {"pixel_values": seen.flatten(0, 1), "image_grid_thw": torch.tensor([[1, 4, 4]] * len(seen))}
        return fields

    present = {"image": ids == 55, "speech": torch.tensor([True, False, True, False])}
    return Case(model, inputs(slice(0, 4)), [inputs(slice(b, b + 1)) for b in range(4)], present)


@pytest.fixture(params=["lyra_tiny", "qwen", pytest.param("lyra_nano", marks=pytest.mark.slow)])
def case(request) -> Case:
    return request.getfixturevalue(request.param)


def test_mixed_batch_and_its_gradients_are_those_of_the_samples_alone(case: Case) -> None:
    weights = {name: p for name, p in case.model.named_parameters() if "lora_" in name}
    wanted, gradients = [], {name: torch.zeros_like(p) for name, p in weights.items()}
    for b, adapter in enumerate(CHOSEN):
        wanted.append(case.alone(case.logits, b))
        if adapter is not None:
            wanted[-1].square().sum().backward()  # into the weights of the active adapter
        for name, p in weights.items():
            if p.grad is not None:
                gradients[name] += p.grad
            p.grad = None

    routed = apply_multi_lora(case.model)
    for p in weights.values():
        p.requires_grad_()
    names = modality_adapters(case.present, ADAPTERS)
    assert names == CHOSEN
    with routed.route(names):
        got = case.logits(case.batch)
    torch.testing.assert_close(got, torch.cat(wanted))
    spoken_for = torch.cat([torch.full((len(w),), name is not None) for w, name in zip(wanted, CHOSEN)])
    got[spoken_for].square().sum().backward()
    torch.testing.assert_close({name: p.grad for name, p in weights.items()}, gradients)
    assert all(g.any() for g in gradients.values())


def step(case: Case, routed: RoutedLora) -> tuple[Tensor, dict[str, Tensor]]:
    case.model.zero_grad()
    with routed.route(CHOSEN):
        got = case.logits(case.batch)
    with routed.route([None] * 4):  # another routing in between must not reach a recomputation
        case.logits(case.batch)
    got.square().sum().backward()
    return got, {name: p.grad for name, p in case.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_routing(case: Case, reentrant: bool) -> None:
    model, routed = case.model.train(), apply_multi_lora(case.model)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    want = step(case, routed)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = []
    first = next(m for m in model.modules() if hasattr(m, "lora_A"))
    first.register_forward_hook(lambda *_: recomputed.append(torch.is_grad_enabled()))
    torch.testing.assert_close(step(case, routed), want)
    assert len(recomputed) == 3


def test_the_language_model_compiles_as_a_whole(case: Case) -> None:
    language = next(m for name, m in case.model.named_modules() if name.endswith("language_model"))
    with apply_multi_lora(case.model).route(CHOSEN):
        want = case.logits(case.batch)
        language.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(case.logits(case.batch), want)


def test_generates_for_each_sample_what_it_generates_alone(case: Case) -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def generate(inputs: dict[str, Tensor]) -> Tensor:
        # Not the model's own generate, which may choose whether its adapters work.
        if "input_features" in inputs:
            ids, mask, speech = inputs["input_ids"], inputs["attention_mask"], {n: inputs[n] for n in SPEECH_FIELDS}
            embeds, mask = case.model.join(ids, mask, **speech)
            inputs = {"input_ids": ids, "attention_mask": mask, "prompt_embeds": embeds}
        out = transformers.GenerationMixin.generate(case.model, **inputs, **options)
        return out[:, inputs["input_ids"].shape[1] :]

    want = [case.alone(generate, b).tolist()[0] for b in range(4)]
    with apply_multi_lora(case.model).route(CHOSEN):
        out = case.model.generate(**case.batch, **options)
    assert out[:, case.batch["input_ids"].shape[1] :].tolist() == want


def test_lyra_without_speech_in_the_batch_keeps_to_the_route(lyra_tiny: Case) -> None:
    model, inputs = lyra_tiny.model, lyra_tiny.samples[3]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.set_adapter("image")
    want = transformers.GenerationMixin.generate(model, **inputs, **options)
    routed = apply_multi_lora(model)
    rested = model.generate(**inputs, **options)  # outside of a route the adapters rest where nobody speaks
    assert not torch.equal(rested, want)
    with routed.route(["image"]):
        assert torch.equal(model.generate(**inputs, **options), want)


def test_adapters_that_reach_into_the_speech_encoder() -> None:
    model, processor = tiny_lyra("mlp")
    inputs = processor.apply_chat_template([conversation(tone(1)), conversation(tone(2))], tokenize=True)
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    add_adapters(model, ["q_proj", "v_proj"])
    model.set_adapter("speech")
    want = model(**inputs).logits
    with apply_multi_lora(model.language_model).route(["speech"] * 2):
        torch.testing.assert_close(model(**inputs).logits, want)
    assert any("lora_A.speech" in name for name, _ in model.speech_encoder.named_parameters())
