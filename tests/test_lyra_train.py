"""Training on tiny random weights: the losses fall, a stopped run goes on as if it had not stopped."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
from lyra_models import tiny_lyra, tiny_speech_tokenizer

from lyra_model import train as training
from lyra_model.features import Utterance, load_features
from lyra_model.regularizer import alignment_loss, cross_modality_loss

SETTINGS = training.Settings(
    align_steps=12, reread_steps=12, align_batch=4, joint_steps=12, joint_batch=4, align_lr=1e-2, joint_lr=1e-2
)


@pytest.fixture(scope="module")
def tiny():
    return tiny_lyra("vocabulary")


@pytest.fixture
def utterances():
    rng = np.random.default_rng(0)
    texts = ["ab", "cab", "bad cab", "a bad dab", "dab", "add", "a cad", "bead"]
    rows = [rng.standard_normal((3 + 2 * len(text), 24 * 6)).astype(np.float16) for text in texts]
    return [Utterance(r, text, "none", "phrase") for r, text in zip(rows, texts, strict=True)]


def run(tiny, utterances, out, *, init=None, settings=SETTINGS):
    model = copy.deepcopy(tiny[0])
    model.language_model.to(torch.bfloat16)  # as `lyra train` has it
    out.mkdir(exist_ok=True)
    answers = {"dab": "yes<|im_end|>"}
    training.train(model, tiny[1], tiny_speech_tokenizer(), utterances, answers, settings, out, init=init)
    return {n: p for n, p in model.state_dict().items() if "lora" in n or "projector.linear" in n}


def test_features_are_loaded_from_any_shard_on(tmp_path):
    for shard in (3, 4, 5):
        np.save(tmp_path / f"{shard:05d}.npy", np.full((10, 2), shard, np.float16))
        rows = [{"end": end, "text": f"{shard} {end}", "voice": "none", "kind": "phrase"} for end in (5, 10)]
        (tmp_path / f"{shard:05d}.json").write_text(json.dumps(rows))
    assert [u.text for u in load_features(tmp_path, 3, start=2000)] == ["4 5", "4 10", "5 5"]
    assert len(load_features(tmp_path)) == 6
    with pytest.raises(ValueError, match=r"got 2 encoded in .* from 2500 on, expected 3"):
        load_features(tmp_path, 3, start=2500)


def stopping(stages, steps):
    """``training.batches``, except that the user presses Ctrl-C in the given stage after ``steps`` batches."""
    calls = iter(range(10))

    def batches(*arguments, original=training.batches):
        stage = next(calls)
        for step, batch in enumerate(original(*arguments)):
            if stage == stages and step == steps:
                raise KeyboardInterrupt
            yield batch

    return batches


def test_each_stage_trains_what_it_should(tiny, utterances, tmp_path):
    before = copy.deepcopy(tiny[0].state_dict())
    after = run(tiny, utterances, tmp_path)
    assert all(torch.equal(before[n], p) for n, p in tiny[0].state_dict().items()), "the model handed in was changed"
    for stage, layers in (("align", ("linear_1", "linear_2")), ("reread", ("linear_3", "linear_4"))):
        aligned = torch.load(tmp_path / f"{stage}.pt")["weights"]
        assert aligned.keys() == {f"projector.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        for name, weight in aligned.items():
            trained = after[f"speech_{name}"]
            assert not torch.equal(weight, trained), f"{name} rests in the joint stage"
    assert all(p.abs().max() > 0 for n, p in after.items() if "lora_B" in n), "an adapter rests"
    for name in ("align", "reread", "joint"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 12
    assert {p.name for p in tmp_path.iterdir()} >= {
        "speech_projector.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }


@pytest.mark.parametrize(("stage", "steps"), [(0, 6), (1, 9), (2, 9)])
def test_a_stopped_run_resumes_to_the_same_weights(tiny, utterances, tmp_path, stage, steps, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 4)
    whole = run(tiny, utterances, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "batches", stopping(stage, steps))
        run(tiny, utterances, tmp_path / "resumed")
    resumed = run(tiny, utterances, tmp_path / "resumed")
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


def test_a_question_heard_as_if_typed_leaves_the_adapter_alone(tiny, utterances, monkeypatch):
    """Its target is all that the language model might reply, not its likeliest reply; one that is misheard moves it."""
    model, processor = copy.deepcopy(tiny[0]).requires_grad_(False), tiny[1]
    targets = r"language_model\..*\.(q_proj|v_proj)"
    model.add_adapter(training.LoraConfig(r=2, target_modules=targets), training.ADAPTER)
    settings = dataclasses.replace(SETTINGS, regularizer=0.0, joint_alignment=0.0)
    assert model.config.adapters == "speech"
    stage = training.JointStage(model, processor, settings, {"dab": "yes<|im_end|>", "add": "no"})
    batch = [u for u in utterances if u.text in ("dab", "add")]

    def moves(heard):
        rows, new = [], []
        for utterance, text in zip(batch, heard):
            said = model.get_input_embeddings()(processor.tokenizer(text, return_tensors="pt")["input_ids"][0])
            rows.append(torch.cat([torch.ones(len(utterance.stacked) - len(said), said.shape[1]), said]))
            new.append(torch.arange(len(utterance.stacked)) >= len(utterance.stacked) - len(said))
        monkeypatch.setattr(model.speech_projector, "forward", lambda *_: (torch.cat(rows), torch.cat(new)))
        stage(batch)["loss"].backward()
        adapter = [p for n, p in model.named_parameters() if "lora_B" in n]
        return max(p.grad.abs().max().item() for p in adapter), model.zero_grad()

    right, wrong = moves([u.text for u in batch])[0], moves(["bad", "a"])[0]
    assert right < 1e-5 * wrong


def test_what_is_to_rest_rests(tiny, utterances, tmp_path):
    """The projector without a learning rate; and the adapter in answering, where it works beside text only."""
    first = run(tiny, utterances, tmp_path / "first")
    alone = dataclasses.replace(
        SETTINGS, align_steps=0, reread_steps=0, projector_lr=0.0, joint_alignment=0.0, regularizer=0.0,
        question_repeats=0,
    )  # fmt: skip
    second = run(tiny, utterances, tmp_path / "second", init=tmp_path / "first", settings=alone)
    for name, weight in first.items():
        same = torch.equal(second[name].to(torch.bfloat16), weight.to(torch.bfloat16))
        assert same == ("lora" not in name), name
    model = copy.deepcopy(tiny[0])
    model.config.adapters = "speech and text"
    asked = [u for u in utterances if u.text == "dab"]
    settings = dataclasses.replace(SETTINGS, align_steps=0, reread_steps=0, joint_steps=2, joint_batch=1)
    training.train(
        model, tiny[1], tiny_speech_tokenizer(), asked, {"dab": "yes"}, settings, tmp_path, init=tmp_path / "first"
    )
    for name, weight in model.state_dict().items():
        if "lora" in name:
            assert torch.equal(weight.to(torch.bfloat16), first[name].to(torch.bfloat16)), name
        elif "projector.linear" in name:
            assert not torch.equal(weight.to(torch.bfloat16), first[name].to(torch.bfloat16)), name


def test_the_adapter_learns_in_float32_beside_a_bfloat16_model(tiny, utterances, tmp_path):
    run(tiny, utterances, tmp_path)
    state = torch.load(tmp_path / "joint.pt")
    tensors = [*state["weights"].values()]
    for moments in state["optimizer"]["state"].values():
        tensors += [moments["exp_avg"], moments["exp_avg_sq"]]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_init_goes_on_from_the_trained_weights(tiny, utterances, tmp_path):
    """A step of almost no length leaves the weights of the folder, whatever the rank asked for."""
    first = run(tiny, utterances, tmp_path / "first")
    crawl = dataclasses.replace(
        SETTINGS, align_steps=0, reread_steps=0, joint_steps=1, joint_lr=1e-12, projector_lr=1e-12, lora_rank=3
    )
    second = run(tiny, utterances, tmp_path / "second", init=tmp_path / "first", settings=crawl)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name].float(), weight.to(torch.bfloat16).float(), rtol=0, atol=1e-7)
    assert not (tmp_path / "second" / "align.pt").exists(), "aligned again"
    written = json.loads((tmp_path / "second" / "training.json").read_text())
    assert written["lora_rank"] == SETTINGS.lora_rank
    assert written["init"] == json.loads((tmp_path / "first" / "training.json").read_text())


def test_init_and_the_align_stage_alone_keep_the_adapter(tiny, utterances, tmp_path):
    first = run(tiny, utterances, tmp_path / "first")
    align = dataclasses.replace(SETTINGS, align_steps=3, joint_steps=0)
    second = run(tiny, utterances, tmp_path / "second", init=tmp_path / "first", settings=align)
    for name, weight in first.items():
        same = torch.equal(second[name].float(), weight.to(torch.bfloat16).float())
        assert same == ("lora" in name), name
    assert (tmp_path / "second" / "adapter_model.safetensors").exists()


def test_init_from_a_projector_alone_begins_a_new_adapter(tiny, utterances, tmp_path):
    run(tiny, utterances, tmp_path / "aligned", settings=dataclasses.replace(SETTINGS, joint_steps=0))
    assert not (tmp_path / "aligned" / "adapter_config.json").exists()
    joint = dataclasses.replace(SETTINGS, align_steps=0, reread_steps=0)
    after = run(tiny, utterances, tmp_path / "joint", init=tmp_path / "aligned", settings=joint)
    assert not (tmp_path / "joint" / "align.pt").exists()
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in after.items())


def test_regularizer_is_the_papers_formula():
    torch.manual_seed(0)
    speech, text = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    n, m, tau, gamma = [7, 5], [4, 3], 0.06, 0.1
    expected = 0.0
    for b in range(2):
        cost = -torch.log_softmax(speech[b, : n[b]] @ text[b, : m[b]].T / tau, -1)
        r = torch.full((n[b] + 1, m[b] + 1), torch.inf, dtype=torch.float64)
        r[0, 0] = 0
        for i in range(n[b]):
            for j in range(m[b]):
                paths = torch.stack([r[i, j], r[i, j + 1], r[i + 1, j]])
                r[i + 1, j + 1] = cost[i, j] - gamma * torch.logsumexp(-paths / gamma, 0)
        expected += r[-1, -1] / n[b] / 2
    got = cross_modality_loss(speech, text, torch.tensor(n), torch.tensor(m), temperature=tau, gamma=gamma)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_ctc_is_the_sum_over_all_alignments():
    """Three speech tokens say "ab": aab, abb, ab-, a-b, -ab."""
    p = torch.rand(1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    blank, a, b = p[0].unbind(-1)
    paths = [(a, a, b), (a, b, b), (a, b, blank), (a, blank, b), (blank, a, b)]
    expected = -torch.stack([x[0] * y[1] * z[2] for x, y, z in paths]).sum().log() / 2
    got = alignment_loss(p.log(), [torch.tensor([1, 2])], torch.tensor([3]))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("method", ["soft_dtw", "drop_dtw"])
def test_alignment_by_soft_dtw_is_the_sum_over_the_paths_of_a_transcript_of_one_token(method):
    p = torch.randn(1, 9, 21, generator=torch.Generator().manual_seed(0)).softmax(-1)
    got = alignment_loss(p.log(), [torch.tensor([8])], torch.tensor([6]), method=method)
    dropped, said = p[0, :6, 0].double(), p[0, :6, 8].double()
    # One token: soft-DTW has one path; with dropping every speech token is said or dropped, not all of them dropped.
    paths = said.prod() if method == "soft_dtw" else (said + dropped).prod() - dropped.prod()
    torch.testing.assert_close(got.double(), -paths.log(), rtol=1e-4, atol=0)


def test_unknown_alignment_is_refused():
    with pytest.raises(ValueError, match="method: got 'dtw', expected one of 'ctc', 'soft_dtw', 'drop_dtw'"):
        alignment_loss(torch.randn(1, 3, 4), [torch.tensor([1])], torch.tensor([3]), method="dtw")


def test_the_align_stage_needs_a_projector_with_a_vocabulary(utterances, tmp_path):
    with pytest.raises(ValueError, match=r"align_steps, .*: got 12, 12 and 1.0, .* the 'mlp' projector"):
        run(tiny_lyra("mlp"), utterances, tmp_path / "out")
