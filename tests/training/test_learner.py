"""The fused, packed, chunked learner against the plain thing: one forward per episode and a full softmax."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import references
import torch
from episodes import make_episode, random_episode, sampled_item
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from envs.given import GivenEpisode
from envs.types import Episode
from errors import CheckpointError, ProtegeError
from models import attention
from models.causal_lm import CausalLM
from models.transformers_sampler import draw
from models.transformers_scorer import TransformersScorer
from models.types import Signal, SignalKind, SignalSpec, TeacherTopK, TeacherView
from training.distribution_losses import JSD, TopKForwardKL
from training.learner import ItemMetrics, Learner, OptimizerConfig
from training.objectives import SFT, Objective, ReverseKL
from training.packing import TrainingItem

VOCAB = 50


def make_model(seed: int = 0, *, vocab: int = VOCAB, tied: bool = False, dtype=torch.float64) -> Any:
    """A Llama of two layers whose predictions are far from uniform. float64, but for the norms and the logits."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype=dtype)
    model.set_attn_implementation(attention.NAME)
    return model


def make_teacher(seed: int = 1, **options) -> Any:
    """A model that never sees a layout: transformers' own attention, one episode at a time."""
    teacher = make_model(seed, **options)
    teacher.set_attn_implementation("eager")
    return teacher


class SpiedLM(CausalLM):
    """Records what the head is given, and the gradient that reaches the hidden states."""

    def __init__(self, model) -> None:
        super().__init__(model)
        self.head_rows: list[Tensor] = []
        self.hidden_gradients: list[Tensor] = []

    def hidden(self, sequences):
        out = super().hidden(sequences)
        if out.requires_grad:
            out.register_hook(lambda gradient: self.hidden_gradients.append(gradient.clone()))
        return out

    def logits(self, hidden):
        self.head_rows.append(hidden.detach().clone())
        return super().logits(hidden)


# --- the plain computation


def plain_copy(model):
    """The same weights behind transformers' own attention, gradients empty."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    plain.zero_grad(set_to_none=True)
    return plain


def plain_logits(model, episode: Episode, temperature: float = 1.0) -> Tensor:
    """Logits that predict the sampled tokens, in order: one forward, one position at a time."""
    logits = model(input_ids=torch.tensor([episode.token_ids.tolist()]), use_cache=False).logits[0]
    return torch.stack([logits[i - 1] for i in range(len(episode)) if episode.sampled[i]]) / temperature


def sampled_ids(episode: Episode) -> Tensor:
    return torch.tensor([int(episode.token_ids[i]) for i in range(len(episode)) if episode.sampled[i]])


PlainLoss = Callable[[Tensor, TrainingItem], Tensor]  # logits of one episode's trained tokens -> loss of each


def plain_gradients(
    model,
    items: Sequence[TrainingItem],
    loss: PlainLoss,
    *,
    reduction: str = "token_mean",
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    plain = plain_copy(model)
    losses = [loss(plain_logits(plain, item.episode, temperature), item) for item in items]
    if reduction == "token_mean":
        total = torch.cat(losses).sum() / sum(len(x) for x in losses)
    elif reduction == "sequence_mean":
        total = torch.stack([x.mean() for x in losses]).mean()
    else:
        total = torch.cat(losses).sum()
    total.backward()
    return gradients(plain)


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learner_gradients(model, items, objective: Objective, *, lm: CausalLM | None = None, **options):
    model.zero_grad(set_to_none=True)
    metrics = Learner(lm or CausalLM(model), **options).forward_backward(items, objective)
    return gradients(model), metrics


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every parameter has a gradient in both, equal to `tolerance` of its largest entry."""
    assert ours.keys() == expected.keys() and ours
    for name in expected:
        scale = expected[name].abs().max()
        assert scale > 0, f"{name} has no gradient: the case says nothing about it"
        difference = (ours[name] - expected[name]).abs().max()
        assert difference <= tolerance * scale, f"{name}: {difference:.3g} of {scale:.3g}"


def values_of(metrics: Sequence[ItemMetrics], name: str) -> np.ndarray:
    return np.concatenate([metric.values[name] for metric in metrics])


def assert_same_metrics(ours: ItemMetrics, expected: ItemMetrics) -> None:
    assert ours.tokens == expected.tokens and ours.values.keys() == expected.values.keys()
    for name, values in expected.values.items():
        assert values.shape == (expected.tokens,)
        np.testing.assert_allclose(ours.values[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


# --- items


@functools.cache  # teachers never change here
def teacher_logits_of(teacher, episode: Episode, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        return plain_logits(teacher, episode, temperature).double()


def full_item(episode: Episode, teacher, head, swap=None) -> TrainingItem:
    with torch.no_grad():
        states = teacher.model(input_ids=torch.tensor([episode.token_ids.tolist()])).last_hidden_state[0]
    rows = [i - 1 for i in range(len(episode)) if episode.sampled[i]]
    return TrainingItem(episode, Signal(hidden=states[rows], head=head, swap=swap))


def with_topk(item: TrainingItem, ids: Tensor, logprobs: Tensor) -> TrainingItem:
    assert item.signal is not None
    return replace(item, signal=replace(item.signal, topk_ids=ids, topk_logprobs=logprobs.float()))


# Log-ratios of student to sampler on both sides of every bound: 0.8, 1.2, 4 and 5.
LOG_RATIOS = [0.05, -0.6, 0.4, 1.5, 2.0, -0.1]


def near_policy(model, episode: Episode, shift: int) -> Episode:
    """The episode with sampler logprobs that are off the logprobs of `model` by `LOG_RATIOS`, in turn."""
    with torch.no_grad():
        rows = references.probabilities(plain_logits(plain_copy(model), episode))
    own = torch.log(references.of_ids(rows, sampled_ids(episode))).numpy()
    logprobs = np.full(len(episode), np.nan, dtype=np.float32)
    logprobs[episode.sampled] = own - np.resize(np.roll(LOG_RATIOS, shift), len(own))
    return replace(episode, sampler_logprobs=logprobs)


@dataclass
class Case:
    model: Any
    teacher: Any
    episodes: list[Episode]

    def items(self, need: SignalSpec) -> list[TrainingItem]:
        if need is SignalKind.NONE:
            return [TrainingItem(episode, None) for episode in self.episodes]
        if need is SignalKind.FULL:
            return [full_item(episode, self.teacher, self.teacher.lm_head) for episode in self.episodes]
        out = []
        for episode in self.episodes:
            rows = references.probabilities(teacher_logits_of(self.teacher, episode))
            item = sampled_item(episode, torch.log(references.of_ids(rows, sampled_ids(episode))))
            if isinstance(need, TeacherTopK):
                ids = torch.tensor(references.likeliest(rows, need.k))
                item = with_topk(item, ids, torch.log(rows.gather(1, ids)))
            out.append(item)
        return out


def make_case(model=None, episodes: int = 6, seed: int = 7) -> Case:
    """Episodes of one to three turns, of unlike lengths, judged by another model."""
    model = model or make_model(0)
    generator = np.random.default_rng(seed)
    made = [random_episode(generator, VOCAB, turns=1 + k % 3) for k in range(episodes)]
    return Case(model, make_teacher(), [near_policy(model, episode, k) for k, episode in enumerate(made)])


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case()


def plain_loss(objective: Objective, teacher=None) -> PlainLoss:
    if isinstance(objective, SFT):
        return lambda logits, item: references.cross_entropy(logits, sampled_ids(item.episode))
    if isinstance(objective, JSD | TopKForwardKL):
        return lambda logits, item: plain_distribution_loss(objective, logits, item.episode, teacher)
    assert isinstance(objective, ReverseKL)
    low, high = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0)}.get(objective.variant, (0.0, math.inf))

    def reverse_kl(logits, item):
        episode = item.episode
        return references.reverse_kl(
            logits,
            sampled_ids(episode),
            torch.tensor([x for x in episode.sampler_logprobs.tolist() if not math.isnan(x)]),
            item.signal.logprobs,
            [episode.num_sampled],
            variant=objective.variant,
            discount=objective.discount,
            low=low,
            high=high,
            is_cap=objective.is_cap,
            signal_policy=objective.signal_policy,
        )

    return reverse_kl


def plain_distribution_loss(objective: JSD | TopKForwardKL, logits, episode: Episode, teacher) -> Tensor:
    judge = teacher_logits_of(teacher, episode)
    if isinstance(objective, TopKForwardKL):
        return references.topk_forward_kl(logits, judge, references.likeliest(judge, objective.top_k))
    if objective.support == "full":
        return references.jsd(logits, judge, objective.beta)
    support = [[int(x)] for x in sampled_ids(episode)]
    if objective.top_k is not None:
        support = references.likeliest(judge if objective.support == "teacher_topk" else logits, objective.top_k)
    return references.jsd_on(logits, judge, support, objective.beta, objective.tail or "bucket")


OBJECTIVES = [
    *[ReverseKL(variant=v, discount=d) for v in ("importance_sampling", "ppo", "cispo") for d in (0.0, 0.5)],
    ReverseKL(signal_policy="sampler", discount=0.5),
    *[JSD(beta=b) for b in (0.0, 0.5, 1.0)],
    JSD(beta=0.5, support="teacher_topk", top_k=4),
    JSD(beta=0.0, support="student_topk", top_k=4, tail="renormalise"),
    JSD(beta=1.0, support="sampled"),
    TopKForwardKL(4),
    SFT(),
]
EACH_KIND = [ReverseKL(discount=0.5), JSD(beta=0.5), JSD(beta=0.3, support="teacher_topk", top_k=3), SFT()]


# --- fused = plain


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradient_of_every_parameter_equals_the_plain_computation(case, objective):
    items = case.items(objective.need)
    # A chunk of 4 rows and packs of 24 tokens: both cut through episodes and between them.
    ours, metrics = learner_gradients(case.model, items, objective, token_budget=24, head_elements=4 * VOCAB)
    assert_same(ours, plain_gradients(case.model, items, plain_loss(objective, case.teacher)))
    for item, metric in zip(items, metrics, strict=True):
        with torch.no_grad():
            logits = plain_logits(plain_copy(case.model), item.episode)
            expected = plain_loss(objective, case.teacher)(logits, item)
        assert metric.tokens == item.episode.num_sampled == len(expected)
        np.testing.assert_allclose(metric.values["loss"], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_case_has_ratios_on_both_sides_of_every_bound(case):
    """Otherwise the test above would not see the clipping."""
    metrics = Learner(CausalLM(case.model)).measure(case.items(SignalKind.SAMPLED), ReverseKL())
    ratio = values_of(metrics, "ratio")
    for low, high in ((0, 0.8), (0.8, 1.2), (1.2, 4), (4, 5), (5, math.inf)):
        assert ((ratio > low) & (ratio < high)).any(), (low, high)
    assert values_of(metrics, "ratio_truncated").sum() == (ratio > 5).sum()


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "token_sum"])
@pytest.mark.parametrize("objective", EACH_KIND, ids=str)
def test_reductions_over_the_whole_step(case, objective, reduction):
    items = case.items(objective.need)
    assert len({item.episode.num_sampled for item in items}) > 1  # else two of the reductions are one
    ours, _ = learner_gradients(case.model, items, objective, reduction=reduction, token_budget=16)
    assert_same(ours, plain_gradients(case.model, items, plain_loss(objective, case.teacher), reduction=reduction))


@pytest.mark.parametrize("objective", EACH_KIND, ids=str)
def test_gradient_does_not_depend_on_how_the_work_is_cut(case, objective):
    items = case.items(objective.need)
    expected, metrics = learner_gradients(case.model, items, objective, token_budget=10_000)
    padded = CausalLM(case.model)
    padded.packed = False
    for changed in (
        {"head_elements": 1},  # one row at a time: never less than that
        {"head_elements": 3 * VOCAB},
        {"token_budget": 1},  # each episode alone
        {"token_budget": 20},
        {"lm": padded},
        {"lm": padded, "token_budget": 20, "head_elements": 2 * VOCAB},
    ):
        ours, same_metrics = learner_gradients(case.model, items, objective, **{"token_budget": 10_000, **changed})
        assert_same(ours, expected)
        for a, b in zip(same_metrics, metrics, strict=True):
            assert_same_metrics(a, b)
    ours, same_metrics = learner_gradients(case.model, items[::-1], objective, token_budget=20)
    assert_same(ours, expected)
    # Metrics come back in the order of the items, not of the packs.
    for a, b in zip(same_metrics[::-1], metrics, strict=True):
        assert_same_metrics(a, b)


def test_a_chunk_of_the_head_is_not_smaller_than_it_says(case):
    """Of 2^23 logits it has pages of its own, and gives them back; a row less, and glibc's heap grows and grows."""
    items = case.items(SignalKind.FULL)
    lm = SpiedLM(case.model)
    learner_gradients(case.model, items, JSD(), lm=lm, head_elements=3 * VOCAB + 1, token_budget=10_000)
    sizes = [len(rows) for rows in lm.head_rows]
    assert len(sizes) > 2 and set(sizes[:-1]) == {4}


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "token_sum"])
def test_factors_weigh_episodes_and_change_nothing_about_the_cut(case, reduction):
    """Of a dataset's weight: the sum over tokens is weighed, what it is divided by is not."""
    objective, items = JSD(beta=0.5), case.items(SignalKind.FULL)
    factors = [0.25, 3.0, 1.0, 0.25, 3.0, 1.0]
    of = {id(item.episode): factor for item, factor in zip(items, factors, strict=True)}
    plain = plain_loss(objective, case.teacher)
    expected = plain_gradients(
        case.model, items, lambda logits, item: plain(logits, item) * of[id(item.episode)], reduction=reduction
    )
    for budget in (16, 10_000):
        case.model.zero_grad(set_to_none=True)
        learner = Learner(CausalLM(case.model), reduction=reduction, token_budget=budget, head_elements=3 * VOCAB)
        metrics = learner.forward_backward(items, objective, factors)
        assert_same(gradients(case.model), expected)
        unweighed = learner.measure(items, objective)
        for a, b in zip(metrics, unweighed, strict=True):
            assert_same_metrics(a, b)  # what is measured is not weighed


def test_gradients_of_two_calls_add_up(case):
    items = case.items(SignalKind.SAMPLED)
    learner = Learner(CausalLM(case.model), reduction="token_sum")
    case.model.zero_grad(set_to_none=True)
    learner.forward_backward(items[:2], ReverseKL())
    learner.forward_backward(items[2:], ReverseKL())
    ours = gradients(case.model)
    assert_same(ours, learner_gradients(case.model, items, ReverseKL(), reduction="token_sum")[0])


def with_head_bias(model) -> Any:
    bias = torch.nn.Linear(32, VOCAB, bias=True, dtype=torch.float64)
    with torch.no_grad():
        bias.weight.copy_(model.lm_head.weight)
        bias.bias.copy_(torch.linspace(-1, 1, VOCAB))
    model.lm_head = bias
    return model


def with_lora(model) -> Any:
    torch.manual_seed(5)
    config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    return adapted.to(torch.float64)


@pytest.mark.parametrize("kind", ["tied", "head bias", "lora"])
@pytest.mark.parametrize("objective", EACH_KIND, ids=str)
def test_other_heads_and_adapters(kind, objective):
    model = {
        "tied": lambda: make_model(0, tied=True),
        "head bias": lambda: with_head_bias(make_model(0)),
        "lora": lambda: with_lora(make_model(0)),
    }[kind]()
    made = make_case(model, episodes=3)
    items = made.items(objective.need)
    ours, _ = learner_gradients(model, items, objective, token_budget=20, head_elements=3 * VOCAB)
    assert_same(ours, plain_gradients(model, items, plain_loss(objective, made.teacher)))
    names = set(ours)
    assert {
        "tied": "lm_head.weight" not in names and "model.embed_tokens.weight" in names,
        "head bias": "lm_head.bias" in names,
        "lora": all("lora_" in name for name in names) and len(names) == 2 * 2 * 7,
    }[kind]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_activation_checkpointing_changes_no_gradient(adapted, packed):
    model = with_lora(make_model(0)) if adapted else make_model(0)
    made = make_case(model, episodes=3)
    items = made.items(SignalKind.SAMPLED)
    expected, _ = learner_gradients(model, items, ReverseKL(discount=0.5))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    calls = []
    layer = (model.get_base_model() if adapted else model).model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    lm = CausalLM(model)
    lm.packed = packed
    ours, _ = learner_gradients(model, items, ReverseKL(discount=0.5), lm=lm)
    assert len(calls) == 2  # once forward, once more for the backward pass
    assert_same(ours, expected)


def test_bfloat16_compute_gives_float32_gradients_in_the_same_direction():
    model = make_model(0, dtype=torch.float32)
    made = make_case(model, episodes=3)
    items = made.items(SignalKind.SAMPLED)
    objective = ReverseKL(discount=0.5, is_cap=100.0)  # no ratio near a bound, where rounding would decide
    expected, _ = learner_gradients(model, items, objective)
    lm = CausalLM(model, compute_dtype=torch.bfloat16)
    assert lm.logits(lm.hidden([torch.tensor([1, 2, 3])])).dtype == torch.float32
    ours, _ = learner_gradients(model, items, objective, lm=lm, token_budget=20, head_elements=3 * VOCAB)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.98, name


def test_a_frozen_trunk_trains_the_head_alone(case):
    model = copy.deepcopy(case.model)
    expected = plain_gradients(model, case.items(SignalKind.NONE), plain_loss(SFT()))
    model.model.requires_grad_(False)
    ours, _ = learner_gradients(model, case.items(SignalKind.NONE), SFT())
    assert ours.keys() == {"lm_head.weight"}
    assert_same(ours, {"lm_head.weight": expected["lm_head.weight"]})


# --- only trained positions


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("objective", [ReverseKL(discount=0.5, is_cap=1e6), JSD(beta=0.5), SFT()], ids=str)
def test_gradient_at_positions_that_do_not_predict_a_sampled_token_is_exactly_zero(case, objective, packed):
    for episode, item in zip(case.episodes, case.items(objective.need), strict=True):
        lm = SpiedLM(case.model)
        lm.packed = packed
        learner_gradients(case.model, [item], objective, lm=lm, head_elements=2 * VOCAB)
        (gradient,) = lm.hidden_gradients
        predicts = np.append(episode.sampled[1:], False)
        assert gradient.shape == (len(episode), 32)
        assert (gradient[torch.from_numpy(~predicts)] == 0).all()
        assert (gradient[torch.from_numpy(predicts)] != 0).any(dim=1).all()


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("objective", EACH_KIND, ids=str)
def test_head_runs_on_trained_rows_only_and_in_chunks(case, objective, rows):
    lm = SpiedLM(case.model)
    items = case.items(objective.need)
    learner_gradients(case.model, items, objective, lm=lm, head_elements=rows * VOCAB, token_budget=30)
    passes = 2 if objective.looks_ahead else 1
    trained = sum(item.episode.num_sampled for item in items)
    assert sum(map(len, lm.head_rows)) == passes * trained
    assert max(map(len, lm.head_rows)) <= rows
    if rows == 1000:
        assert len(lm.head_rows) < trained  # chunks are as large as they may be


def test_a_sampled_pad_or_eos_token_trains(case):
    """Positions decide. Sampled ids equal to pad (0) and eos (2) train; the same ids in prompts do not."""
    episodes = [
        make_episode([5, 0, 2], [([7, 2, 0], [0, 2, 9]), ([0], [])]),
        make_episode([2, 0], [([0, 0, 0, 0, 2], [])]),
        make_episode([0, 4, 4, 2, 6, 6, 1], [([2], [])]),
    ]
    episodes = [near_policy(case.model, episode, k) for k, episode in enumerate(episodes)]
    made = Case(case.model, case.teacher, episodes)
    for objective in EACH_KIND:
        items = made.items(objective.need)
        expected = plain_gradients(case.model, items, plain_loss(objective, case.teacher))
        for packed in (True, False):
            lm = SpiedLM(case.model)
            lm.packed = packed
            ours, metrics = learner_gradients(case.model, items, objective, lm=lm)
            assert [m.tokens for m in metrics] == [4, 5, 1]
            assert_same(ours, expected)


def test_measure_gives_the_metrics_and_leaves_no_gradient(case):
    for objective in EACH_KIND:
        items = case.items(objective.need)
        _, trained = learner_gradients(case.model, items, objective)
        case.model.zero_grad(set_to_none=True)
        measured = Learner(CausalLM(case.model)).measure(items, objective)
        for a, b in zip(measured, trained, strict=True):
            assert_same_metrics(a, b)
        assert gradients(case.model) == {}


# --- full distributions: heads, vocabularies, columns


class SpiedHead:
    """A teacher's head that records the rows it is asked for."""

    def __init__(self, head) -> None:
        self.head = head
        self.rows: list[Tensor] = []

    def __call__(self, hidden):
        self.rows.append(hidden.clone())
        return self.head(hidden)


@pytest.mark.parametrize("vocabularies", [(VOCAB, VOCAB, VOCAB), (VOCAB, 47, 53), (47, 53, VOCAB)])
def test_every_token_is_compared_with_its_own_teacher(vocabularies):
    """Two teachers in one pack, the student's vocabulary larger or smaller than theirs (a padded embedding)."""
    student = make_model(0, vocab=vocabularies[0])
    teachers = [make_teacher(seed, vocab=v) for seed, v in enumerate(vocabularies[1:], start=1)]
    heads = [SpiedHead(teacher.lm_head) for teacher in teachers]
    generator = np.random.default_rng(1)
    episodes = [random_episode(generator, 47, turns=1 + k % 2) for k in range(7)]
    owner = [0, 1, 1, 0, 1, 0, 0]
    items = [full_item(e, teachers[o], heads[o]) for e, o in zip(episodes, owner, strict=True)]

    def plain(logits, item):
        (k,) = (k for k, other in enumerate(items) if other is item)
        return references.jsd(logits, teacher_logits_of(teachers[owner[k]], item.episode), 0.5)

    ours, _ = learner_gradients(student, items, JSD(beta=0.5), head_elements=10_000)
    assert_same(ours, plain_gradients(student, items, plain))
    for o, head in enumerate(heads):
        asked = torch.cat(head.rows)
        owned = torch.cat([i.signal.hidden for i, own in zip(items, owner, strict=True) if own == o])  # type: ignore[union-attr]
        assert asked.shape == owned.shape  # each of its own rows once, and no other's
        assert torch.equal(asked.sum(1).sort().values, owned.sum(1).sort().values)


def test_a_student_s_embedding_that_is_wider_than_its_tokenizer_gives_a_teacher_no_more_tokens():
    student, teacher = make_model(0, vocab=53), make_teacher(1, vocab=53)
    generator = np.random.default_rng(1)
    items = [full_item(random_episode(generator, 47, turns=1), teacher, teacher.lm_head) for _ in range(3)]

    def plain(logits, item):
        return references.jsd(logits[:, :47], teacher_logits_of(teacher, item.episode)[:, :47], 0.5)

    ours, _ = learner_gradients(student, items, JSD(beta=0.5), known_ids=47)
    assert_same(ours, plain_gradients(student, items, plain))


@pytest.mark.parametrize("width", [47, 53])
@pytest.mark.parametrize("objective", [JSD(beta=0.5, support="teacher_topk", top_k=4), TopKForwardKL(4)], ids=str)
def test_tokens_that_only_the_teacher_has_are_left_out_of_its_top_k(objective, width):
    """A teacher of 53 tokens, a student of 47, whose embedding may have room for more. The mass of the other six is in
    the bucket, or renormalised away."""
    student, teacher = make_model(0, vocab=width), make_teacher(1, vocab=53)
    generator = np.random.default_rng(1)
    episodes = [random_episode(generator, 47, turns=1 + k % 2) for k in range(4)]
    items, supports = [], {}
    for episode in episodes:
        rows = references.probabilities(teacher_logits_of(teacher, episode))
        ids = torch.tensor(references.likeliest(rows, 4))
        item = sampled_item(episode, torch.log(references.of_ids(rows, sampled_ids(episode))))
        items.append(with_topk(item, ids, torch.log(rows.gather(1, ids))))
        supports[id(episode)] = [[i for i in row if i < 47] for row in ids.tolist()]
    left_out = [4 - len(row) for rows in supports.values() for row in rows]
    assert 0 in left_out and max(left_out) > 0  # the case has both

    def plain(logits, item):
        judge, ids = teacher_logits_of(teacher, item.episode), supports[id(item.episode)]
        if isinstance(objective, JSD):
            return references.jsd_on(logits, judge, ids, objective.beta, "bucket")
        return references.topk_forward_kl(logits, judge, ids)

    ours, _ = learner_gradients(student, items, objective, head_elements=3 * 47, known_ids=47)
    assert_same(ours, plain_gradients(student, items, plain))


def test_a_top_k_longer_than_needed_is_cut_and_a_shorter_one_is_all_there_is(case):
    five, three = (case.items(TeacherTopK(k)) for k in (5, 3))
    expected, _ = learner_gradients(case.model, three, TopKForwardKL(3))
    assert_same(learner_gradients(case.model, five, TopKForwardKL(3))[0], expected)
    assert_same(learner_gradients(case.model, three, TopKForwardKL(5))[0], expected)
    mixed = [*five[:3], *three[3:]]  # unlike teachers in one pack
    assert_same(learner_gradients(case.model, mixed, TopKForwardKL(3), token_budget=10_000)[0], expected)
    with pytest.raises(ValueError, match="has no top k"):
        learner_gradients(case.model, case.items(SignalKind.SAMPLED), TopKForwardKL(3))


def test_answers_of_nobody_knows_whom_train_the_same_and_have_no_ratios(case):
    objective = JSD(beta=0.5, support="teacher_topk", top_k=3)
    items = case.items(objective.need)
    parts = {f.name: getattr(items[0].episode, f.name) for f in fields(items[0].episode)}
    unknown = np.full(len(items[0].episode), np.nan, dtype=np.float32)
    given = replace(items[0], episode=GivenEpisode(**{**parts, "sampler_logprobs": unknown}))
    expected, metrics = learner_gradients(case.model, items, objective)
    ours, mixed = learner_gradients(case.model, [given, *items[1:]], objective)
    assert_same(ours, expected)
    assert metrics[0].values.keys() - mixed[0].values.keys() == {
        "ratio", "ratio_truncated", "mismatch_kl", "sampler_gap",
    }  # fmt: skip
    assert all(np.isfinite(values).all() for metric in mixed for values in metric.values.values())
    assert mixed[1].values.keys() == metrics[1].values.keys()


def test_swapped_columns_exchange_two_ids_of_the_teacher_only(case):
    """Student's end of turn is 2, the teacher's 7. One episode has the swap, its neighbours do not."""
    items = case.items(SignalKind.FULL)
    swapped = replace(items[1], signal=replace(items[1].signal, swap=(2, 7)))
    items = [items[0], swapped, *items[2:]]

    def plain(logits, item):
        teacher = teacher_logits_of(case.teacher, item.episode)
        if item is swapped:
            order = list(range(VOCAB))
            order[2], order[7] = 7, 2
            teacher = teacher[:, order]
        return references.jsd(logits, teacher, 1.0)

    weight = case.teacher.lm_head.weight.detach().clone()
    ours, _ = learner_gradients(case.model, items, JSD(beta=1.0))
    assert_same(ours, plain_gradients(case.model, items, plain))
    assert torch.equal(case.teacher.lm_head.weight, weight)


def test_teacher_gets_no_gradient_even_when_it_is_the_student(case):
    model = make_model(0)
    items = [full_item(episode, model, model.lm_head) for episode in case.episodes]
    ours, metrics = learner_gradients(model, items, JSD(beta=1.0))
    # KL(s || s) is 0 and stationary in s; a gradient through the teacher's side would show.
    assert np.abs(values_of(metrics, "exact_kl")).max() < 1e-6
    assert max(g.abs().max() for g in ours.values()) < 1e-6


# --- temperature


@pytest.mark.parametrize("objective", EACH_KIND, ids=str)
def test_temperature_divides_the_students_logits_once(case, objective):
    temperature = 1.7
    head = TransformersScorer("t", CausalLM(case.teacher), temperature=temperature).head
    items = case.items(objective.need)
    if objective.need is SignalKind.FULL:
        items = [full_item(episode, case.teacher, head) for episode in case.episodes]
    at_one = plain_loss(objective, case.teacher)

    def plain(logits, item):
        if isinstance(objective, JSD) and objective.support == "full":
            return references.jsd(logits, teacher_logits_of(case.teacher, item.episode, temperature), objective.beta)
        return at_one(logits, item)

    ours, _ = learner_gradients(case.model, items, objective, temperature=temperature, head_elements=3 * VOCAB)
    assert_same(ours, plain_gradients(case.model, items, plain, temperature=temperature))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_student_and_scorer_agree_on_one_model_at_any_temperature(case, temperature):
    """Through the real scorer, both kinds: a student judged by itself has no divergence, and equal metrics."""
    scorer = TransformersScorer("self", CausalLM(case.model), temperature=temperature)
    views = [
        TeacherView(e.token_ids.astype(np.int64), np.flatnonzero(e.sampled), np.flatnonzero(e.sampled))
        for e in case.episodes
    ]
    learner = Learner(CausalLM(case.model), temperature=temperature)
    for need, objective in ((SignalKind.SAMPLED, ReverseKL()), (SignalKind.FULL, JSD(beta=0.0))):
        signals = scorer._score(views, need)
        items = [TrainingItem(e, s) for e, s in zip(case.episodes, signals, strict=True)]
        metrics = learner.measure(items, objective)
        assert np.abs(values_of(metrics, "kl")).max() < 1e-5
        assert np.abs(values_of(metrics, "loss")).max() < 1e-4


# --- sampled against exact


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_mean_sampled_kl_agrees_with_the_exact_kl_at_the_states_visited(temperature):
    student, teacher = make_model(0, dtype=torch.float32), make_teacher(dtype=torch.float32)
    count, length, prompt = 384, 6, [3, 1, 4, 1]
    generator = torch.Generator().manual_seed(11)
    ids = torch.tensor([prompt] * count)
    drawn = []
    with torch.no_grad():
        for _ in range(length):
            logits = student(input_ids=ids).logits[:, -1]
            uniforms = torch.rand(count, generator=generator)
            token, logprob = draw(logits, torch.full((count,), temperature), uniforms)
            ids = torch.cat([ids, token[:, None]], dim=1)
            drawn.append(logprob)
    logprobs = torch.stack(drawn, dim=1)
    episodes = [
        make_episode(prompt, [(row[len(prompt) :], [])], own)
        for row, own in zip(ids.tolist(), logprobs.tolist(), strict=True)
    ]
    head = TransformersScorer("t", CausalLM(teacher), temperature=temperature).head
    with torch.no_grad():
        states = teacher.model(input_ids=ids).last_hidden_state[:, len(prompt) - 1 : -1]
    items = [TrainingItem(e, Signal(hidden=h, head=head)) for e, h in zip(episodes, states, strict=True)]
    metrics = Learner(CausalLM(student), temperature=temperature).measure(items, JSD(beta=1.0))
    gap = np.array([(m.values["kl"] - m.values["exact_kl"]).sum() for m in metrics])
    error = gap.std() / math.sqrt(count)
    assert abs(gap.mean()) < 4 * error
    assert values_of(metrics, "exact_kl").sum() / count > 20 * error  # the test could tell them apart
    # The learner's policy is the sampler's.
    np.testing.assert_allclose(values_of(metrics, "ratio"), 1, atol=1e-3)
    assert values_of(metrics, "mismatch_kl").max() < 1e-6


@pytest.mark.parametrize("objective", [ReverseKL(), ReverseKL(variant="cispo"), JSD(1.0), JSD(0.5), JSD(0.0)], ids=str)
def test_training_brings_the_student_nearer_to_the_teacher(objective):
    """The sign, end to end: on every token of the vocabulary as the sample, weighted as it would be drawn."""
    student, teacher = make_model(0), make_teacher()
    prompt = [3, 1, 4]
    with torch.no_grad():
        s, t = (
            references.probabilities(m(input_ids=torch.tensor([prompt])).logits[0, -1:])[0] for m in (student, teacher)
        )
    order = torch.multinomial(s, 200, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    episodes = [make_episode(prompt, [([x], [])], [math.log(s[x])]) for x in order]
    if objective.need is SignalKind.FULL:
        items = [full_item(e, teacher, teacher.lm_head) for e in episodes[:1]]
    else:
        items = [sampled_item(e, [math.log(t[x])]) for e, x in zip(episodes, order, strict=True)]
    judge = [full_item(episodes[0], teacher, teacher.lm_head)]
    learner = Learner(CausalLM(student), optimizer=OptimizerConfig())
    before = learner.measure(judge, JSD(1.0))[0].values["exact_kl"].item()
    for _ in range(3):
        learner.forward_backward(items, objective)
        learner.step(3e-3)
    assert learner.measure(judge, JSD(1.0))[0].values["exact_kl"].item() < before


# --- the optimizer


def adamw_by_hand(parameters, gradients_of_steps, rates, config: OptimizerConfig):
    """Loshchilov and Hutter 2019, algorithm 2, with the gradient's global norm clipped first."""
    values = {name: p.clone() for name, p in parameters.items()}
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    norms = []
    for t, (grads, rate) in enumerate(zip(gradients_of_steps, rates, strict=True), start=1):
        norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in grads.values()))
        norms.append(norm)
        shrink = min(1.0, config.max_grad_norm / norm) if config.max_grad_norm else 1.0
        for name, g in grads.items():
            g = g * shrink
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g * g
            m, v = first[name] / (1 - config.beta1**t), second[name] / (1 - config.beta2**t)
            decay = config.weight_decay if values[name].ndim >= 2 else 0.0
            values[name] = values[name] - rate * (m / (v.sqrt() + config.eps) + decay * values[name])
    return values, norms


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05, 1e6])
def test_steps_are_adamw_with_clipping_and_no_decay_of_norms(case, max_grad_norm):
    model = copy.deepcopy(case.model)
    config = OptimizerConfig(weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6, max_grad_norm=max_grad_norm)
    learner = Learner(CausalLM(model), optimizer=config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps, rates, reported = [], [1e-2, 3e-3, 5e-2], []
    for rate in rates:
        learner.forward_backward(case.items(SignalKind.NONE), SFT())
        steps.append(gradients(model))
        out = learner.step(rate)
        assert out["learning_rate"] == rate
        reported.append(out["grad_norm"])
        assert gradients(model) == {}  # cleared
    expected, norms = adamw_by_hand(start, steps, rates, config)
    assert max_grad_norm != 0.05 or min(norms) > 0.05  # the clipped case clips
    assert reported == pytest.approx(norms, rel=1e-6)  # the norm before clipping
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_non_finite_gradient_raises_and_changes_nothing(case, bad, max_grad_norm):
    def fresh():
        model = copy.deepcopy(case.model)
        return model, Learner(CausalLM(model), optimizer=OptimizerConfig(max_grad_norm=max_grad_norm))

    def train(learner):
        learner.forward_backward(case.items(SignalKind.NONE), SFT())
        learner.step(1e-2)

    model, learner = fresh()
    train(learner)
    before = copy.deepcopy(model.state_dict())
    learner.forward_backward(case.items(SignalKind.NONE), SFT())
    model.model.norm.weight.grad[0] = bad
    with pytest.raises(ProtegeError, match="nothing was updated"):
        learner.step(1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert gradients(model) == {}
    # Nor the moments: the next step is the one that would have come without the bad one.
    other, clean = fresh()
    train(clean)
    train(clean)
    train(learner)
    assert all(torch.equal(p, other.state_dict()[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("adapted", [False, True])
def test_a_restored_learner_continues_bit_for_bit(tmp_path, adapted):
    def build() -> Any:
        model = make_model(0, dtype=torch.float32)
        return with_lora(model).float() if adapted else model

    def train(learner, steps):
        for k in range(steps):
            learner.forward_backward(items, SFT())
            learner.step(1e-2 / (k + 1))

    config = OptimizerConfig(weight_decay=0.1)
    generator = np.random.default_rng(2)
    items = [TrainingItem(random_episode(generator, VOCAB, 2), None) for _ in range(3)]
    learner = Learner(CausalLM(build()), optimizer=config)
    train(learner, 3)
    (tmp_path / "trainer_state").mkdir()
    learner.save(tmp_path)
    model = build()
    model.load_state_dict(learner.lm.model.state_dict())
    restored = Learner(CausalLM(model), optimizer=config)
    restored.load_optimizer(tmp_path)
    forgetful = Learner(CausalLM(copy.deepcopy(model)), optimizer=config)
    for each in (learner, restored, forgetful):
        train(each, 2)
    ours, expected = restored.lm.model.state_dict(), learner.lm.model.state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    without = forgetful.lm.model.state_dict()
    assert not all(torch.equal(without[name], expected[name]) for name in expected)  # the state matters


def test_settings_that_were_changed_before_a_resume_are_used(tmp_path, case):
    (tmp_path / "trainer_state").mkdir()
    Learner(CausalLM(case.model)).save(tmp_path)
    changed = OptimizerConfig(beta1=0.5, beta2=0.6, eps=1e-5, weight_decay=0.3)
    resumed, fresh = (Learner(CausalLM(copy.deepcopy(case.model)), optimizer=changed) for _ in range(2))
    resumed.load_optimizer(tmp_path)
    for learner in (resumed, fresh):
        learner.forward_backward(case.items(SignalKind.NONE), SFT())
        learner.step(1e-2)
    ours, expected = resumed.lm.model.state_dict(), fresh.lm.model.state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_saved_weights_are_the_models_own(tmp_path, case):
    (tmp_path / "trainer_state").mkdir()
    Learner(CausalLM(case.model)).save(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).state_dict()
    assert all(torch.equal(loaded[name], p) for name, p in case.model.state_dict().items())


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut short", "another model's"])
def test_an_optimizer_state_that_cannot_be_read_is_a_checkpoint_error(tmp_path, case, damage):
    path = tmp_path / "trainer_state" / "optimizer.pt"
    path.parent.mkdir()
    learner = Learner(CausalLM(copy.deepcopy(case.model)))
    learner.forward_backward(case.items(SignalKind.NONE), SFT())
    learner.step(1e-3)
    learner.save(tmp_path)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "another model's":
        learner = Learner(CausalLM(with_lora(make_model(0))))
    else:
        path.write_bytes(
            {"empty": b"", "garbage": b"not a checkpoint" * 9, "cut short": whole[: len(whole) // 2]}[damage]
        )
    with pytest.raises(CheckpointError, match=r"optimizer's state cannot be read"):
        learner.load_optimizer(tmp_path)


# --- signals that do not fit


@pytest.mark.parametrize("objective", [ReverseKL(), ReverseKL(discount=0.5), JSD()], ids=str)
def test_a_missing_or_short_signal_is_an_error_and_not_a_zero(case, objective):
    learner = Learner(CausalLM(copy.deepcopy(case.model)))
    item = case.items(objective.need)[0]
    with pytest.raises(ValueError, match="has no teacher signal"):
        learner.forward_backward([replace(item, signal=None)], objective)
    signal = item.signal
    assert signal is not None and item.episode.num_sampled > 1
    short = (
        replace(signal, hidden=signal.hidden[:-1])
        if signal.hidden is not None
        else replace(signal, logprobs=signal.logprobs[:-1])  # type: ignore[index]
    )
    with pytest.raises(ValueError, match="per sampled token"):
        learner.forward_backward([replace(item, signal=short)], objective)
    other = SignalKind.FULL if objective.need is SignalKind.SAMPLED else SignalKind.SAMPLED
    with pytest.raises(ValueError, match="per sampled token"):
        learner.forward_backward(case.items(other)[:1], objective)
